"""Inputs that run along the sequence: which are refused, and how labels are counted."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .columns import gather_columns
from .values import refuse_misspelled, shown, wrong
from .visual_features import VisualFeatures

# What a call may say besides the inputs of the base model.
OUR_ARGUMENTS = (
    *("keep_ratio", "num_keep", "threshold", "prune", "keep_mask", "query_mask", "visual_features", "compact"),
    "escalate",
)
PASS_TENSORS = "Pass what the processor returns with return_tensors='pt'."
# Where samples of a packed row begin, for kernels that are told so: pruning moves these places.
PLACES_OF_SAMPLES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

# What has a row for each sample, too, but the columns of another prompt or of sound.
OTHER_PROMPTS = ("negative_prompt_ids", "negative_prompt_attention_mask")
OTHER_COLUMNS = (*OTHER_PROMPTS, "feature_attention_mask", "input_features_mask")


def runs_along(name: str, value: Any, input_ids: Tensor) -> bool:
    """Whether the input `name` has a value for each column of the prompts `input_ids [B, L]`."""
    return isinstance(value, Tensor) and value.shape == input_ids.shape and name not in OTHER_COLUMNS


def check_call(
    input_ids: Any, attention_mask: Any, query_mask: Any, visual_features: Any, inputs: dict[str, Any]
) -> None:
    """
    Raises `ValueError` for what cannot be a prompt or lie along one, whatever is to be pruned. Values are looked at
    where that waits for nothing; see also [`check_values`].

    Args:
        input_ids, attention_mask, query_mask, visual_features: as in `forward`, or anything.
        inputs (`dict`): all other arguments of the call.
    """
    refuse_misspelled(inputs, OUR_ARGUMENTS, "The call")
    if visual_features is not None and not isinstance(visual_features, VisualFeatures):
        raise wrong("visual_features", visual_features, "VisualFeatures, as encode_images returns them")
    if input_ids is None:
        return
    if not is_whole(input_ids) or input_ids.ndim != 2 or not input_ids.numel():
        raise wrong("input_ids", input_ids, "a tensor of whole numbers, [B, L], that is not empty", PASS_TENSORS)
    for name, mask in {"attention_mask": attention_mask, "query_mask": query_mask}.items():
        if mask is not None and (not isinstance(mask, Tensor) or mask.is_complex()):
            raise wrong(name, mask, f"a tensor of ones and zeros, {list(input_ids.shape)}", PASS_TENSORS)
    for name in ("position_ids", "labels", "shift_labels"):
        if inputs.get(name) is not None and not is_whole(inputs[name]):
            raise wrong(name, inputs[name], "a tensor of whole numbers", PASS_TENSORS)
    pixels = inputs.get("pixel_values")
    if isinstance(pixels, Tensor) and pixels.shape == input_ids.shape and bool(((pixels == 0) | (pixels == 1)).all()):
        raise ValueError(
            f"pixel_values is {pixels.dtype} with the shape of input_ids, as a mask is: pass attention_mask by its "
            "name, since families of models have other arguments in second place."
        )


def is_whole(value: Any) -> bool:
    """Whether `value` is a tensor of whole numbers."""
    is_number = isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
    return is_number and value.dtype != torch.bool


def check_values(input_ids: Tensor, attention_mask: Tensor, is_placeholder: Tensor, num_ids: int) -> None:
    """
    Raises `ValueError` for a mask that holds anything but ones and zeros, and for ids that no table has.

    Args:
        input_ids, attention_mask, is_placeholder (`[B, L]`, on the CPU): which ids are those of visual tokens, which
            are not looked up, and neither is padding.
        num_ids (`int`): entries of the table.
    """
    refuse_other_than_bits("attention_mask", attention_mask)
    looked_up = attention_mask.bool() & ~is_placeholder
    unknown = looked_up & ((input_ids < 0) | (input_ids >= num_ids))
    if unknown.any():
        sample, column = unknown.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids[{sample}, {column}] is {int(input_ids[sample, column])}, but the model's ids are 0 to "
            f"{num_ids - 1}: use the tokenizer that belongs to it."
        )


def refuse_unknown_labels(inputs: dict[str, Any], num_ids: int) -> None:
    """Raises `ValueError` for `labels` and `shift_labels` that are neither ids of the model nor -100."""
    for name in ("labels", "shift_labels"):
        labels = inputs.get(name)
        unknown = None if labels is None else (labels != -100) & ((labels < 0) | (labels >= num_ids))
        if labels is not None and unknown is not None and unknown.any():
            raise ValueError(
                f"{name} must be ids from 0 to {num_ids - 1}, or -100 for what does not count; got "
                f"{int(labels[unknown][0])}."
            )


def refuse_other_than_bits(name: str, mask: Tensor) -> None:
    """Raises `ValueError` for a mask that holds anything but ones and zeros."""
    other = (mask != 0) & (mask != 1)
    if other.any():
        raise ValueError(f"{name} must hold ones and zeros; got {shown(mask[other][0])}. 1 is for what counts.")


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
