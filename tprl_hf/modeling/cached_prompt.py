"""What a key-value cache holds, column by column, and how it is read when a conversation continues from it.

A conversation passes its full prompt again. Which of its visual tokens are in the cache, at which positions, only this
record knows. It lies on the cache object, so that a copy of the cache has it too, and is laid over what the cache has
by then: fewer columns after `crop`, other rows after they were repeated, selected or reordered.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache_fingerprint import CacheFingerprint
from .values import wrong

# What transformers calls a cache, among arguments and in outputs: 5.24 renamed `past_key_values` to `cache`.
CACHE_NAME = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("past_key_values", "cache"))
UNKNOWN = -1  # id of a column whose token was not noted
_ATTRIBUTE = "tprl_cached_prompt"
ADVICE = "Pass a cache returned by this model, the whole conversation without a cache, or prune=False."


def cache_argument(past_key_values: Cache | None, cache: Cache | None) -> dict[str, Cache]:
    """The cache that a call passes by either of its names, as an argument for the base model; `{}` for none.

    Raises:
        `ValueError`: when it passes both, or something else.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("`past_key_values` and `cache` are two names of one argument: pass one of them.")
    given = cache if past_key_values is None else past_key_values
    if given is not None and not isinstance(given, Cache):
        name = "cache" if past_key_values is None else "past_key_values"
        raise wrong(name, given, "a Cache of transformers, such as an earlier call returned")
    return {} if given is None else {CACHE_NAME: given}


def is_filled(cache: Cache | None) -> bool:
    return cache is not None and int(cache.get_seq_length()) > 0


@dataclass
class CachedPrompt:
    """
    All of it on the CPU.

    Args:
        input_ids (`int64 [B, C]`): ids of the cached columns, -1 where they are not known.
        attention_mask (`int64 [B, C]`): 0 in their padding.
        positions (`int64 [B, C]`): position of each column, the largest of its axes.
        num_decided (`int64 [B, C]`): visual tokens of the conversation up to each column, dropped ones too.
        keep_masks: for each sample, which of its visual tokens so far were kept, `bool [N]`.
        columns (`int64 [B, C]`): column of the conversation, as the caller passed it, that each one comes from, -1 for
            padding of ours.
        num_columns: number of columns of the conversation.
        is_filler (`bool [B, C]`, *optional*): what `generate` wrote behind answers that ended before others.
        carries_state (`bool`): whether some layers read all columns in their order, padding too.
        fingerprint: what the cache looked like.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    num_decided: Tensor
    keep_masks: list[Tensor]
    columns: Tensor
    num_columns: int
    is_filler: Tensor | None = None
    carries_state: bool = False
    fingerprint: CacheFingerprint | None = None

    @classmethod
    def unpruned(cls, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, visual: Tensor) -> "CachedPrompt":
        """The record of a prompt that was read whole. `visual [B, C]` are its placeholders."""
        masks = [torch.ones(count, dtype=torch.bool, device="cpu") for count in visual.sum(1).tolist()]
        columns = torch.arange(input_ids.shape[1], device="cpu").expand_as(input_ids)
        num_columns = input_ids.shape[1]
        return cls(input_ids, attention_mask.long(), positions, visual.cumsum(1), masks, columns, num_columns)

    # ---- on a cache ----

    def attach(self, cache: Cache) -> None:
        self.note_layers(cache)
        self.fingerprint = CacheFingerprint(cache)
        setattr(cache, _ATTRIBUTE, self)

    def note_layers(self, cache: Cache) -> None:
        self.carries_state = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)

    @staticmethod
    def is_on(cache: Cache | None) -> bool:
        """Whether a call of this model filled `cache`."""
        return is_filled(cache) and hasattr(cache, _ATTRIBUTE)

    @staticmethod
    def of(cache: Cache) -> "CachedPrompt":
        """The record of a filled `cache`, with the rows and columns that it has by now.

        Raises:
            `ValueError`: where nothing tells what the columns are: no call of this model filled the cache, or another
                call wrote into it afterwards.
        """
        held = int(cache.get_seq_length())
        record = getattr(cache, _ATTRIBUTE, None)
        if record is None:
            raise ValueError(
                f"`past_key_values` holds {held} columns that this model did not prune, so that their positions are "
                f"unknown. {ADVICE}"
            )
        rows = record.fingerprint.find_rows(cache, len(record.input_ids))
        known = record.input_ids.shape[1]
        if rows is None or held > known:
            what = "other columns than" if rows is None else f"{held} columns, {held - known} more than"
            raise ValueError(
                f"`past_key_values` holds {what} this model's last call left in it, so that their tokens are unknown. "
                f"{ADVICE}"
            )
        return record.take(rows).cut(held)

    def take(self, rows: list[int]) -> "CachedPrompt":
        """The same columns of other rows."""
        if rows == list(range(len(self.input_ids))):
            return self
        tensors: dict[str, Any] = {n: v[rows] for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors, keep_masks=[self.keep_masks[row] for row in rows])

    def cut(self, length: int) -> "CachedPrompt":
        """The first `length` columns. Visual tokens behind them are undecided again."""
        if length == self.input_ids.shape[1]:
            return self
        tensors: dict[str, Any] = {n: v[:, :length] for n, v in vars(self).items() if isinstance(v, Tensor)}
        decided = self.num_decided[:, length - 1].tolist() if length else [0] * len(self.input_ids)
        masks = [mask[:count] for mask, count in zip(self.keep_masks, decided, strict=True)]
        num_columns = int(tensors["columns"].max()) + 1 if length else 0
        return replace(self, **tensors, keep_masks=masks, num_columns=num_columns)

    def for_prompts(self, num_prompts: int, copies: int) -> "CachedPrompt":
        """One row for each of `num_prompts` prompts, of which `generate` makes `copies`.

        Raises:
            `ValueError`: where the rows do not belong to so many prompts.
        """
        num_rows = len(self.input_ids)
        if num_rows == num_prompts:
            return self
        if num_rows != num_prompts * copies:
            made = f", of which `generate` makes {copies} copies each" if copies > 1 else ""
            raise ValueError(
                f"`past_key_values` has {num_rows} rows, but {num_prompts} prompts were passed{made}: pass one prompt "
                "for each row of the cache."
            )
        first = self.take(list(range(0, num_rows, copies)))
        for row in range(num_rows):
            here, there = self.take([row]), first.take([row // copies])
            if not (
                torch.equal(here.input_ids, there.input_ids)
                and torch.equal(here.attention_mask, there.attention_mask)
                and torch.equal(here.keep_masks[0], there.keep_masks[0])
            ):
                raise ValueError(
                    f"Row {row} of `past_key_values` is not the same as row {row // copies * copies}, but one prompt "
                    "was passed for both: pass one prompt for each row of the cache."
                )
        return first

    # ---- adding to it ----

    @property
    def next_position(self) -> Tensor:
        """Position of the token after the last attended column, `int64 [B]`."""
        return next_position(self.positions, self.attention_mask)

    def extend(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor | None = None) -> "CachedPrompt":
        """The record after columns of text were added behind it, at the next positions or at `positions [B, S]`."""
        if positions is None:
            positions = self.next_position[:, None] + attention_mask.long().cumsum(1) - 1
        num_new = input_ids.shape[1]
        decided = torch.tensor([[len(mask)] for mask in self.keep_masks], device="cpu").expand(-1, num_new)
        columns = torch.arange(self.num_columns, self.num_columns + num_new, device="cpu").expand_as(decided)
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, input_ids], 1),
            attention_mask=torch.cat([self.attention_mask, attention_mask.long()], 1),
            positions=torch.cat([self.positions, positions], 1),
            num_decided=torch.cat([self.num_decided, decided], 1),
            columns=torch.cat([self.columns, columns], 1),
            num_columns=self.num_columns + num_new,
            is_filler=None,
        )

    def answered(
        self, sequences: Tensor, copies: int, held: int, pad_token_id: int | None, num_beams: int = 1
    ) -> "CachedPrompt":
        """The record after `generate`.

        Args:
            sequences (`int64 [R, C + G]`): what it returned, R being the prompts or `copies` of each.
            copies: rows of the cache for each prompt.
            held: columns that the cache holds by now.
            pad_token_id: what it writes behind answers that have ended.
            num_beams: of how many beams the rows are; of more than one nobody tells which sequence a row holds.
        """
        length = self.input_ids.shape[1]
        rows = [row for row in range(len(self.input_ids)) for _ in range(copies)]
        record = self.take(rows)
        if held <= length:
            return record.cut(held)
        are_known = num_beams == 1 and len(sequences) == len(rows)
        if are_known:
            answers = sequences[:, length:].cpu()
        else:
            answers = torch.full((len(rows), held - length), UNKNOWN, device="cpu")
        filler = torch.zeros_like(answers, dtype=torch.bool)
        if pad_token_id is not None and are_known:
            filler = (answers == pad_token_id).flip(1).cumprod(1).flip(1).bool()
        new = answers[:, : held - length]
        record = record.extend(new, torch.ones_like(new))
        before = torch.zeros_like(record.input_ids[:, :length], dtype=torch.bool)
        return replace(record, is_filler=torch.cat([before, filler[:, : held - length]], 1))

    # ---- reading a prompt by it ----

    def shown_by(self, attention_mask: Tensor, num_new: int) -> Tensor:
        """Which cached columns are attended, `int64 [B, C]`, by a mask that ends with `num_new` columns behind them.

        Before these it has the columns of the conversation or those of the cache. A mask of another width says nothing
        about them.
        """
        before = attention_mask[:, : attention_mask.shape[1] - num_new]
        if before.shape[1] == self.num_columns:
            return before.gather(1, self.columns.clamp(min=0)).masked_fill(self.columns < 0, 0)
        return before * self.attention_mask if before.shape == self.attention_mask.shape else self.attention_mask

    def check_padding(self, valid: Tensor) -> None:
        """Raises `ValueError` for padding among the new columns `valid [B, S]` that would change a layer's state."""
        if self.carries_state and not valid.all():
            raise ValueError(
                "Some layers of this LLM carry a state, which padding behind a cache would change: give all samples "
                "new texts of one length, or pass the whole conversation without `past_key_values`. With Flash "
                "Attention new images need padding, too; attn_implementation='sdpa' does without."
            )

    def attended_columns(self, sample: int, tokens: Tensor) -> Tensor:
        """Which columns of a sample its pruned prompt `tokens [n]` begins with, `bool [C]`.

        What was written behind an answer that had ended counts as far as the prompt has it, too.

        Raises:
            `ValueError`: where the prompt begins otherwise, or ends with what is cached.
        """
        attended = self.attention_mask[sample].bool()
        if self.is_filler is not None and self.is_filler[sample].any():
            filler = self.is_filler[sample]
            place = int((attended & ~filler).sum())
            behind = tokens[place : place + int(filler.sum())]
            agree = int((behind == self.input_ids[sample][filler][: len(behind)]).long().cumprod(0).sum())
            attended = attended & ~(filler & (filler.long().cumsum(0) > agree))
            self.check_padding(attended[filler])
        cached = self.input_ids[sample][attended]
        if len(cached) and bool((cached == UNKNOWN).any()):
            first = int((self.input_ids[sample] == UNKNOWN).nonzero()[0])
            raise ValueError(
                f"The cache's columns from {first} on were written by a beam search, whose tokens in a cache are not "
                f"known. Cut them off by `crop({first - len(attended)})`, or pass the conversation without a cache."
            )
        common = min(len(tokens), len(cached))
        differs = (tokens[:common] != cached[:common]).nonzero()
        if len(differs):
            column = int(differs[0])
            raise ValueError(
                f"The prompt of sample {sample} differs from the cached conversation at pruned token {column}: "
                f"{int(tokens[column])} instead of {int(cached[column])}. Begin the prompt with the sequences that "
                "`generate` returned."
            )
        if len(tokens) <= len(cached):
            raise ValueError(
                f"Sample {sample} has {len(tokens)} tokens after pruning and the cache already {len(cached)}: with "
                "`past_key_values`, pass the whole conversation and at least one new token."
            )
        return attended

    def check_images(self, sample: int, num_visual: Tensor, attended: Tensor) -> None:
        """Raises `ValueError` where dropped tokens differ: the prompt has `num_visual [n]` up to each cached token."""
        decided = self.num_decided[sample][attended]
        differs = (num_visual != decided).nonzero()
        if len(differs):
            column = int(differs[0])
            raise ValueError(
                f"The prompt of sample {sample} differs from the cached conversation at pruned token {column}: "
                f"{int(num_visual[column])} visual tokens up to there instead of {int(decided[column])}. Pass the "
                "conversation with the images that it began with."
            )


def next_position(positions: Tensor, attention_mask: Tensor) -> Tensor:
    """Position after the last attended column of `positions [B, C]`, 0 without one: `int64 [B]`."""
    column = torch.arange(positions.shape[1], device="cpu")
    last = torch.where(attention_mask.bool(), column, -1).amax(1)
    return torch.where(last < 0, 0, positions.gather(1, last.clamp(min=0)[:, None])[:, 0] + 1)
