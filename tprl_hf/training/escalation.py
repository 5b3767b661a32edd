"""Escalation and mean budget: below which probability of the first token a second look is worth its tokens."""

from typing import Any

import torch
from datasets import Dataset
from transformers import LogitsProcessorList

from tprl_hf.modeling.budget import Budget, bounds_of, keep_counts
from tprl_hf.modeling.escalation import Escalation, FirstTokenNotes
from tprl_hf.modeling.generation_tprl import GREEDY
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.values import COUNT, KEPT_FRACTION, number

from .answer_batches import SampleEncoder, left_pad
from .trainer_arguments import given_dataset, with_pictures


@torch.no_grad()
def calibrate_escalation(
    model: TPRLForConditionalGeneration,
    processor: Any,
    dataset: Dataset,
    keep_ratio: float,
    escalate_keep_ratio: float,
    mean_keep_ratio: float,
    batch_size: int = 64,
) -> Escalation:
    r"""
    Finds the probability of the first token below which `generate` asks again, so that it reads `mean_keep_ratio` of
    the visual tokens on average, both looks counted. No answers are needed. A result holds for these budgets only.

    Args:
        model ([`TPRLForConditionalGeneration`]): with a trained policy, or another pruner.
        processor: its processor.
        dataset (`datasets.Dataset`): validation samples; not those that the result is measured on.
            Those without a picture are left out.
        keep_ratio (`float`): fraction of the visual tokens that is KEPT at the first look.
        escalate_keep_ratio (`float`): the same at the second look.
        mean_keep_ratio (`float`): tokens read at both looks, over the visual tokens that there are.
        batch_size (`int`, defaults to 64): samples at a time.

    Returns:
        [`Escalation`]: for `generate(keep_ratio=keep_ratio, escalate=...)`.

    Raises:
        `ValueError`: for a mean that looking again at some samples cannot give, and for a dataset without a picture.

    Example:

    ```python
    >>> escalation = calibrate_escalation(model, processor, validation, 1 / 9, 1 / 3, mean_keep_ratio=1 / 6)
    >>> output = model.generate(**inputs, keep_ratio=1 / 9, escalate=escalation, return_dict_in_generate=True)
    >>> output.num_read.float().mean()
    ```
    """
    keep_ratio = KEPT_FRACTION("keep_ratio", keep_ratio)
    later = number(above=keep_ratio, most=1, what=f"a fraction above keep_ratio={keep_ratio:.4g} that is KEPT")
    escalate_keep_ratio = later("escalate_keep_ratio", escalate_keep_ratio)
    most = keep_ratio + escalate_keep_ratio
    between = number(
        above=keep_ratio, below=most, what=f"between {keep_ratio:.4g}, nobody looks again, and {most:.4g}"
    )
    mean_keep_ratio, batch_size = between("mean_keep_ratio", mean_keep_ratio), COUNT("batch_size", batch_size)
    encoder = SampleEncoder(model, processor)
    rows = with_pictures(given_dataset(dataset, "dataset"), "dataset")
    model.eval()
    budgets = [Budget(ratio, **bounds_of(model.config)) for ratio in (keep_ratio, escalate_keep_ratio)]
    probabilities: list[torch.Tensor] = []
    first: list[torch.Tensor] = []
    second: list[torch.Tensor] = []
    total = 0
    for start in range(0, len(rows), batch_size):
        batch = encoder([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        notes = FirstTokenNotes(len(batch))
        model.generate(
            **batch.prompts(range(len(batch))),
            query_mask=left_pad([sample.query_mask for sample in batch.samples]),
            keep_ratio=keep_ratio,
            max_new_tokens=1,
            **GREEDY,
            logits_processor=LogitsProcessorList([notes]),
            tokenizer=processor.tokenizer,
        )
        assert notes.probability is not None
        probabilities.append(notes.probability.cpu())
        num_visual = batch.inputs.num_visual.cpu()
        total += int(num_visual.sum())
        least = torch.zeros_like(num_visual)  # separators always stay, and a token besides
        if batch.inputs.protected is not None:
            separators = batch.inputs.protected.sum(1).cpu()
            least = torch.where(separators > 0, separators + 1, 0).minimum(num_visual)
        for counts, budget in zip((first, second), budgets, strict=True):
            counts.append(keep_counts(num_visual, budget).maximum(least))
    probability, order = torch.cat(probabilities).sort()
    once, again = torch.cat(first), torch.cat(second)[order]
    read = once.sum() + again.cumsum(0)  # where the least sure n samples are looked at again
    affordable = int((read <= mean_keep_ratio * total).sum())
    if affordable == 0:
        raise ValueError(
            f"Looking again at one of {len(order)} samples reads more than {mean_keep_ratio:.4g} of the tokens: pass "
            "more samples, or a larger mean_keep_ratio."
        )
    ends = probability[affordable - 1], probability[affordable] if affordable < len(order) else torch.ones(())
    return Escalation(escalate_keep_ratio, float(sum(ends) / 2))
