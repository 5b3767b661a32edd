import json
import time
from functools import partial

import pytest
import torch

from tests.cli.test_demo import table_under
from tests.families.tiny_models import build, collate, sample, text, tower
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.cli.main import main
from tprl_hf.evaluation.benchmark import (
    LiveTensors,
    Spread,
    kv_bytes,
    peak_bytes,
    random_prompts,
    ratio,
    requests_per_second,
    time_in_turns,
)
from tprl_hf.evaluation.presets import PRESETS, Preset, preset_config
from tprl_hf.pruners import PRUNERS

PARTS = [
    *("vision", "pruner", "prefill unpruned", "prefill pruned", "prefill floor"),
    *("answer unpruned", "answer pruned"),
]


@pytest.fixture
def run_benchmark(capsys, base_checkpoint):
    """Runs `tprl benchmark` on the tiny model and returns exit code, stdout and stderr."""

    def run(*words: str):
        options = ["benchmark", str(base_checkpoint), "--max-new-tokens", "2", "--rounds", "2", "--keep-ratio", "1/4"]
        return main([*options, *words]), *capsys.readouterr()

    return run


def test_every_part_is_timed_and_the_floor_stands_beside(run_benchmark):
    code, out, _ = run_benchmark("--batch-size", "2")
    assert code == 0
    rows = table_under(out, "part")
    assert [row[0] for row in rows[1:]] == PARTS and all(float(row[1]) > 0 for row in rows[1:])
    assert "4 of 16 visual tokens kept by learned" in out and "batch 2" in out and "cpu, float32" in out
    assert "Command: tprl benchmark" in out and "prefill pruned / floor" in out
    assert rows[0][-1] == "peak MB" and all(float(row[-1]) >= 0 for row in rows[1:])


def test_json_and_another_pruner(run_benchmark):
    code, out, _ = run_benchmark("--json", "--pruner", "divprune")
    found = json.loads(out)
    assert code == 0 and found["pruner"] == "divprune" and list(found["milliseconds"]) == PARTS
    peaks = found["peak_bytes"]
    assert list(peaks) == PARTS and peaks["prefill pruned"] < peaks["prefill unpruned"]
    assert found["kv_bytes_unpruned"] - found["kv_bytes_pruned"] == 12 * 2 * 2 * 2 * 8 * 4
    assert found["ratios"].keys() == found["cpu_ratios"].keys() >= {"prefill pruned / floor", "answer speed-up"}
    assert found["versions"].keys() == {"tprl_hf", "torch", "transformers"} and "load" not in found


def test_layers_of_linear_attention_have_no_kv_cache():
    """Qwen3.5 has keys and values in some layers only; of Gemma 3's, windows hold what they see."""
    for family, layers in {"llava": 2, "qwen3_5": 1, "qwen3_5_moe": 1, "gemma3": 2}.items():
        model = TPRLForConditionalGeneration.from_base_model(build(family), pruner="divprune").eval()
        inputs = collate(family, [sample(family)])
        length, visual = inputs["input_ids"].shape[1], int(model.prune(**inputs, prune=False).num_visual[0])
        for choice, num_tokens in (({"prune": False}, length), ({"num_keep": 3}, length - visual + 3)):
            assert kv_bytes(model, inputs, **choice) == layers * num_tokens * 2 * 2 * 8 * 4, family


def test_requests_per_second_against_batch_size(run_benchmark):
    code, out, _ = run_benchmark("--load", "1,3", "--json")
    assert code == 0
    load = json.loads(out)["load"]
    assert [one["batch"] for one in load] == [1, 3]
    assert all(one[name]["low"] <= one[name]["median"] for one in load for name in ("unpruned", "pruned", "speed_up"))
    code, out, _ = run_benchmark("--load", "2")
    rows = table_under(out, "batch")
    assert rows[1][0] == "2" and float(rows[1][1]) > 0 and "--load 2" in out


def test_what_each_pruner_costs(run_benchmark):
    code, out, _ = run_benchmark("--pruners", "all", "--json")
    found = json.loads(out)
    assert code == 0 and [row["pruner"] for row in found["pruners"]] == [*PRUNERS, "learned"] and not found["refused"]
    assert all(row["choose_ms"]["median"] > 0 and row["tower_ms"]["median"] > 0 for row in found["pruners"])
    code, out, _ = run_benchmark("--pruners", "divprune,fastv")
    assert code == 0 and [row[0] for row in table_under(out, "pruner")[1:]] == ["divprune", "fastv"]
    assert "Command: tprl benchmark" in out and "--pruners divprune,fastv" in out


class TestPresets:
    """Shapes without weights: a tiny one in the place of LLaVA-1.5-7B."""

    WORDS = ("benchmark", "llava-1.5-7b", "--text-tokens", "7", "--max-new-tokens", "2", "--rounds", "2", "--json")

    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch):
        parts = {"text_config": text("llama", vocab_size=1001), "vision_config": tower("clip_vision_model")}
        config = {**parts, "image_token_id": 4, "image_seq_length": 16}
        monkeypatch.setitem(PRESETS, "llava-1.5-7b", Preset("llava", config, 1, "tiny"))

    def test_it_gets_random_weights_and_prompts_of_its_length(self, capsys):
        assert main([*self.WORDS, "--keep-ratio", "1/4"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["weights"] == "random" and "float32" in found["device"]
        assert (found["num_visual"], found["num_keep"], found["length"]) == (16, 4, 16 + 7)
        assert list(found["milliseconds"]) == PARTS
        assert main([*self.WORDS, "--dtype", "auto"]) == 0  # random weights have no dtype of their own
        assert "bfloat16" in json.loads(capsys.readouterr().out)["device"]

    def test_what_needs_weights_is_refused(self, capsys):
        assert main([*self.WORDS, "--device-map", "auto"]) == 2
        assert "gets random weights on one device: leave out --device-map and 4 bits" in capsys.readouterr().err


def test_peak_is_of_what_is_alive_at_once():
    given = torch.zeros(1000)

    def call():
        for _ in range(5):
            one = given + 1
            view = one[1:].view(9, 111)  # takes nothing
            del one
            view.add_(1)
        return view * 2

    assert peak_bytes(call) == 8000  # the last round's and this one's; the result is smaller
    with LiveTensors() as live:
        call()
    assert live.now == 0


def test_spreads_and_ratios_round_by_round():
    assert Spread.of([4, 1, 3, 2, 5]) == Spread(3, 2, 4)
    assert ratio([2, 6, 15], [2, 3, 30]) == Spread(1, 0.75, 1.5)  # of the medians it would be 2
    assert requests_per_second(4, [500, 1000]) == Spread(6, 5, 7)


def test_calls_take_turns():
    called = []

    def call(name):
        called.append(name)
        time.sleep(0.01)  # passes by the wall, not by CPU time

    times = time_in_turns({name: partial(call, name) for name in "ab"}, rounds=2, warmup=1)
    assert called == ["a", "b", "b", "a", "a", "b"] and list(times) == ["a", "b"]
    assert all(len(one.wall) == 2 and min(one.wall) >= 10 > max(one.cpu) for one in times.values())
    with pytest.raises(ValueError, match="rounds must be at least 2, got 1"):
        time_in_turns({}, rounds=1)


def test_random_prompts_are_those_of_the_preset():
    prompts = random_prompts(preset_config("llava-0.5b"), batch_size=2, text_tokens=10)
    assert prompts["input_ids"].shape == (2, 586) and prompts["pixel_values"].shape == (2, 3, 336, 336)
    with pytest.raises(ValueError, match=r"for 'qwen2_5_vl' pass a model with its processor"):
        random_prompts(preset_config("qwen2.5-vl-3b"), 1, 10)
