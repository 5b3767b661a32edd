"""What a pruner gets to see of a batch, and what comes out of it."""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .cached_prompt import CACHE_NAME
from .columns import gather_columns, left_padded_index, pad_rows
from .configuration_tprl import TPRLConfig
from .keep_mask import Budget
from .lvlm_adapters import LVLMAdapter
from .pruned_batch import PromptBatch
from .token_layout import TokenLayout
from .token_pruner import PruningInputs


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


def refuse_several(given: dict[str, Any]) -> None:
    """Raises `ValueError` when a call says several things about pruning."""
    if len(given) > 1:
        listed = ", ".join(f"{name}={'...' if torch.is_tensor(v) else v}" for name, v in given.items())
        raise ValueError(f"Pass only one of keep_ratio, num_keep, threshold, prune and keep_mask; got {listed}.")


def resolve_choice(
    keep_ratio: float | None,
    num_keep: int | None,
    threshold: float | None,
    prune: bool | None,
    keep_mask: Tensor | None,
    pruner_budget: Budget | None,
    pruner_was_chosen: bool,
    config: TPRLConfig,
) -> Budget | Tensor | None:
    """What a call of `prune`, `forward` or `generate` does with the visual tokens.

    Returns:
        A [`Budget`] for the pruner: that of the call, else the pruner's own, else the config's. Or the user's
        `keep_mask`. Or `None`: all tokens stay, and nothing is pruned.

    Raises:
        `ValueError`: when the call says several things, or pruning was asked for and nobody names a budget.
    """
    budget: dict[str, Any] = {"keep_ratio": keep_ratio, "num_keep": num_keep, "threshold": threshold}
    given = {n: v for n, v in {**budget, "prune": prune, "keep_mask": keep_mask}.items() if v is not None}
    refuse_several(given)
    if keep_mask is not None or prune is False:
        return keep_mask
    bounds: dict[str, Any] = {"min_keep": config.min_keep, "max_keep": config.max_keep}
    if given and prune is None:
        return Budget(**budget, **bounds)
    if pruner_budget is not None:
        return pruner_budget
    default = {name: getattr(config, name) for name in budget}
    if any(value is not None for value in default.values()):
        return Budget(**default, **bounds)
    if prune or pruner_was_chosen:
        raise ValueError(
            "No budget: pass keep_ratio, num_keep or threshold in the call, to the pruner, or in the config."
        )
    return None


def layout_of(batch: PromptBatch, adapter: LVLMAdapter) -> TokenLayout:
    """Layout of all visual tokens in placeholder order, on the CPU; images and videos are counted in one row."""
    modalities = batch.features.modalities if batch.features else {}
    if not modalities:
        nowhere = torch.tensor([0, 0, 0, 0, 1, 1, 0], device="cpu")
        return TokenLayout.from_stacked(nowhere[:, None].repeat(1, len(batch.visual_ids)))
    layouts = {modality: TokenLayout.from_blocks(encoded.blocks) for modality, encoded in modalities.items()}
    if len(layouts) == 1:
        return next(iter(layouts.values()))
    num_images = 0
    for modality, layout in layouts.items():
        layout.image += num_images
        num_images += sum(bool(blocks) for blocks in modalities[modality].blocks)
    stacked = {modality: layout.stacked().T for modality, layout in layouts.items()}
    return TokenLayout.from_stacked(batch.in_order(stacked, adapter).T)


def attention_of(batch: PromptBatch, adapter: LVLMAdapter) -> Tensor:
    """Attention received in the tower, float `[V]` in placeholder order.

    Raises:
        `ValueError`: when the features were encoded without it.
    """
    assert batch.features is not None
    attention: dict[str, Tensor] = {}
    for modality, encoded in batch.features.modalities.items():
        if encoded.attention is None:
            raise ValueError(
                "This pruner needs the vision tower's attention, but the visual_features were encoded without it: "
                "call encode_images inside `with model.using(pruner)`."
            )
        attention[modality] = encoded.attention.float()
    return batch.in_order(attention, adapter)


def pruning_inputs(
    batch: PromptBatch,
    adapter: LVLMAdapter,
    layout: TokenLayout,
    query_mask: Tensor,
    with_attention: bool,
) -> tuple[PruningInputs, Tensor]:
    """What a pruner may look at, for the visual tokens that no cache has decided yet.

    Args:
        query_mask (`bool [B, L]`): which tokens are the question.

    Returns:
        [`PruningInputs`], and which of the V visual tokens these are, `bool [V]` on the CPU.
    """
    assert batch.features is not None
    new = batch.new
    counts = torch.bincount(batch.sample_of[new], minlength=len(batch.input_ids))
    rows = batch.in_order({name: encoded.rows for name, encoded in batch.features.modalities.items()}, adapter)
    attention = attention_of(batch, adapter) if with_attention else None
    if not new.all():
        rows, layout = rows[new], layout[new]
        attention = None if attention is None else attention[new]
    tokens, valid = pad_rows(rows, counts)
    padded = pad_rows(layout.stacked().T, counts)[0].permute(2, 0, 1)
    padded[4:6].clamp_(min=1)  # heights and widths, of padding too
    index, query_valid = left_padded_index(query_mask)
    query_ids = gather_columns(batch.input_ids, index, query_valid).to(batch.device)
    keys = [
        zlib.crc32(repr((ids[mask.bool()].tolist(), count)).encode())
        for ids, mask, count in zip(batch.input_ids, batch.attention_mask, counts.tolist(), strict=True)
    ]
    inputs = PruningInputs(
        tokens=tokens,
        valid=valid.to(tokens.device),
        layout=TokenLayout.from_stacked(padded.to(tokens.device)),
        query=adapter.base.get_input_embeddings()(query_ids).to(tokens.device),
        query_mask=query_valid.to(tokens.device),
        sample_keys=keys,
        attention=None if attention is None else pad_rows(attention, counts)[0],
        lvlm=adapter.base,
    )
    inputs.num_visual = counts
    inputs.protected = inputs.layout.protected if padded[6].any() else None
    return inputs, new
