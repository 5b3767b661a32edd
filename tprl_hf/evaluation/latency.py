"""How long the prefill takes: what the LLM spends, and the whole forward, pruner included."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PrefillTime:
    """
    Medians over the repetitions, in milliseconds.

    Args:
        llm_ms (`float`):
            The LLM's part: what pruning makes cheaper.
        total_ms (`float`):
            The whole forward: vision tower, pruner and LLM. What a user waits for.
    """

    llm_ms: float
    total_ms: float


def measure_prefill(
    llm: torch.nn.Module, calls: Mapping[str, Callable[[], Any]], repetitions: int = 7, warmup: int = 2
) -> dict[str, PrefillTime]:
    """
    Times forward calls in turns (a, b, c, a, b, c, ...), so that a machine that slows down slows all of them.

    Args:
        llm (`torch.nn.Module`):
            The module whose share is told apart. It must run once in each call.
        calls (`Mapping[str, Callable]`):
            By name, functions without arguments that run one forward.
        repetitions (`int`, *optional*, defaults to 7):
            Timed rounds.
        warmup (`int`, *optional*, defaults to 2):
            Rounds before them that are not timed.

    Returns:
        `dict[str, PrefillTime]`: Medians by name, in the order of `calls`.

    Raises:
        `ValueError`: If a call does not run `llm` exactly once, or `repetitions` is below 1.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, got {repetitions}.")
    marks: list[float] = []
    hooks = [
        llm.register_forward_pre_hook(lambda *_: marks.append(_now())),
        llm.register_forward_hook(lambda *_: marks.append(_now())),
    ]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    try:
        with torch.no_grad():
            for round_number in range(warmup + repetitions):
                for name, call in calls.items():
                    marks.clear()
                    start = _now()
                    call()
                    end = _now()
                    if len(marks) != 2:
                        raise ValueError(f"The call {name!r} ran the LLM {len(marks) // 2} times instead of once.")
                    if round_number >= warmup:
                        times[name].append((marks[1] - marks[0], end - start))
    finally:
        for hook in hooks:
            hook.remove()
    medians = {
        name: [1000 * statistics.median(part) for part in zip(*both, strict=True)] for name, both in times.items()
    }
    return {name: PrefillTime(llm_ms=llm_ms, total_ms=total_ms) for name, (llm_ms, total_ms) in medians.items()}


def _now() -> float:
    """Seconds, after the device has finished what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
