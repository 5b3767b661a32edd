"""How much attention each visual token received in the vision tower, for pruners that read it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


@contextmanager
def eager_tower(base: PreTrainedModel) -> Iterator[None]:
    """Inside the `with`, the vision tower computes attention in the way that can return it."""
    before = base.config.vision_config._attn_implementation
    base.set_attn_implementation({"vision_config": "eager"})
    try:
        yield
    finally:
        base.set_attn_implementation({"vision_config": before})


def attention_maps(output: ModelOutput, layer: int, model_type: str) -> Tensor:
    """Head-averaged attention of the tower layer whose output is `hidden_states[layer]`, float `[tiles, S, S]`.

    Raises:
        `ValueError`: where the tower returns no attention.
    """
    attentions = output.get("attentions")
    if not attentions or attentions[0] is None or attentions[0].ndim != 4:
        raise ValueError(
            f"The vision tower of {model_type!r} does not return its attention, which this pruner needs. Use a pruner "
            "without `needs_attention`."
        )
    return attentions[layer - 1 if layer > 0 else layer].float().mean(1)


def received(maps: Tensor) -> Tensor:
    """Attention that each patch received, `[tiles, patches]`, from `maps [tiles, S, S]`.

    From the [CLS] token where the tower has one (S is then one more than a square), otherwise the mean over all
    patches.
    """
    side = math.isqrt(maps.shape[-1])
    return maps.mean(1) if side * side == maps.shape[-1] else maps[:, 0, 1:]


def lay_over_tokens(maps: Tensor, num_tokens: int, model_type: str) -> Tensor:
    """Attention received by each visual token, `[num_tokens]`; tokens merged by the projector share a mean.

    Raises:
        `ValueError`: where patches and tokens do not correspond.
    """
    patches = received(maps)
    side = math.isqrt(patches.shape[1])
    merge = math.isqrt(max(patches.numel() // num_tokens, 1))
    if side * side != patches.shape[1] or (side // merge) ** 2 * len(patches) != num_tokens:
        raise ValueError(
            f"The tower's attention over {tuple(patches.shape)} patches cannot be laid over the {num_tokens} visual "
            f"tokens of {model_type!r}. Use a pruner without `needs_attention`."
        )
    grid = patches.view(len(patches), side // merge, merge, side // merge, merge)
    return grid.mean(dim=(2, 4)).flatten()
