"""Outputs of the pruned batch in the columns of the prompt as the caller gave it."""

import torch
from torch import Tensor

from .columns import take_columns
from .outputs_tprl import TPRLOutput


def logits_wanted(logits_to_keep: int | Tensor, source: Tensor, num_columns: int) -> tuple[Tensor, int | Tensor]:
    """
    Which logits of the pruned batch are needed for those that the caller wants.

    Args:
        logits_to_keep (`int` or `int64 [K]`): as the base model takes it, of the L columns of the original prompt: the
            last so many, 0 for all, or these columns.
        source (`int64 [B, L]`): the pruned column of each of them, see [`source_columns`].
        num_columns (`int`): P, columns of the pruned batch.

    Returns:
        `int64 [B, K]`, the pruned columns whose logits are wanted (-1: none), and the `logits_to_keep` that gives all
        of them.
    """
    if isinstance(logits_to_keep, int):
        source = source[:, -logits_to_keep:]  # 0: all
    else:
        source = source[:, logits_to_keep.cpu()]
    needed = source[source >= 0].unique()
    if len(needed) == 0:
        return source, 1
    if len(needed) == num_columns - int(needed[0]):
        return source, len(needed)  # the last ones
    return source, needed


def to_prompt_output(output: TPRLOutput, source: Tensor, wanted: Tensor, needed: int | Tensor, own: Tensor) -> None:
    """
    Moves logits, hidden states and attentions of the pruned batch to the columns of the original prompt, in place.

    A pruned column has the logits and hidden states of the last kept column before it. It is attended by nobody.

    Args:
        output ([`TPRLOutput`]): of the P pruned columns.
        source (`int64 [B, L]`): the pruned column of each column of the original prompt, see [`source_columns`].
        wanted, needed: see [`logits_wanted`].
        own (`bool [B, L]`): columns of the original prompt that were kept.
    """
    num_columns = int(source.max()) + 1
    if output.logits is not None:
        if output.logits.shape[1] < num_columns:  # some base models return all of them, whatever is needed
            last = torch.arange(num_columns, device="cpu")
            places = last[num_columns - needed :] if isinstance(needed, int) else needed
            wanted = torch.where(wanted >= 0, torch.searchsorted(places, wanted.contiguous()), wanted)
        output.logits = take_columns(output.logits, wanted)
    if output.hidden_states is not None:
        output.hidden_states = tuple(prompt_columns(states, source, 1, num_columns) for states in output.hidden_states)
    if output.attentions is not None:
        attended = source.masked_fill(~own, -1)
        output.attentions = tuple(
            weights
            if weights is None
            else prompt_columns(prompt_columns(weights, source, 2, num_columns), attended, 3, num_columns)
            for weights in output.attentions
        )


def prompt_columns(values: Tensor, source: Tensor, dim: int, num_columns: int) -> Tensor:
    """`values` with P columns at `dim`, in the L columns of `source [B, L]`.

    Raises:
        `ValueError`: for values of another form.
    """
    if values.ndim <= dim or len(values) != len(source) or values.shape[dim] != num_columns:
        raise ValueError(
            f"This base model returns states of shape {tuple(values.shape)}, which have no place in the prompt's "
            "columns: pass compact=True."
        )
    return take_columns(values, source, dim)
