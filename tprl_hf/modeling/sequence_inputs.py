"""Inputs that run along the sequence: which are refused, and how labels are counted."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .columns import gather_columns

# Where samples of a packed row begin, for kernels that are told so: pruning moves these places.
PLACES_OF_SAMPLES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def refuse_other_forms(inputs: dict[str, Any], input_ids: Tensor) -> None:
    """Raises `ValueError` for inputs along the sequence in a form that cannot be pruned."""
    for name in PLACES_OF_SAMPLES:
        if inputs.get(name) is not None:
            raise ValueError(
                f"{name} cannot be pruned: say where the samples of a packed row begin by position_ids that start "
                "again, without attention_mask and with use_cache=False."
            )
    for name in ("labels", "shift_labels"):
        value = inputs.get(name)
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}; got {tuple(value.shape)}."
            )


def count_no_placeholders(inputs: dict[str, Any], visual: Tensor) -> dict[str, Any]:
    """
    Inputs in which the labels of visual tokens do not count.

    Args:
        inputs (`dict`): with `labels`, `shift_labels`, `num_items_in_batch` among them, or not. The last is the number
            of labels of one or more batches; its share of labels at visual tokens is taken to be that of this batch.
        visual (`bool [B, L]`): placeholders of visual tokens.
    """
    inputs = dict(inputs)
    before = after = 0
    for name in ("shift_labels", "labels"):  # the second is what `Trainer` counts
        labels = inputs.get(name)
        if labels is None:
            continue
        hidden = visual if name == "labels" else pad(visual[:, 1:], (0, 1))
        inputs[name] = labels.masked_fill(hidden.to(labels.device), -100)
        before, after = int((labels != -100).sum()), int((inputs[name] != -100).sum())
    if inputs.get("num_items_in_batch") is not None and after < before:
        inputs["num_items_in_batch"] = inputs["num_items_in_batch"] * (after / before)
    return inputs


def predicted_labels(labels: Tensor, columns: Tensor) -> Tensor:
    """Labels `[B, P]` of the pruned columns, without those of first tokens, which padding would have to predict."""
    first = (columns >= 0) & (pad(columns[:, :-1], (1, 0), value=-1) < 0)
    return labels.masked_fill(first.to(labels.device), -100)


def shifted_labels(shift_labels: Tensor, columns: Tensor) -> Tensor:
    """
    Labels of the token behind each pruned column.

    Args:
        shift_labels (`int64 [B, L]`): labels of the token behind each column of the original prompt.
        columns (`int64 [B, P]`): column of the original prompt of each pruned column, -1 for padding.

    Returns:
        `int64 [B, P]`, -100 where nothing is to be predicted.
    """
    valid = columns >= 0
    labels = pad(shift_labels[:, :-1], (1, 0), value=-100)  # of each column itself
    own = gather_columns(labels, columns.clamp(min=0), valid, -100)
    last = gather_columns(shift_labels, columns[:, -1:].clamp(min=0), valid[:, -1:], -100)
    following = torch.cat([own[:, 1:], last], 1)
    return following.masked_fill(~valid.to(following.device), -100)
