"""How much attention each visual token received in the vision tower, for pruners that read it.

Towers split their images into tiles, windows or sequences and seldom return their attention. What computes it is
therefore replaced, through the library's own `AttentionInterface`, by eager attention that also takes notes; in a twin
of the tower, so that nobody else's tower takes them.
"""

import copy
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from .module_twins import copied_configs, twin_of
from .token_layout import Block

# Each copy of this module has its own: checkpoints from the Hub bring copies, which take notes for themselves.
OBSERVED = f"tprl_observed_{zlib.crc32(__name__.encode())}"


@dataclass
class ObservedLayer:
    """What the tokens of a tower received in one attention layer, averaged over heads; one entry a call.

    Args:
        module: the layer.
        mean (`float [T, S]` each): of T tiles' S tokens, averaged over those that could attend to them.
        first, last (`float [T, S]` each): from the first and the last token, of which one may be [CLS].
    """

    module: nn.Module
    mean: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    last: list[Tensor] = field(default_factory=list)


_notes: ContextVar[list[ObservedLayer] | None] = ContextVar("tprl_observed_layers", default=None)


def observed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention over `[T, heads, S, d]` that notes what each token received."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    elif attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(-1, dtype=torch.float32)
    layers = _notes.get()
    if layers is not None:
        if not layers or layers[-1].module is not module:
            layers.append(ObservedLayer(module))
        over_heads = weights.detach().mean(1)
        layers[-1].mean.append(mean_over_queries(over_heads))
        layers[-1].first.append(over_heads[:, 0])
        layers[-1].last.append(over_heads[:, -1])
    weights = nn.functional.dropout(weights.to(value.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def mean_over_queries(weights: Tensor) -> Tensor:
    """`weights [T, queries, keys]` averaged over the queries that could attend to a key, `[T, keys]`.

    Neither padding, to which nobody attends, nor other images of the same sequence count, so that the batch does not.
    """
    alive = (weights.amax(1) > 0)[:, :, None]
    attending = ((weights > 0) & alive).sum(1)
    return (weights * alive).sum(1) / attending.clamp(min=1)


AttentionInterface.register(OBSERVED, observed_attention)
AttentionMaskInterface.register(OBSERVED, eager_mask)


@contextmanager
def observed_tower(base: PreTrainedModel) -> Iterator[tuple[Any, list[ObservedLayer]]]:
    """Inside the `with`, the vision tower of a twin of `base.base_model` notes its attention layer by layer.

    Returns:
        The twin, which shares the weights, and the notes. The base model itself is not changed.

    Raises:
        `ValueError`: for a base model without a tower of its own.
    """
    tower = base.config.sub_configs.get("vision_config") and getattr(base.config, "vision_config", None)
    if tower is None or tower._attn_implementation is None:
        raise ValueError(
            f"Models of type {base.config.model_type!r} have no vision tower whose attention could be read. Use a "
            "pruner without `needs_attention`."
        )
    configs = copied_configs(tower, OBSERVED)
    configs[id(base.config)] = copy.copy(base.config)
    configs[id(base.config)].vision_config = configs[id(tower)]
    layers: list[ObservedLayer] = []
    token = _notes.set(layers)
    try:
        yield twin_of(base.base_model, configs, shared=[base.get_decoder()]), layers
    finally:
        _notes.reset(token)


def choose_layer(layers: list[ObservedLayer], layer: int, model_type: str) -> ObservedLayer:
    """The tower layer whose output is `hidden_states[layer]`.

    Raises:
        `ValueError`: where nothing was noted, and where the tower ran several times.
    """
    if not layers:
        raise ValueError(
            f"The vision tower of {model_type!r} computes attention in a way of its own that cannot be read. Use a "
            "pruner without `needs_attention`."
        )
    if len({id(one.module) for one in layers}) < len(layers):
        raise ValueError(
            f"The vision tower of {model_type!r} ran several times, for an overview and for crops, and its attention "
            "cannot be told apart. Use a pruner without `needs_attention`."
        )
    return layers[layer - 1 if layer > 0 else layer]


def merged_side(num_patches: int, num_tokens: int) -> int:
    """Side of the square of patches that one token stands for, 0 where there is none."""
    if num_tokens == 0 or num_patches % num_tokens:
        return 0
    side = math.isqrt(num_patches // num_tokens)
    return side if side * side * num_tokens == num_patches else 0


def received_by_patches(layer: ObservedLayer, valid: Tensor | None, num_tokens: int, class_token: int) -> Tensor:
    """Attention that each patch received, `[P]`, tile by tile.

    From the [CLS] tokens where the tower has one in each tile, otherwise the mean over all that attended. That it has
    them is told by the numbers: without them, each of `num_tokens` tokens stands for a square of patches.

    Args:
        valid (`bool`, *optional*): False for padding; as many as there are patches.
        class_token: 0 where [CLS] comes first, -1 where it comes last.
    """
    patches = torch.cat([mean.flatten() for mean in layer.mean])
    if valid is not None and valid.numel() == len(patches):
        return patches[valid.flatten().to(patches.device)]
    num_tiles = sum(len(mean) for mean in layer.mean)
    if merged_side(len(patches), num_tokens) or not merged_side(len(patches) - num_tiles, num_tokens):
        return patches
    from_class = [last[:, :-1] for last in layer.last] if class_token else [first[:, 1:] for first in layer.first]
    return torch.cat([rows.flatten() for rows in from_class])


def lay_over_blocks(patches: Tensor, blocks: list[Block], merged: bool, model_type: str) -> Tensor:
    """Attention received by each visual token, `[V]`; a token that stands for several patches gets their mean.

    Args:
        patches (`[P]`): of all images, row by row.
        blocks: the grids of the tokens; separators get 0.
        merged: the patches of each token lie beside each other.

    Raises:
        `ValueError`: where patches and tokens do not correspond.
    """
    num_tokens = sum(block.height * block.width for block in blocks if not block.separator)
    side = merged_side(len(patches), num_tokens)
    if not side:
        raise ValueError(
            f"The {len(patches)} patches of the tower of {model_type!r} do not become {num_tokens} visual tokens by "
            "squares, so that attention to patches is none to tokens. Use a pruner without `needs_attention`."
        )
    laid, start = [], 0
    for block in blocks:
        if block.separator:
            laid.append(patches.new_zeros(1))
            continue
        height, width = block.height, block.width
        own = patches[start : start + height * width * side**2]
        start += len(own)
        if merged:
            grid = own.view(height, width, side**2).mean(-1)
        else:
            grid = own.view(height, side, width, side).mean((1, 3))
        laid.append(nn.functional.pad(grid, (0, int(block.row_newline))).flatten())
    return torch.cat(laid)


def undo_windows(patches: Tensor, grids: list[tuple[int, int]], side: int) -> Tensor:
    """`patches [P, ...]` of a tower that goes through its images window by window, row by row.

    Args:
        grids: height and width of each image or frame.
        side: along a window; windows at the right and the lower rim may be smaller.
    """
    orders, start = [], 0
    for height, width in grids:
        index = torch.arange(start, start + height * width, device="cpu").view(height, width)
        orders += [window.flatten() for rows in index.split(side) for window in rows.split(side, dim=1)]
        start += height * width
    return patches[torch.cat(orders).argsort().to(patches.device)]
