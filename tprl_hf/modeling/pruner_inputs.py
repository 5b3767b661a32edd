"""What a pruner gets to see of a batch."""

import zlib

import torch
from torch import Tensor

from .columns import gather_columns, left_padded_index, pad_rows
from .lvlm_adapters import LVLMAdapter
from .pruned_batch import PromptBatch
from .token_layout import TokenLayout
from .token_pruner import PruningInputs


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
    """What a pruner may look at, for the visual tokens that are shown and that no cache has decided yet.

    Args:
        query_mask (`bool [B, L]`): which tokens are the question.

    Returns:
        [`PruningInputs`], and which of the V visual tokens these are, `bool [V]` on the CPU.
    """
    new = batch.new & batch.shown
    counts = torch.bincount(batch.sample_of[new], minlength=len(batch.input_ids))
    embeddings = adapter.base.get_input_embeddings()
    index, query_valid = left_padded_index(query_mask)
    query = embeddings(gather_columns(batch.input_ids, index, query_valid).to(batch.device))
    device = query.device  # the policy is there too; the projector may be elsewhere
    if batch.features is not None and batch.features.modalities:
        rows = batch.in_order({name: encoded.rows for name, encoded in batch.features.modalities.items()}, adapter)
        attention = attention_of(batch, adapter) if with_attention else None
    else:  # no prompt has a picture
        weight = embeddings.weight
        rows = torch.empty(0, weight.shape[1], dtype=weight.dtype, device=device)
        attention = rows.new_empty(0) if with_attention else None
    if not new.all():
        rows, layout = rows[new], layout[new]
        attention = None if attention is None else attention[new]
    tokens, valid = pad_rows(rows.to(device), counts)
    padded = pad_rows(layout.stacked().T, counts)[0].permute(2, 0, 1)
    padded[4:6].clamp_(min=1)  # heights and widths, of padding too
    keys = [
        zlib.crc32(repr((ids[mask.bool()].tolist(), count)).encode())
        for ids, mask, count in zip(batch.input_ids, batch.attention_mask, counts.tolist(), strict=True)
    ]
    layout = TokenLayout.from_stacked(padded.to(device))
    inputs = PruningInputs(
        tokens=tokens,
        valid=valid.to(device),
        num_visual=counts,
        layout=layout,
        protected=layout.protected if padded[6].any() else None,
        query=query,
        query_valid=query_valid.to(device),
        sample_keys=keys,
        attention=None if attention is None else pad_rows(attention.to(device), counts)[0],
        lvlm=adapter.base,
    )
    return inputs, new
