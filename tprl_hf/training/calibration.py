"""Threshold and budget: which threshold keeps a given fraction of the tokens on average."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from tprl_hf.modeling.budget import Budget, bounds_of
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.token_pruner import LearnedPruner, PruningInputs
from tprl_hf.modeling.values import COUNT, flag, number

from .answer_batches import SampleEncoder
from .trainer_arguments import given_dataset, with_pictures

NUM_BISECTIONS = 20


@torch.no_grad()
def calibrate_threshold(
    model: TPRLForConditionalGeneration,
    processor: Any,
    dataset: Dataset,
    keep_ratio: float,
    batch_size: int = 64,
    set_default: bool = True,
) -> float:
    r"""
    Finds the threshold at which the policy keeps `keep_ratio` of the visual tokens on average. With it the policy
    decides for each sample how much it needs. A threshold found for one budget does not carry over to another.

    Args:
        model ([`TPRLForConditionalGeneration`]): with a trained policy.
        processor: its processor.
        dataset (`datasets.Dataset`): validation samples; not those that the result is measured on.
        keep_ratio (`float`): fraction of the visual tokens that is KEPT on average.
        batch_size (`int`, defaults to 64): samples at a time.
        set_default (`bool`, defaults to `True`): let the model's config name this threshold as its budget, and
            `keep_ratio` as what it keeps.

    Returns:
        `float`: the threshold, in (0, 1).

    Raises:
        `ValueError`: when `keep_ratio` is not a fraction, or out of reach because `min_keep` or `max_keep` bound it,
            and for a dataset without a picture.
    """
    what = "the fraction of visual tokens that is KEPT, a number in (0, 1)"
    keep_ratio = number(above=0, below=1, what=what)("keep_ratio", keep_ratio)
    batch_size, set_default = COUNT("batch_size", batch_size), flag("set_default", set_default)
    encoder = SampleEncoder(model, processor)
    rows = with_pictures(given_dataset(dataset, "dataset"), "dataset")
    batches = [  # without features, which are as large again
        encoder([rows[i] for i in range(start, min(start + batch_size, len(rows)))]).inputs
        for start in range(0, len(rows), batch_size)
    ]
    pruner = RememberedFirstStep(model.policy, model.autoencoder, model.config.num_steps, keep_ratio)
    # in log-odds: where a policy is sure, thresholds lie close to 0 or 1
    low, high = -15.0, 15.0
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        kept = mean_keep_ratio(model, pruner, batches, torch.tensor(middle).sigmoid().item())
        low, high = (middle, high) if kept > keep_ratio else (low, middle)
    threshold = torch.tensor((low + high) / 2).sigmoid().item()
    reached = mean_keep_ratio(model, pruner, batches, threshold)
    if abs(reached - keep_ratio) > 0.05:
        raise ValueError(
            f"No threshold keeps {keep_ratio:.3f} of the tokens: the nearest, {threshold:.4f}, keeps {reached:.3f}. "
            f"Look at min_keep={model.config.min_keep} and max_keep={model.config.max_keep}, or train longer."
        )
    if set_default:
        model.config.keep_ratio, model.config.num_keep, model.config.threshold = None, None, threshold
        model.config.threshold_keep_ratio = keep_ratio
    return threshold


class RememberedFirstStep(LearnedPruner):
    """Remembers the log-odds of the first step, which no threshold changes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.known: dict[int, Tensor] = {}  # by the identity of a batch's tokens

    def logits(self, inputs: PruningInputs, codes: Tensor, keep_mask: Tensor, step: int) -> Tensor:
        if step > 0:
            return super().logits(inputs, codes, keep_mask, step)
        key = id(inputs.tokens)
        if key not in self.known:
            self.known[key] = super().logits(inputs, codes, keep_mask, step)
        return self.known[key]


def mean_keep_ratio(
    model: TPRLForConditionalGeneration, pruner: LearnedPruner, batches: list[PruningInputs], threshold: float
) -> float:
    """Kept tokens over all tokens, with `threshold`."""
    budget = Budget(threshold=threshold, **bounds_of(model.config))
    kept = total = 0
    for inputs in batches:
        keep_mask, _ = pruner.choose(inputs, budget)
        kept += int(keep_mask.sum())
        total += int(inputs.valid.sum())
    return kept / max(total, 1)
