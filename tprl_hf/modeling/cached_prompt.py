"""What a key-value cache holds: the pruned prompt that filled it.

A conversation that goes on from a cache passes its full prompt again. Which of its visual tokens are in the cache, at
which positions, only this record knows; it lies on the cache object, so that a copy of the cache has it too.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

# What transformers calls a cache, among arguments and in outputs: 5.24 renamed `past_key_values` to `cache`.
CACHE_NAME = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("past_key_values", "cache"))
_ATTRIBUTE = "tprl_cached_prompt"


def cache_argument(past_key_values: Cache | None, cache: Cache | None) -> dict[str, Cache]:
    """The cache that a call passes by either of its names, as an argument for the base model; `{}` for none.

    Raises:
        `ValueError`: when it passes both.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("`past_key_values` and `cache` are two names of one argument: pass one of them.")
    given = cache if past_key_values is None else past_key_values
    return {} if given is None else {CACHE_NAME: given}


@dataclass
class CachedPrompt:
    """
    All of it on the CPU.

    Args:
        input_ids (`int64 [B, C]`): ids of the cached columns.
        attention_mask (`int64 [B, C]`): 0 in their padding.
        keep_masks: for each sample, which of its visual tokens so far were kept, `bool [N]`.
        next_position (`int64 [B]`): position of the token after the last cached one.
        carries_state (`bool`): whether some layers read all columns in their order, padding too.
    """

    input_ids: Tensor
    attention_mask: Tensor
    keep_masks: list[Tensor]
    next_position: Tensor
    carries_state: bool = False

    def attach(self, cache: Cache) -> None:
        self.carries_state = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
        setattr(cache, _ATTRIBUTE, self)

    @staticmethod
    def is_on(cache: Cache) -> bool:
        """Whether a call of this model filled `cache`."""
        return hasattr(cache, _ATTRIBUTE)

    @staticmethod
    def of(cache: Cache | None) -> "CachedPrompt | None":
        """The record of `cache`; `None` for an empty cache.

        Raises:
            `ValueError`: for a filled cache without a record, whose columns cannot be told.
        """
        if cache is None or int(cache.get_seq_length()) == 0:
            return None
        record = getattr(cache, _ATTRIBUTE, None)
        if record is None:
            raise ValueError(
                f"`past_key_values` holds {int(cache.get_seq_length())} columns that this model did not prune, so "
                "that their positions are unknown. Pass a cache returned by this model, or prune=False."
            )
        return record

    def extend(self, input_ids: Tensor, attention_mask: Tensor, next_position: Tensor) -> "CachedPrompt":
        """The record after columns of text were added behind it."""
        return CachedPrompt(
            torch.cat([self.input_ids, input_ids], 1),
            torch.cat([self.attention_mask, attention_mask], 1),
            self.keep_masks,
            next_position,
        )

    def check_padding(self, valid: Tensor) -> None:
        """Raises `ValueError` for padding among the new columns `valid [B, S]` that would change a layer's state."""
        if self.carries_state and not valid.all():
            raise ValueError(
                "Some layers of this LLM carry a state, which padding behind a cache would change: give all samples "
                "new texts of one length, or pass the whole conversation without `past_key_values`. With Flash "
                "Attention new images need padding, too; attn_implementation='sdpa' does without."
            )

    def check_prefix(self, sample: int, tokens: Tensor) -> None:
        """Raises `ValueError` unless the pruned prompt `tokens [n]` begins with the sample's cached tokens."""
        cached = self.input_ids[sample][self.attention_mask[sample].bool()]
        if len(tokens) <= len(cached):
            raise ValueError(
                f"Sample {sample} has {len(tokens)} tokens after pruning and the cache already {len(cached)}: with "
                "`past_key_values`, pass the whole conversation and at least one new token."
            )
        differs = (tokens[: len(cached)] != cached).nonzero()
        if len(differs):
            column = int(differs[0])
            raise ValueError(
                f"The prompt of sample {sample} differs from the cached conversation at pruned token {column}: "
                f"{int(tokens[column])} instead of {int(cached[column])}. Begin the prompt with the sequences that "
                "`generate` returned."
            )
