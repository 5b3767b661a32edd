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
from .lvlm_adapters import LVLMAdapter
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
            name: replace(encoded, rows=merged[self.visual_ids == adapter.token_ids[name]].to(encoded.rows))
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
            ordered[self.visual_ids == adapter.token_ids[modality]] = one.to(ordered)
        return ordered


@dataclass
class PrunedBatch:
    """What goes to the base model.

    Args:
        inputs: keyword arguments of the base model's `forward` or `generate`, on its device; all else is on the CPU.
        input_ids, attention_mask (`int64 [B, P]`): two of them.
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
) -> PrunedBatch:
    """Removes the visual tokens that `keep_mask [V]` drops from everything that runs along the sequence.

    Args:
        contiguous: number positions anew instead of keeping the original ones.
        same_length: give all samples the same number of placeholders, the missing ones in the padding, where nothing
            attends to them. Needed to repeat a tensor of features for beams.
        min_padding: at least so many padding columns. One is enough to keep `generate` from dropping the mask, without
            which gapped positions would be read as several packed prompts.
    """
    ids, visual, keep_mask = batch.input_ids, batch.visual, keep_mask.cpu()
    keep_masks = list(keep_mask.split(batch.num_visual.tolist()))
    keep, counts, extra = {}, {}, {}
    chosen = keep_mask & batch.new
    if batch.features is not None:
        for modality, encoded in batch.features.modalities.items():
            of_modality = batch.visual_ids == adapter.token_ids[modality]
            keep[modality] = chosen[of_modality]
            counts[modality] = torch.bincount(batch.sample_of[of_modality & chosen], minlength=len(ids))
            if same_length and encoded.container == "tensor":
                extra[modality] = counts[modality].max() - counts[modality]
    padding = torch.zeros(len(ids), dtype=torch.long, device="cpu")
    for missing in extra.values():
        padding = padding + missing
    padding = padding.clamp(min=min_padding)

    kept = kept_columns(batch.attention_mask, visual, keep_mask)
    if batch.record is None:
        past = 0
        index, valid = left_padded_index(kept, padding)
    else:
        # Flash Attention gets no mask of ones, and reads gaps in the positions of one sample as packed prompts; none
        # are shown to it where an axis of its own counts text.
        gaps = not contiguous and not adapter.has_text_axis and len(ids) == 1 and bool((batch.new & ~keep_mask).any())
        needs_mask = gaps and is_flash_attention_requested(adapter.config.get_text_config())
        index, valid, past = align_with_cache(batch, kept, padding=int(needs_mask))

    inputs = dict(batch.inputs)
    full_positions = inputs.pop("position_ids", None)
    if full_positions is not None:
        full_positions = adapter.complete_positions(full_positions.cpu(), batch.attention_mask)
    if batch.record is not None and not batch.new.any() and full_positions is None:
        start = next_position(batch.record.positions, valid[:, :past])
        steps = valid[:, past:].long().cumsum(1) - 1
        positions = torch.cat([batch.record.positions, start[:, None] + steps], 1)
        positions = adapter.spread_positions(positions, valid)
    elif contiguous:
        positions = adapter.spread_positions(count_positions(valid), valid)
    else:
        if full_positions is None:
            geometry = {} if batch.features is None else batch.features.geometry
            full_positions = adapter.position_ids(ids, batch.attention_mask, {**geometry, **batch.inputs})
        positions = adapter.renumber_text_axis(gather_columns(full_positions.cpu(), index, valid), valid)

    for name in adapter.consumed_names():
        inputs.pop(name, None)
    for name, value in inputs.items():
        if torch.is_tensor(value) and value.shape == ids.shape:
            padding_value = -100 if name == "labels" else 0
            inputs[name] = gather_columns(value, index, valid, padding_value).to(batch.device)
    pruned_ids = gather_columns(ids, index, valid, pad_token_id)
    column = torch.arange(index.shape[1], device="cpu")
    start = torch.zeros_like(padding)[:, None]
    for modality, missing in extra.items():
        end = start + missing[:, None]
        pruned_ids[(column >= start) & (column < end)] = adapter.token_ids[modality]
        start = end
    if past:
        # in the cached columns nothing is looked up; a placeholder there would only be counted
        cached = pruned_ids[:, :past]
        cached[adapter.find_visual(cached)] = pad_token_id

    attention_mask = valid.long()
    inputs["input_ids"] = pruned_ids.to(batch.device)
    inputs["attention_mask"] = attention_mask.to(batch.device)
    inputs["position_ids"] = positions.to(batch.device)
    if batch.features is not None and any(mask.any() for mask in keep.values()):
        inputs["mm_encoder_outputs"] = adapter.mm_encoder_outputs(batch.features, keep, counts, same_length)
    held = adapter.largest_positions(positions)
    if batch.record is not None:
        held = torch.cat([batch.record.positions, held[:, past:]], 1)
    decided = gather_columns(visual.long().cumsum(1), index, valid).cummax(1).values
    record = CachedPrompt(gather_columns(ids, index, valid), attention_mask, held, decided, keep_masks)
    return PrunedBatch(inputs, pruned_ids, attention_mask, index.masked_fill(~valid, -1), record)


def align_with_cache(batch: PromptBatch, kept: Tensor, padding: int) -> tuple[Tensor, Tensor, int]:
    """Index of a pruned batch whose first columns are those of the cache.

    The cached tokens of each sample stay in their columns; what is new is left-padded behind them, so that samples may
    go on with texts of different length.

    Args:
        padding: at least so many columns of padding.

    Returns:
        `index [B, C + S]`, `valid [B, C + S]` and the number C of cached columns.

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
    return torch.cat([cached_index, index], 1), torch.cat([cached_valid, valid], 1), cached_valid.shape[1]
