"""One batch of prompts with its visual tokens pruned: everything the base model needs, and the way back.

Ids, masks and positions are worked out on the CPU, wherever the model is. They are many small steps, of which a GPU
would get a kernel each, and be waited for at many.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import is_flash_attention_requested

from .cached_prompt import CachedPrompt, next_position
from .columns import count_positions, gather_columns, kept_columns, left_padded_index
from .lvlm_adapters import HANDED, LVLMAdapter
from .sequence_inputs import runs_along
from .visual_features import VisualFeatures


@dataclass
class PromptBatch:
    """The prompts as the user passed them, with their visual tokens.

    Args:
        input_ids, attention_mask (`int64 [B, L]`, on the CPU): the full prompts.
        visual (`bool [B, L]`, on the CPU): placeholders.
        features: tokens of the images and videos, or `None` where they are not needed.
        inputs: all other inputs of the call.
        device: where the base model gets its inputs.
        record: what the cache already holds.
    """

    input_ids: Tensor
    attention_mask: Tensor
    visual: Tensor
    features: VisualFeatures | None
    inputs: dict[str, Any]
    device: torch.device
    record: CachedPrompt | None = None

    @cached_property
    def num_visual(self) -> Tensor:
        """Visual tokens of each sample, `int64 [B]` on the CPU."""
        return self.visual.sum(1)

    @cached_property
    def visual_ids(self) -> Tensor:
        """Ids of the placeholders, `int64 [V]` on the CPU."""
        return self.input_ids[self.visual]

    @cached_property
    def sample_of(self) -> Tensor:
        """The sample of each visual token, `int64 [V]` on the CPU."""
        return self.visual.nonzero()[:, 0]

    @cached_property
    def shown(self) -> Tensor:
        """Which of the V visual tokens the attention mask does not hide, `bool [V]` on the CPU."""
        return self.attention_mask.bool()[self.visual]

    @cached_property
    def new(self) -> Tensor:
        """Which of the V visual tokens no cache has decided yet, `bool [V]` on the CPU."""
        new = torch.ones(len(self.visual_ids), dtype=torch.bool, device="cpu")
        if self.record is not None:
            start = 0
            for sample, (mask, count) in enumerate(zip(self.record.keep_masks, self.num_visual.tolist(), strict=True)):
                if len(mask) > count:
                    raise ValueError(
                        f"The prompt of sample {sample} has {count} visual tokens, the cached conversation already "
                        f"{len(mask)}: pass the whole conversation, with the placeholders of all its images."
                    )
                new[start : start + len(mask)] = False
                start += count
        return new

    def replace_rows(self, rows: Tensor, where: Tensor, adapter: LVLMAdapter) -> None:
        """Puts `rows` in the place of the visual tokens `where` (`bool [V]`). Features that were passed stay whole.

        Raises:
            `ValueError`: where the base model projects the features itself, so that it takes no changed tokens.
        """
        assert self.features is not None
        if not adapter.takes_projected:
            raise ValueError(
                f"Models of type {adapter.config.model_type!r} project visual features themselves, so that merged "
                "tokens cannot be handed to them: use a pruner that does not merge, or merge=False."
            )
        merged = self.in_order({name: encoded.rows for name, encoded in self.features.modalities.items()}, adapter)
        merged = merged.clone()
        merged[where] = rows.to(merged)
        modalities = {
            name: replace(encoded, rows=merged[self.is_of(name, adapter)].to(encoded.rows))
            for name, encoded in self.features.modalities.items()
        }
        self.features = replace(self.features, modalities=modalities)

    def in_order(self, values: Mapping[str, Tensor], adapter: LVLMAdapter) -> Tensor:
        """Values of each modality's tokens, `[n, ...]`, as those of all tokens in placeholder order, `[V, ...]`."""
        first = next(iter(values.values()))
        if len(first) == len(self.visual_ids):
            return first
        ordered = first.new_empty(len(self.visual_ids), *first.shape[1:])
        for modality, one in values.items():
            ordered[self.is_of(modality, adapter)] = one.to(ordered)
        return ordered

    def is_of(self, modality: str, adapter: LVLMAdapter) -> Tensor:
        """Which of the V visual tokens are of `modality`, `bool [V]` on the CPU."""
        return adapter.placeholders(modality, self.input_ids)[self.visual]


@dataclass
class PrunedBatch:
    """What goes to the base model.

    Args:
        inputs: keyword arguments of the base model's `forward` or `generate`, on its device; all else is on the CPU.
        input_ids, attention_mask (`int64 [B, P]`): those of `inputs`.
        columns (`int64 [B, P]`): column of the original prompt that each pruned column comes from, -1 for padding.
        record: what a cache holds once the base model has read this.
    """

    inputs: dict[str, Any]
    input_ids: Tensor
    attention_mask: Tensor
    columns: Tensor
    record: CachedPrompt


def prune_batch(
    batch: PromptBatch,
    keep_mask: Tensor,
    adapter: LVLMAdapter,
    contiguous: bool,
    pad_token_id: int,
    same_length: bool = False,
    min_padding: int = 0,
    in_parts: bool = False,
) -> PrunedBatch:
    """Removes the visual tokens that `keep_mask [V]` drops from everything that runs along the sequence.

    Args:
        contiguous: number positions anew instead of keeping the original ones.
        same_length: give all samples the same number of placeholders, the missing ones in the padding, where nothing
            attends to them. Needed to repeat a tensor of features for beams.
        min_padding: at least so many padding columns. One is enough to keep `generate` from dropping the mask, without
            which gapped positions would be read as several packed prompts.
        in_parts: the base model reads it behind columns that no record knows: a prefix, or parts of its own.
    """
    keep_mask = keep_mask.cpu()
    keep, counts = rows_that_stay(batch, keep_mask, adapter)
    missing = missing_rows(batch, counts) if same_length and batch.features is not None else {}
    padding = sum(missing.values(), torch.zeros(len(batch.input_ids), dtype=torch.long, device="cpu"))
    if (in_parts or batch.record is not None) and needs_mask(batch, keep_mask, adapter, contiguous):
        min_padding = max(min_padding, 1)
    columns = columns_that_stay(batch, keep_mask, padding.clamp(min=min_padding))
    input_ids = ids_of(batch, columns, adapter, missing, pad_token_id)
    if same_length and batch.features is not None:  # `generate` counts placeholders when it repeats features for beams
        cached = input_ids[:, : columns.num_cached]
        cached.copy_(torch.where(adapter.find_visual(cached), filler_of(batch, pad_token_id), cached))
    attention_mask = columns.valid.long()
    positions = positions_of(batch, columns, adapter, contiguous)
    inputs = {
        **other_inputs(batch, columns, adapter),
        "input_ids": input_ids.to(batch.device),
        "attention_mask": attention_mask.to(batch.device),
        "position_ids": positions.to(batch.device),
    }
    if batch.features is not None and any(rows.any() for rows in keep.values()):
        features = batch.features
        if adapter.hands_over_as_one:
            features, keep, counts = in_one(batch, features, keep, counts, adapter)
        inputs[HANDED] = adapter.mm_encoder_outputs(features, keep, counts, same_length)
    record = record_of(batch, columns, keep_mask, adapter.largest_positions(positions))
    return PrunedBatch(inputs, input_ids, attention_mask, record.columns, record)


@dataclass(frozen=True)
class KeptColumns:
    """Where the P columns of a pruned batch come from.

    Args:
        index (`int64 [B, P]`): into the columns of the full prompt, 0 for padding.
        valid (`bool [B, P]`): False for padding.
        num_cached: so many columns, the first, are those of the cache.
    """

    index: Tensor
    valid: Tensor
    num_cached: int


def rows_that_stay(
    batch: PromptBatch, keep_mask: Tensor, adapter: LVLMAdapter
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of each modality's features: which rows stay, `bool [rows]`, and how many of each sample, `int64 [B]`."""
    keep, counts = {}, {}
    chosen = keep_mask & batch.new
    for modality in batch.features.modalities if batch.features is not None else ():
        of_modality = batch.is_of(modality, adapter)
        keep[modality] = chosen[of_modality]
        counts[modality] = torch.bincount(batch.sample_of[of_modality & chosen], minlength=len(batch.input_ids))
    return keep, counts


def in_one(
    batch: PromptBatch,
    features: VisualFeatures,
    keep: dict[str, Tensor],
    counts: dict[str, Tensor],
    adapter: LVLMAdapter,
) -> tuple[VisualFeatures, dict[str, Tensor], dict[str, Tensor]]:
    """The rows of images and videos, which of them stay and how many, as those of images in placeholder order."""
    rows = batch.in_order({name: encoded.rows for name, encoded in features.modalities.items()}, adapter)
    image = replace(next(iter(features.modalities.values())), rows=rows)
    in_all = torch.stack(list(counts.values())).sum(0)
    return VisualFeatures({"image": image}), {"image": batch.in_order(keep, adapter)}, {"image": in_all}


def missing_rows(batch: PromptBatch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
    """By how many rows each sample has fewer than the one with most, `int64 [B]`, of features in one tensor."""
    modalities = {} if batch.features is None else batch.features.modalities
    in_one_tensor = [name for name, each in modalities.items() if each.container == "tensor"]
    return {modality: counts[modality].max() - counts[modality] for modality in in_one_tensor}


def needs_mask(batch: PromptBatch, keep_mask: Tensor, adapter: LVLMAdapter, contiguous: bool) -> bool:
    """
    Whether behind other columns only a mask tells that this is one prompt. Flash Attention gets no mask of ones, and
    reads gaps in the positions of one sample as packed prompts; none are shown to it where an axis of its own counts
    text.
    """
    one_row = not adapter.has_text_axis and len(batch.input_ids) == 1
    gaps = not contiguous and one_row and bool((batch.new & ~keep_mask).any())
    return gaps and is_flash_attention_requested(adapter.config.get_text_config())


def columns_that_stay(batch: PromptBatch, keep_mask: Tensor, padding: Tensor) -> KeptColumns:
    """The columns of the pruned batch: those of the cache, then what is new and stays, left-padded.

    Args:
        padding (`int64 [B]`): at least so many columns of padding before what is new.
    """
    kept = kept_columns(batch.attention_mask, batch.visual, keep_mask)
    if batch.record is None:
        return KeptColumns(*left_padded_index(kept, padding), num_cached=0)
    return align_with_cache(batch, kept, padding)


def positions_of(batch: PromptBatch, columns: KeptColumns, adapter: LVLMAdapter, contiguous: bool) -> Tensor:
    """Positions of the pruned batch, `[B, P]` or `[R, B, P]`: those of the full prompt, or counted anew."""
    index, valid, num_cached = columns.index, columns.valid, columns.num_cached
    full = batch.inputs.get("position_ids")
    if full is not None:
        full = adapter.complete_positions(full.cpu(), batch.attention_mask)
    elif batch.record is not None and not batch.new.any():  # only text behind a cache
        start = next_position(batch.record.positions, valid[:, :num_cached])
        steps = valid[:, num_cached:].long().cumsum(1) - 1
        positions = torch.cat([batch.record.positions, start[:, None] + steps], 1)
        return adapter.spread_positions(positions, valid)
    if contiguous:
        return adapter.spread_positions(count_positions(valid), valid)
    if full is None:
        geometry = {} if batch.features is None else batch.features.geometry
        full = adapter.position_ids(batch.input_ids, batch.attention_mask, {**geometry, **batch.inputs})
    return adapter.renumber_text_axis(gather_columns(full.cpu(), index, valid), valid)


def other_inputs(batch: PromptBatch, columns: KeptColumns, adapter: LVLMAdapter) -> dict[str, Any]:
    """What the caller passed besides, without what is used up; what runs along the prompt lies in P columns."""
    used_up = adapter.consumed_names() | {"position_ids"}
    inputs = {name: value for name, value in batch.inputs.items() if name not in used_up}
    for name, value in inputs.items():
        if runs_along(name, value, batch.input_ids):
            padding_value = -100 if name == "labels" else 0
            inputs[name] = gather_columns(value, columns.index, columns.valid, padding_value).to(batch.device)
    return inputs


def ids_of(
    batch: PromptBatch, columns: KeptColumns, adapter: LVLMAdapter, missing: dict[str, Tensor], pad_token_id: int
) -> Tensor:
    """Ids of the pruned batch, `int64 [B, P]`, with `missing` placeholders of each modality in the padding."""
    ids = gather_columns(batch.input_ids, columns.index, columns.valid, -1)
    ids = torch.where(ids < 0, filler_of(batch, pad_token_id), ids)  # padding, and columns without a token
    column = torch.arange(ids.shape[1], device="cpu")
    start = torch.full((len(ids), 1), columns.num_cached, device="cpu")
    for modality, count in missing.items():
        end = start + count[:, None]
        ids[(column >= start) & (column < end)] = adapter.token_ids[modality]
        start = end
    return ids


def filler_of(batch: PromptBatch, pad_token_id: int) -> Tensor:
    """
    The id that columns without a token get in each sample, `int64 [B, 1]`: `pad_token_id` where the prompt has padding
    itself, otherwise its first text token. Nothing attends to it, but `generate`'s own processors read all ids, and
    would penalise one that nobody wrote. It is the first, behind which a text hardly comes again.
    """
    text = batch.attention_mask.bool() & ~batch.visual & (batch.input_ids >= 0)
    first = batch.input_ids.gather(1, text.long().argmax(1, keepdim=True))
    has_own = ~text.any(1, keepdim=True) | (batch.attention_mask == 0).any(1, keepdim=True)
    return torch.where(has_own, pad_token_id, first)


def record_of(batch: PromptBatch, columns: KeptColumns, keep_mask: Tensor, positions: Tensor) -> CachedPrompt:
    """What a cache holds once the base model has read the pruned batch, whose largest positions are `[B, P]`."""
    index, valid = columns.index, columns.valid
    if batch.record is not None:
        positions = torch.cat([batch.record.positions, positions[:, columns.num_cached :]], 1)
    decided = gather_columns(batch.visual.long().cumsum(1), index, valid).cummax(1).values
    keep_masks = list(keep_mask.split(batch.num_visual.tolist()))
    ids = gather_columns(batch.input_ids, index, valid)
    sources, length = index.masked_fill(~valid, -1), batch.input_ids.shape[1]
    return CachedPrompt(ids, valid.long(), positions, decided, keep_masks, sources, length)


def align_with_cache(batch: PromptBatch, kept: Tensor, padding: Tensor) -> KeptColumns:
    """Index of a pruned batch whose first columns are those of the cache.

    The cached tokens of each sample stay in their columns; what is new is left-padded behind them, so that samples may
    continue with texts of different length.

    Args:
        padding (`int64 [B]`): at least so many columns of padding behind the cache.

    Raises:
        `ValueError`: where the prompt does not begin with what the cache holds, and where the LLM bears no padding.
    """
    record = batch.record
    assert record is not None
    cached_valid = torch.zeros_like(record.attention_mask, dtype=torch.bool)
    cached_index = torch.zeros_like(record.attention_mask)
    new = kept.clone()
    for sample, columns in enumerate(kept):
        where = columns.nonzero()[:, 0]
        attended = record.attended_columns(sample, batch.input_ids[sample, where])
        cached_columns = where[: int(attended.sum())]
        record.check_images(sample, batch.visual[sample].cumsum(0)[cached_columns], attended)
        cached_valid[sample] = attended
        cached_index[sample, attended] = cached_columns
        new[sample, cached_columns] = False
    index, valid = left_padded_index(new, padding)
    record.check_padding(valid)
    num_cached = cached_valid.shape[1]
    return KeptColumns(torch.cat([cached_index, index], 1), torch.cat([cached_valid, valid], 1), num_cached)
