"""Outputs of the pruned batch in the columns of the prompt as the caller gave it."""

import torch
from torch import Tensor

from .columns import source_columns, take_columns
from .prune_plan import TPRLOutput


def logits_wanted(
    logits_to_keep: int | Tensor, columns: Tensor, length: int, compact: bool
) -> tuple[Tensor, int | Tensor]:
    """
    Which logits of the pruned batch are needed for those that the caller wants.

    Args:
        logits_to_keep (`int` or `int64 [K]`): as the base model takes it, of the L columns of the original prompt: the
            last so many, 0 for all, or these columns. With `compact`, of the P columns of the pruned batch.
        columns (`int64 [B, P]`): column of the original prompt of each pruned column, -1 for padding.
        length (`int`): L.
        compact (`bool`): whether the caller wants the P columns.

    Returns:
        `int64 [B, K]`, where the wanted logits lie among those that the base model returns (-1: nowhere), and the
        `logits_to_keep` for it.
    """
    if compact:
        return torch.zeros(len(columns), 0, dtype=torch.long, device="cpu"), logits_to_keep
    source = source_columns(columns, length)
    num_columns = columns.shape[1]
    if isinstance(logits_to_keep, int):
        if logits_to_keep == 0:
            return source, 0
        source = source[:, -logits_to_keep:]
    else:
        source = source[:, logits_to_keep.cpu()]
    needed = source[source >= 0].unique()
    if len(needed) == 0:
        return source, 1
    if int(needed[-1]) == num_columns - 1 and len(needed) == num_columns - int(needed[0]):
        start = int(needed[0])  # the last ones, as every base model can return them
        return torch.where(source >= 0, source - start, source), num_columns - start
    place = torch.full((num_columns + 1,), -1, dtype=torch.long, device="cpu")
    place[needed] = torch.arange(len(needed), device="cpu")
    return place[source], needed


def to_prompt_output(output: TPRLOutput, columns: Tensor, logits_source: Tensor, length: int) -> None:
    """
    Moves logits, hidden states and attentions of the pruned batch to the columns of the original prompt, in place.

    A pruned column has the logits and hidden states of the last kept column before it. It is attended by nobody.

    Args:
        output ([`TPRLOutput`]): of the P pruned columns.
        columns (`int64 [B, P]`): column of the original prompt of each pruned column, -1 for padding.
        logits_source (`int64 [B, K]`): where the wanted logits lie, see [`logits_wanted`].
        length (`int`): L, columns of the original prompt.
    """
    source = source_columns(columns, length)
    if output.logits is not None:
        output.logits = take_columns(output.logits, logits_source)
    if output.hidden_states is not None:
        output.hidden_states = tuple(prompt_columns(states, source, -2, columns) for states in output.hidden_states)
    if output.attentions is not None:
        moved = []
        own = torch.zeros_like(source, dtype=torch.bool)
        own.scatter_(1, columns.clamp(min=0), columns >= 0)
        own[:, 0] = (columns == 0).any(1)  # padding is marked with -1, not with column 0
        for weights in output.attentions:
            if weights is not None:
                weights = prompt_columns(weights, source, -2, columns)
                weights = prompt_columns(weights, source.masked_fill(~own, -1), -1, columns)
            moved.append(weights)
        output.attentions = tuple(moved)


def prompt_columns(values: Tensor, source: Tensor, dim: int, columns: Tensor) -> Tensor:
    """`values` with P columns at `dim`, in the L columns of `source [B, L]`.

    Raises:
        `ValueError`: for values of another form.
    """
    if len(values) != len(columns) or values.shape[dim] != columns.shape[1]:
        raise ValueError(
            f"This base model returns states of shape {tuple(values.shape)}, which have no place in the prompt's "
            "columns: pass compact=True."
        )
    return take_columns(values, source, values.ndim + dim)
