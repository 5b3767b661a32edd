"""Deleting visual tokens from a batch of prompts: pure functions of tensors, no model.

Pruning removes columns: the kept columns of each sample are gathered in their order and left-padded, and everything
that runs along the sequence (ids, masks, types, labels, positions) is gathered with the same index.

Letters: B samples, L columns of the original prompt, P columns of the pruned prompt, V visual tokens of the whole
batch in placeholder order (sample by sample, left to right).
"""

import torch
from torch import Tensor


def find_visual(input_ids: Tensor, token_ids: list[int]) -> Tensor:
    """Which columns hold placeholders of visual tokens: `bool [B, L]`."""
    visual = torch.zeros_like(input_ids, dtype=torch.bool)
    for token_id in token_ids:
        visual |= input_ids == token_id
    return visual


def run_lengths(mask: Tensor) -> list[int]:
    """Lengths of the unbroken runs of True in the rows of `mask [B, L]`, in order."""
    starts = mask.clone()
    starts[:, 1:] &= ~mask[:, :-1]
    run = starts.flatten().cumsum(0)[mask.flatten()] - 1
    return torch.bincount(run).tolist()


def kept_columns(attention_mask: Tensor, visual: Tensor, keep_mask: Tensor) -> Tensor:
    """Columns that stay, `bool [B, L]`: attended text, and the visual tokens of `keep_mask [V]`."""
    kept = attention_mask.bool() & ~visual
    kept[visual] = keep_mask.to(kept.device)
    return kept


def left_padded_index(kept: Tensor, padding: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """Where each column of the pruned batch comes from.

    Args:
        kept (`bool [B, L]`): columns that stay.
        padding (`int` or `int64 [B]`): at least so many padding columns on the left of each sample.

    Returns:
        `index [B, P]` into the L columns (0 for padding) and `valid [B, P]`, False for padding.
    """
    counts = kept.sum(1)
    width = int((counts + padding).max())
    return pad_rows_left(kept.nonzero()[:, 1], counts, width)


def gather_columns(values: Tensor, index: Tensor, valid: Tensor, padding: float | int = 0) -> Tensor:
    """`values [..., B, L]` at `index [B, P]`, with `padding` in the padding columns: `[..., B, P]`."""
    index, valid = index.expand(*values.shape[:-1], -1), valid.expand(*values.shape[:-1], -1)
    return values.gather(-1, index.to(values.device)).masked_fill(~valid.to(values.device), padding)


def count_positions(attention_mask: Tensor) -> Tensor:
    """Position ids that count attended tokens from 0, 0 in padding: `int64 [B, L]`."""
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.masked_fill(attention_mask == 0, 0)


def pad_rows(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a whole batch as one padded tensor.

    Args:
        rows (`[V, ...]`): sample by sample.
        counts (`int64 [B]`): rows of each sample.

    Returns:
        `[B, N, ...]` with zeros for padding on the right, and `valid bool [B, N]`, which lies where `counts` lies.
    """
    longest = int(counts.max()) if len(counts) else 0
    valid = torch.arange(longest, device=counts.device) < counts[:, None]
    return fill_rows(rows, valid), valid


def unpad_rows(padded: Tensor, counts: Tensor) -> Tensor:
    """The first `counts [B]` rows of each sample of `padded [B, N, ...]`, sample by sample: `[V, ...]`."""
    valid = torch.arange(padded.shape[1], device=counts.device) < counts[:, None]
    return padded.flatten(0, 1) if valid.all() else padded[valid]


def pad_rows_left(rows: Tensor, counts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """As `pad_rows`, with the zeros before each sample's rows: `[B, longest, ...]`, and `valid bool [B, longest]`."""
    valid = torch.arange(longest, device=counts.device) >= longest - counts[:, None]
    return fill_rows(rows, valid), valid


def fill_rows(rows: Tensor, valid: Tensor) -> Tensor:
    """`rows [V, ...]` at the places of `valid [B, N]`, zeros elsewhere: `[B, N, ...]`."""
    if len(rows) == valid.numel():
        return rows.reshape(*valid.shape, *rows.shape[1:])
    filled = rows.new_zeros(*valid.shape, *rows.shape[1:])
    filled[valid] = rows
    return filled


def restore_prompt(sequences: Tensor, prompt: Tensor, pruned_length: int) -> Tensor:
    """`sequences [R, pruned_length + G]` with the pruned prompt replaced by the original one: `[R, L + G]`.

    R is a multiple of B: beams or return sequences of one sample lie beside each other.
    """
    repeats = sequences.shape[0] // prompt.shape[0]
    prompt = prompt.to(sequences.device).repeat_interleave(repeats, dim=0)
    return torch.cat([prompt, sequences[:, pruned_length:]], dim=1)


def source_columns(columns: Tensor, length: int) -> Tensor:
    """
    Where the values of each column of the original prompt lie in the pruned batch.

    A kept column has its own. A pruned column has those of the last kept column before it, so that the column before
    the next kept one predicts it. So has padding on the right.

    Args:
        columns (`int64 [B, P]`): column of the original prompt of each pruned column, -1 for padding.
        length (`int`): L, columns of the original prompt.

    Returns:
        `int64 [B, L]`: a pruned column, or -1 where no column was kept before.
    """
    valid = columns >= 0
    source = torch.full((len(columns), length + 1), -1, dtype=torch.long, device=columns.device)
    places = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
    source.scatter_(1, columns.masked_fill(~valid, length), places.masked_fill(~valid, -1))
    return source[:, :length].cummax(1).values


def take_columns(values: Tensor, source: Tensor, dim: int = 1) -> Tensor:
    """`values [B, ..., P, ...]` at `source [B, L]` (-1: zeros) along `dim`: `[B, ..., L, ...]`."""
    in_place = torch.arange(source.shape[1], device=source.device)
    if source.shape[1] == values.shape[dim] and bool((source == in_place).all()):
        return values  # nothing was moved
    shape = [1] * values.ndim
    shape[0], shape[dim] = source.shape
    source = source.to(values.device).view(shape)
    wanted = [*values.shape]
    wanted[dim] = source.shape[dim]
    if values.shape[dim] == 0:  # nothing was kept
        return values.new_zeros(wanted)
    taken = values.gather(dim, source.clamp(min=0).expand(wanted))
    return taken.masked_fill(source < 0, 0) if bool((source < 0).any()) else taken
