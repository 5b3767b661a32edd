"""What the vision tower saw, as pictures: the image processor's normalisation, tiles and flattened patches undone."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from tprl_hf.modeling import TokenLayout


def image_from_pixel_values(
    pixel_values: torch.Tensor, image_mean: Sequence[float], image_std: Sequence[float]
) -> Image.Image:
    """
    Undoes an image processor's normalisation, so that the picture is exactly the (cropped) one the vision tower sees.

    Args:
        pixel_values (`torch.Tensor`):
            Float [3, H, W].
        image_mean (`Sequence[float]`):
            The processor's mean of each channel.
        image_std (`Sequence[float]`):
            The processor's standard deviation of each channel.

    Returns:
        `PIL.Image.Image`: RGB, W × H pixels.

    Raises:
        `ValueError`: If `pixel_values` is of another shape, as that of a processor that flattens its patches.
    """
    if pixel_values.ndim != 3 or pixel_values.shape[0] != 3:
        raise ValueError(f"pixel_values must be [3, H, W] to be drawn, got {list(pixel_values.shape)}.")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (image_mean, image_std))
    pixels = (pixel_values.detach().float().cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).numpy())


def tile_pictures(
    pixel_values: torch.Tensor, image_mean: Sequence[float], image_std: Sequence[float]
) -> list[Image.Image]:
    """
    The pictures of all crops or tiles that a processor made of one image.

    Args:
        pixel_values (`torch.Tensor`):
            Float [..., 3, H, W].
        image_mean, image_std (`Sequence[float]`):
            As for [`image_from_pixel_values`].
    """
    tiles = pixel_values.reshape(-1, *pixel_values.shape[-3:])
    return [image_from_pixel_values(tile, image_mean, image_std) for tile in tiles]


def seen_pictures(
    images: Sequence[Image.Image], processor: Any, inputs: Mapping[str, Any], layout: "TokenLayout"
) -> list[Image.Image]:
    """
    What the vision tower sees of images: the square that a processor cut out, or its tiles; else the whole images.

    Args:
        images (`Sequence[PIL.Image.Image]`):
            As they were given.
        processor ([`ProcessorMixin`]):
            What made the inputs.
        inputs (`Mapping[str, torch.Tensor]`):
            Of these images alone: `pixel_values` [1, 3, H, W], or as the family has them, and what tells their sizes.
        layout ([`TokenLayout`]):
            Where their tokens lie.

    Returns:
        `list[PIL.Image.Image]`: One for each grid of tokens, or one for each image; see [`figures_by_block`].
    """
    sizes = grid_sizes(layout)
    tiles, are_padded = tiles_in(inputs)
    if len(tiles) != len(sizes):
        return list(images)
    # images of several sizes are padded at the right and below to the largest of each
    widest, highest = (max(sides) for sides in zip(*sizes, strict=True))
    height, width = tiles[0].shape[-2:]
    if are_padded and not 1 / 3 < (width / widest) / (height / highest) < 3:  # patches beside each other, in a strip
        return list(images)
    pictures = unnormalised(tiles, processor.image_processor)
    if not are_padded:
        return pictures
    return [
        without_padding(tile, tile.width * width // widest, tile.height * height // highest)
        for tile, (width, height) in zip(pictures, sizes, strict=True)
    ]


def seen_frames(
    frames: Sequence[Image.Image], processor: Any, inputs: Mapping[str, Any], layout: "TokenLayout"
) -> list[Image.Image]:
    """
    What the vision tower sees of a video, a picture for each grid of its tokens: as the processor cut it, else the
    whole frame. Where several frames share a grid it is the first of them.

    Args:
        frames (`Sequence[PIL.Image.Image]`):
            As they were given.
        processor ([`ProcessorMixin`]):
            What made the inputs.
        inputs (`Mapping[str, torch.Tensor]`):
            Of this video alone.
        layout ([`TokenLayout`]):
            Where its tokens lie.

    Raises:
        `ValueError`: If the tokens do not lie in one grid for each frame, or for each group of as many frames.
    """
    grids = token_grids(layout)
    suffix = "_videos" if "pixel_values_videos" in inputs else ""
    tiles, _ = tiles_in(inputs, suffix)
    if len(tiles) == len(grids):
        return unnormalised(tiles, processor.video_processor)
    shared = math.ceil(len(frames) / len(grids))
    if math.ceil(len(frames) / shared) != len(grids):
        raise ValueError(
            f"The tokens of {len(frames)} frames lie in {len(grids)} grids, so that it is not known which lie where."
        )
    return list(frames[::shared])


def token_grids(layout: "TokenLayout") -> list[tuple[int, int]]:
    """Image and block of each grid of tokens, in their order; separators lie in none."""
    content = ~layout.protected
    return [
        (image, block)
        for image, block in torch.stack([layout.image[content], layout.block[content]], 1).unique(dim=0).tolist()
    ]


def grid_sizes(layout: "TokenLayout") -> list[tuple[int, int]]:
    """Columns and rows of each grid."""
    content = ~layout.protected
    return [
        (int(layout.width[inside][0]), int(layout.height[inside][0]))
        for image, block in token_grids(layout)
        for inside in [content & (layout.image == image) & (layout.block == block)]
    ]


def tiles_in(inputs: Mapping[str, Any], suffix: str = "") -> tuple[list[torch.Tensor], bool]:
    """
    The pictures in what a processor made, [3, H, W] each, and whether they may be padded to a common size. There is
    none where patches are flattened and nothing says how they lie.
    """
    pixels = inputs[f"pixel_values{suffix}"]
    rows_of_patches = inputs.get(f"spatial_shapes{suffix}")
    if rows_of_patches is not None and pixels.ndim == 3:  # [tiles, patches, height × width × 3 of a patch]
        side = math.isqrt(pixels.shape[-1] // 3)
        tiles = [
            tile[: rows * columns]
            .reshape(rows, columns, side, side, 3)
            .permute(4, 0, 2, 1, 3)
            .flatten(3)
            .flatten(1, 2)
            for tile, (rows, columns) in zip(pixels, rows_of_patches.tolist(), strict=True)
        ]
        return tiles, False
    rows_of_patches = inputs.get(f"target_sizes{suffix}")
    if rows_of_patches is not None and pixels.ndim == 4:  # [1, 3, height of a patch, width of all patches]
        side, sizes = pixels.shape[2], rows_of_patches.tolist()
        strips = pixels[0].split([rows * columns * side for rows, columns in sizes], dim=-1)
        tiles = [
            strip.reshape(3, side, rows, columns, side).transpose(1, 2).flatten(3).flatten(1, 2)
            for strip, (rows, columns) in zip(strips, sizes, strict=True)
        ]
        return tiles, False
    if pixels.ndim in (4, 5) and pixels.shape[-3] == 3:
        return list(pixels.reshape(-1, *pixels.shape[-3:])), True
    return [], True


def unnormalised(tiles: Sequence[torch.Tensor], made_by: Any) -> list[Image.Image]:
    """The pictures of tiles [3, H, W] that an image or video processor made."""
    settings = vars(made_by)
    normalised = settings.get("do_normalize", True)
    mean, std = (settings["image_mean"], settings["image_std"]) if normalised else ([0.0] * 3, [1.0] * 3)
    return [image_from_pixel_values(tile, mean, std) for tile in tiles]


def without_padding(tile: Image.Image, width: int, height: int) -> Image.Image:
    """The upper left part of a tile, where the rest is of one colour; else the tile."""
    pixels = np.asarray(tile)
    outside = np.ones(pixels.shape[:2], bool)
    outside[:height, :width] = False
    is_flat = len(np.unique(pixels[outside], axis=0)) <= 1
    return tile.crop((0, 0, width, height)) if is_flat else tile
