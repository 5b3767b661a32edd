"""Floating point operations of pruners and prefill, counted by torch while the model runs."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tprl_hf.modeling.generation_tprl import GREEDY
from tprl_hf.modeling.token_pruner import TokenPruner


@dataclass(frozen=True)
class OperationCounts:
    """
    Operations (twice the multiply-accumulates of all matrix products) for one question.

    Args:
        pruner (`int`): From the visual tokens to those that stay, including the part of the LLM that some methods run.
        prefill (`int`): The LLM, until its first new token.
        tower (`int`): Vision tower and projector.
    """

    pruner: int
    prefill: int
    tower: int


def count_pruner(
    model, inputs: dict[str, Any], features: Any, method: TokenPruner | None, budget: dict[str, Any]
) -> tuple[int, Tensor]:
    """
    What choosing the tokens of a question costs.

    Args:
        model ([`TPRLForConditionalGeneration`]):
            The model.
        inputs (`dict`):
            The question, as [`~tprl_hf.evaluation.answers.chat_inputs`] gives it.
        features ([`VisualFeatures`]):
            Of its images, with the tower's attention if the pruner reads it.
        method ([`TokenPruner`], *optional*):
            The pruner; `None` for the model's own policy.
        budget (`dict`):
            As `generate` takes it, such as `{"keep_ratio": 1 / 3}` or `{"prune": False}`.

    Returns:
        `tuple`: Operations, and the keep mask `[V]`.
    """
    with nullcontext() if method is None else model.using(method):
        operations, plan = count(lambda: model.prune(**inputs, **budget, visual_features=features))
    return operations, plan.keep_mask


def count_prefill(model, inputs: dict[str, Any], features: Any, keep_mask: Tensor) -> int:
    """What the LLM costs until its first new token, with the tokens of `keep_mask` (`bool [V]`) alone."""
    return count(
        lambda: model.generate(
            **inputs,
            keep_mask=keep_mask,
            visual_features=features,
            max_new_tokens=1,
            **GREEDY,
            stop_strings=None,
        )
    )[0]


def count(call: Callable[[], Any]) -> tuple[int, Any]:
    """Operations of a call, and what it returns."""
    # the counter does not know the fused attention of CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result
