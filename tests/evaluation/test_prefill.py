import time

import pytest
import torch

from tprl_hf.evaluation.benchmark import measure_prefill


class Slow(torch.nn.Module):
    def forward(self, seconds):
        time.sleep(seconds)


def test_the_llms_share_and_the_whole_are_told_apart():
    llm = Slow()
    called = []

    def call(name, before, inside):
        called.append(name)
        time.sleep(before)
        llm(inside)

    calls = {"short": lambda: call("short", 0.03, 0.002), "long": lambda: call("long", 0.0, 0.02)}
    times = measure_prefill(llm, calls, rounds=3, warmup=1)
    assert called == ["short", "long", "long", "short"] * 2  # in turns
    assert list(times) == ["short", "long"]
    assert 2 <= times["short"].llm_ms < times["long"].llm_ms and 20 <= times["long"].llm_ms
    assert times["short"].total_ms >= 32 and times["long"].total_ms >= times["long"].llm_ms
    assert not llm._forward_hooks and not llm._forward_pre_hooks


def test_a_call_without_the_llm_is_refused_and_leaves_no_hook():
    llm = Slow()
    with pytest.raises(ValueError, match="'idle' ran the LLM 0 times"):
        measure_prefill(llm, {"idle": lambda: None})
    with pytest.raises(ValueError, match="'twice' ran the LLM 2 times"):
        measure_prefill(llm, {"twice": lambda: (llm(0), llm(0))})
    assert not llm._forward_hooks and not llm._forward_pre_hooks
    with pytest.raises(ValueError, match="rounds must be at least 2, got 1"):
        measure_prefill(llm, {}, rounds=1)


def test_what_a_pruner_runs_of_the_llm_is_not_the_llms_share():
    """FastV and SparseVLM run its first layers, and stop it there."""
    llm = torch.nn.Sequential(Slow(), torch.nn.Identity())

    class Stopped(Exception):
        pass

    def call():
        def stop(*_):
            raise Stopped

        hook = llm[1].register_forward_hook(stop)
        with pytest.raises(Stopped):
            llm(0.03)
        hook.remove()
        llm(0.002)

    times = measure_prefill(llm, {"peeks": call}, rounds=3, warmup=0)["peeks"]
    assert 2 <= times.llm_ms < 30 and times.total_ms >= 32
