"""How a conversation continues from a cache: reading what it holds before a call, noting it afterwards."""

from typing import Any

import torch
from torch import Tensor

from .cache_fingerprint import NUM_VALUES, readable_keys
from .cached_prompt import ADVICE, CACHE_NAME, CachedPrompt
from .columns import count_positions, gather_columns, left_padded_index
from .planning_tprl import TPRLPlanningModel


class TPRLConversationModel(TPRLPlanningModel):
    """The part of [`TPRLForConditionalGeneration`] that knows what caches hold."""

    # ---- before a call ----

    def _read_cache(
        self, cache: Any, input_ids: Tensor | None, attention_mask: Tensor | None, inputs: dict[str, Any], copies: int
    ) -> CachedPrompt:
        """What a filled cache holds of the conversation `input_ids [B, L]`, of which `generate` makes `copies`.

        Raises:
            `ValueError`: where that cannot be told.
        """
        if input_ids is None:
            raise ValueError("With a filled cache pass `input_ids` of the whole conversation.")
        if CachedPrompt.is_on(cache):
            return CachedPrompt.of(cache).for_prompts(len(input_ids), copies)
        held = int(cache.get_seq_length())
        prompt = self._unpruned_prompt(input_ids, attention_mask, inputs) if held < input_ids.shape[1] else None
        if prompt is None or not self._was_read_whole(cache, prompt.cut(held)):
            raise ValueError(
                f"`past_key_values` holds {held} columns that this model did not prune and that are not the first of "
                f"this conversation, so that their positions are unknown. {ADVICE}"
            )
        record = prompt.cut(held)
        record.note_layers(cache)
        return record

    def _was_read_whole(self, cache: Any, record: CachedPrompt) -> bool:
        """Whether a cache that is not ours holds what `record` says, by the keys that its words get by themselves.

        In the first layer they depend on nothing but a token and its position.
        """
        found = readable_keys(cache)
        visual = self.adapter.find_visual(record.input_ids)
        if found is None or found.start or found.layer or visual[:, -1].any():
            return False
        keys = found.keys[:, 0, :, :NUM_VALUES]
        index, valid = left_padded_index(record.attention_mask.bool() & ~visual)
        if keys.shape[:2] != record.input_ids.shape or not valid.any():
            return False
        ids, positions = gather_columns(record.input_ids, index, valid), gather_columns(record.positions, index, valid)
        device = keys.device
        positions = self.adapter.spread_positions(positions, valid) + self.adapter.forward_position_offset
        words = self.lvlm(
            input_ids=ids.to(device),
            attention_mask=valid.long().to(device),
            position_ids=positions.to(device),
            use_cache=True,
        )
        alone = None if words.get(CACHE_NAME) is None else readable_keys(words[CACHE_NAME])
        if alone is None or alone.start:
            return False
        rows = torch.arange(len(ids), device=device)[:, None]
        expected = alone.keys[:, 0, :, :NUM_VALUES][valid.to(device)]
        differs = (keys[rows, index.to(device)][valid.to(device)] - expected).abs().max()
        return bool(differs <= torch.finfo(keys.dtype).eps ** 0.5 * expected.abs().max())

    # ---- after a call ----

    def _note(self, cache: Any, record: CachedPrompt) -> None:
        """Notes on `cache`, if there is one, what it holds."""
        if cache is not None:
            record.attach(cache)

    def _note_answer(
        self, cache: Any, record: CachedPrompt, output: Any, copies: int, filler: int | None, num_beams: int
    ) -> None:
        """The same after `generate` has read `record` and written `filler` behind answers that had ended.

        `cache` is the one that it was given.
        """
        is_dict = not torch.is_tensor(output)
        cache = output.get(CACHE_NAME, cache) if is_dict else cache
        if cache is not None:
            held = int(cache.get_seq_length())
            record = record.answered(output.sequences if is_dict else output, copies, held, filler, num_beams)
            if record.input_ids.shape[1] == held:
                self._note(cache, record)

    def _note_unpruned(
        self, cache: Any, input_ids: Tensor | None, attention_mask: Tensor | None, inputs: dict[str, Any]
    ) -> None:
        """Notes on a cache, if there is one, that a forward of the base model has read a prompt as it is."""
        positions = None if attention_mask is None else self.adapter.forward_positions(attention_mask)
        if positions is not None and inputs.get("position_ids") is None:
            inputs = {**inputs, "position_ids": positions}
        elif inputs.get("position_ids") is not None:  # given ones have the offset of a direct forward
            offset = self.adapter.forward_position_offset
            inputs = {**inputs, "position_ids": inputs["position_ids"] - offset}
        prompt = self._unpruned_prompt(input_ids, attention_mask, inputs) if cache is not None else None
        if prompt is not None and int(cache.get_seq_length()) == prompt.input_ids.shape[1]:
            prompt.attach(cache)

    def _note_unpruned_answer(
        self,
        cache: Any,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs: dict[str, Any],
        output: Any,
        copies: int,
        filler: int | None,
        num_beams: int,
    ) -> None:
        cache = cache if torch.is_tensor(output) else output.get(CACHE_NAME, cache)
        if cache is None:
            return
        prompt = self._unpruned_prompt(input_ids, attention_mask, inputs)
        if prompt is not None:
            self._note_answer(cache, prompt, output, copies, filler, num_beams)

    def _unpruned_prompt(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs: dict[str, Any]
    ) -> CachedPrompt | None:
        """The record of a prompt that is read as it is; `None` where its columns or positions cannot be told."""
        if input_ids is None or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            return None
        ids = input_ids.cpu().clone()
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu().long()
        visual = self.adapter.find_visual(ids)
        positions = inputs.get("position_ids")
        if positions is not None:
            positions = positions.cpu().expand(*positions.shape[:-2], *ids.shape)
        elif visual.any():
            if not self.adapter.knows_positions(inputs):
                return None
            positions = self.adapter.position_ids(ids, mask, inputs)
        else:
            positions = self.adapter.spread_positions(count_positions(mask), mask.bool())
        return CachedPrompt.unpruned(ids, mask, self.adapter.largest_positions(positions), visual)
