"""Floating point operations of pruners and prefill, counted by torch while the model runs."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tprl_hf.modeling.token_pruner import TokenPruner


@dataclass(frozen=True)
class Counted:
    """
    Operations (twice the multiply-accumulates of all matrix products) for one question.

    Args:
        pruner (`int`): From the visual tokens to those that stay, including the part of the LLM that some methods run.
        prefill (`int`): The LLM, until its first new token.
    """

    pruner: int
    prefill: int


def count_operations(
    model, inputs: dict[str, Any], features: Any, method: TokenPruner | None, budget: dict[str, Any]
) -> Counted:
    """
    What one question costs under a pruner, besides the vision tower.

    Args:
        model ([`TPRLForConditionalGeneration`]):
            The model.
        inputs (`dict`):
            Of one question, as [`~tprl_hf.evaluation.answers.chat_inputs`] gives them.
        features ([`VisualFeatures`], *optional*):
            Of its images, with the tower's attention if the pruner reads it.
        method ([`TokenPruner`], *optional*):
            The pruner; `None` for the model's own policy.
        budget (`dict`):
            As `generate` takes it, such as `{"keep_ratio": 1 / 3}` or `{"prune": False}`.
    """
    with nullcontext() if method is None else model.using(method):
        pruner = _count(lambda: model.prune(**inputs, **budget, visual_features=features))
        both = _count(
            lambda: model.generate(
                **inputs, **budget, visual_features=features, max_new_tokens=1, min_new_tokens=1, do_sample=False
            )
        )
    return Counted(pruner, both - pruner)


def _count(call: Callable[[], Any]) -> int:
    # the counter does not know the fused attention of CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
