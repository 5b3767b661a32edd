"""What a pruner gets to see of a batch, and what comes out of it."""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .configuration_tprl import TPRLConfig
from .keep_mask import Budget
from .lvlm_adapters import LVLMAdapter
from .pruned_batch import PromptBatch, merge_rows
from .pruned_inputs import gather_columns, left_padded_index, pad_rows
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


@dataclass
class TPRLOutput(ModelOutput):
    """
    Output of [`TPRLForConditionalGeneration`]. P columns of the pruned, left-padded batch.

    Args:
        loss (`[]`, *optional*): language-modelling loss over the labels, when these were passed.
        logits (`[B, P, vocab]`): `logits[:, -k:]` are those of the last k tokens of every sample.
        past_key_values (`Cache`, *optional*): filled with the kept tokens only.
        hidden_states, attentions (tuples, *optional*): of the base model, over P columns.
        keep_mask (`bool [V]`): which visual tokens were kept, in placeholder order.
        num_kept (`int64 [B]`): how many of each sample.
        columns (`int64 [B, P]`): column of the original prompt that each pruned column comes from, -1 for padding.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    keep_mask: Tensor | None = None
    num_kept: Tensor | None = None
    columns: Tensor | None = None


def call_settings(
    keep_ratio: float | None,
    num_keep: int | None,
    threshold: float | None,
    prune: bool | None,
    keep_mask: Tensor | None,
) -> dict[str, Any]:
    """What a call of `prune`, `forward` or `generate` says about pruning.

    Raises:
        `ValueError`: when it says several things.
    """
    call = {
        "keep_ratio": keep_ratio,
        "num_keep": num_keep,
        "threshold": threshold,
        "prune": prune,
        "keep_mask": keep_mask,
    }
    given = {name: value for name, value in call.items() if value is not None}
    if len(given) > 1:
        listed = ", ".join(f"{name}={'...' if torch.is_tensor(v) else v}" for name, v in given.items())
        raise ValueError(f"Pass only one of keep_ratio, num_keep, threshold, prune and keep_mask; got {listed}.")
    return call


def budget_of_call(
    call: dict[str, Any], own: Budget | None, pruner_was_chosen: bool, config: TPRLConfig
) -> Budget | None:
    """The budget that the call names, else the pruner's `own`, else the config's; `None` to prune nothing.

    Raises:
        `ValueError`: when pruning was asked for and nobody names a budget.
    """
    if call["prune"] is False or call["keep_mask"] is not None:
        return None
    asked = {name: call[name] for name in ("keep_ratio", "num_keep", "threshold")}
    default = {name: getattr(config, name) for name in asked}
    if any(value is not None for value in asked.values()):
        return Budget(**asked, min_keep=config.min_keep, max_keep=config.max_keep)
    if own is not None:
        return own
    if any(value is not None for value in default.values()):
        return Budget(**default, min_keep=config.min_keep, max_keep=config.max_keep)
    if call["prune"] or pruner_was_chosen:
        raise ValueError(
            "No budget: pass keep_ratio, num_keep or threshold in the call, to the pruner, or in the config."
        )
    return None


def layout_of(batch: PromptBatch, adapter: LVLMAdapter) -> TokenLayout:
    """Layout of all visual tokens in placeholder order; images and videos are counted in one row."""
    ids = batch.input_ids[batch.visual]
    merged = torch.zeros(7, len(ids), dtype=torch.long)
    merged[4:6] = 1
    num_images = 0
    for modality, encoded in (batch.features.modalities if batch.features else {}).items():
        layout = TokenLayout.from_blocks(encoded.blocks)
        stacked = layout.stacked()
        stacked[0] += num_images
        merged[:, (ids == adapter.token_ids[modality]).cpu()] = stacked
        num_images += sum(bool(blocks) for blocks in encoded.blocks)
    return TokenLayout.from_stacked(merged.to(ids.device))


def attention_of(batch: PromptBatch, adapter: LVLMAdapter) -> Tensor:
    """Attention received in the tower, float `[V]` in placeholder order.

    Raises:
        `ValueError`: when the features were encoded without it.
    """
    assert batch.features is not None
    ids = batch.input_ids[batch.visual]
    attention = torch.zeros(len(ids), device=ids.device)
    for modality, encoded in batch.features.modalities.items():
        if encoded.attention is None:
            raise ValueError(
                "This pruner needs the vision tower's attention, but the visual_features were encoded without it: "
                "call encode_images inside `with model.using(pruner)`."
            )
        attention[ids == adapter.token_ids[modality]] = encoded.attention.to(attention)
    return attention


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
        [`PruningInputs`], and which of the V visual tokens these are, `bool [V]`.
    """
    assert batch.features is not None
    new = ~batch.cached_visual()
    counts = torch.bincount(batch.visual.nonzero()[new][:, 0], minlength=len(batch.input_ids))
    rows = merge_rows(batch.features, batch.input_ids, adapter.token_ids)[new]
    tokens, valid = pad_rows(rows, counts)
    padded = {name: pad_rows(value[new].to(rows.device), counts)[0] for name, value in vars(layout).items()}
    padded["height"], padded["width"] = padded["height"].clamp(min=1), padded["width"].clamp(min=1)
    index, query_valid = left_padded_index(query_mask)
    query = adapter.base.get_input_embeddings()(gather_columns(batch.input_ids, index, query_valid))
    keys = [
        zlib.crc32(repr((ids[mask.bool()].tolist(), count)).encode())
        for ids, mask, count in zip(batch.input_ids.cpu(), batch.attention_mask.cpu(), counts.tolist(), strict=True)
    ]
    attention = pad_rows(attention_of(batch, adapter)[new], counts)[0] if with_attention else None
    inputs = PruningInputs(
        tokens=tokens,
        valid=valid,
        layout=TokenLayout(**padded),
        query=query.to(tokens.device),
        query_mask=query_valid.to(tokens.device),
        sample_keys=keys,
        attention=attention,
    )
    return inputs, new
