"""What a call returns: the plan of `prune`, and the output of `forward`."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .cached_prompt import CACHE_NAME
from .token_layout import TokenLayout


@dataclass
class PrunePlan:
    """Which visual tokens stay. V counts all visual tokens of the batch in placeholder order, sample by sample.

    Args:
        keep_mask (`bool [V]`): True where the token is kept.
        scores (`float [V]`): what the choice followed, higher is kept; its scale is the pruner's own.
        num_kept (`int64 [B]`): kept tokens of each sample.
        num_visual (`int64 [B]`): visual tokens of each sample.
        layout ([`TokenLayout`]): where each token lies in its image.
    """

    keep_mask: Tensor
    scores: Tensor
    num_kept: Tensor
    num_visual: Tensor
    layout: TokenLayout

    def to(self, device: torch.device) -> "PrunePlan":
        """The same plan, all of it on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **moved, layout=self.layout.to(device))


@dataclass
class TPRLOutput(ModelOutput):
    """
    Output of [`TPRLForConditionalGeneration`], in the L columns of the caller's prompt; with `compact=True` in the P
    columns of the pruned, left-padded batch.

    A pruned column has the logits and hidden states of the last kept column before it, and gets no attention. Columns
    before the first kept one are 0.

    Args:
        loss (`[]`, *optional*): language-modelling loss over the labels, when these were passed.
        logits (`[B, L, vocab]`): `logits[:, i]` predict the next kept token behind column i.
        past_key_values (`Cache`, *optional*): filled with the kept tokens only. As in the base model's own outputs,
            the field is called `cache` since transformers 5.24, where `past_key_values` still reads it.
        hidden_states, attentions (tuples, *optional*): of the base model, `[B, L, D]` and `[B, heads, L, L]` each.
        keep_mask (`bool [V]`): which visual tokens were kept, in placeholder order.
        num_kept (`int64 [B]`): how many of each sample.
        columns (`int64 [B, P]`): column of the original prompt that each pruned column comes from, -1 for padding.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    if CACHE_NAME == "cache":
        cache: Any = None
    else:
        past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    keep_mask: Tensor | None = None
    num_kept: Tensor | None = None
    columns: Tensor | None = None


def tell_kept(
    output: ModelOutput, keep_mask: Tensor, num_kept: Tensor, num_visual: Tensor, device: torch.device
) -> None:
    """Puts what was kept of a batch, as in [`PrunePlan`], into the dict of its answers."""
    output["keep_mask"], output["num_kept"] = keep_mask.to(device), num_kept.to(device)
    output["num_visual"] = num_visual.to(device)
