"""Fewer visual tokens from a smaller picture: the rows `resize` and `resize+NAME` of a comparison.

No pruner could do this: a pruner sees tokens, and these pictures reach the vision tower already small. So the prompt
has fewer placeholders, and the tower has less to do.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from tprl_hf.pictures import images_of, picture_of

from .answers import chat_inputs

Size = tuple[int, int]  # width and height in pixels, as PIL has them
# Each is tried, and the number of tokens counted: halvings of the interval of scales.
NUM_HALVINGS = 8


class PictureShrinker:
    """
    Shrinks pictures until the processor makes a given fraction of their visual tokens.

    Processors differ in what they do with a small picture, and there are three kinds. Some enlarge every picture to
    one square (LLaVA): the square is made smaller, and the tower interpolates its positions. Some take any size, in
    whole patches (Qwen-VL, Pixtral): both sides are shrunk alike, and a lower limit is lifted. Some cut pictures into
    tiles (LLaVA-NeXT, InternVL): fewer tiles. The result is the nearest number of tokens that can be had.

    Args:
        model ([`TPRLForConditionalGeneration`]): The model, whose placeholders are counted.
        processor ([`ProcessorMixin`]): Its processor. It is not changed.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.copies: dict[str, Any] = {}
        self.found: dict[tuple[Size, float], tuple[Any, Size]] = {}
        self.counts: dict[Size, int] = {}

    def __call__(self, sample: Mapping[str, Any], ratio: float) -> tuple[Any, dict[str, Any]]:
        """
        Args:
            sample (`Mapping`): With `images` and `prompt`.
            ratio (`float`): Fraction of the visual tokens of each picture, in (0, 1].

        Returns:
            `tuple`: The processor that takes the pictures, and the sample with smaller ones. Of several pictures that
            would each need another processor, all get that of the first.

        Raises:
            `ValueError`: If the processor makes as many tokens of any picture, however small.
        """
        pictures = [picture_of(image) for image in images_of(sample)]
        ways = [self.way(picture, ratio) for picture in pictures]
        smaller = [
            picture if size == picture.size else picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
            for picture, (_, size) in zip(pictures, ways, strict=True)
        ]
        return ways[0][0] if ways else self.processor, {**sample, "images": smaller, "image": None}

    def count(self, processor: Any, picture: Image.Image) -> int:
        """Visual tokens that a processor makes of one picture."""
        ids = chat_inputs(processor, [{"images": [picture], "prompt": "?"}])["input_ids"]
        return int(self.model.adapter.find_visual(ids).sum())

    def way(self, picture: Image.Image, ratio: float) -> tuple[Any, Size]:
        """The processor and the size of a picture that make the wanted number of tokens, or the nearest to it."""
        key = (picture.size, ratio)
        if key not in self.found:
            if picture.size not in self.counts:
                self.counts[picture.size] = self.count(self.processor, picture)
            self.found[key] = self.nearest(picture, self.counts[picture.size], ratio)
        return self.found[key]

    def nearest(self, picture: Image.Image, num_tokens: int, ratio: float) -> tuple[Any, Size]:
        target = max(1, round(ratio * num_tokens))
        if target == num_tokens:
            return self.processor, picture.size
        counted = [
            (self.count(processor, picture.resize(size)), processor, size)
            for processor, size in self.candidates(picture.size, num_tokens, target)
        ]
        # of two that are as near, the one with fewer tokens
        best = min(counted, key=lambda one: (abs(one[0] - target), one[0]), default=None)
        if best is None or best[0] >= num_tokens:
            raise ValueError(
                f"{type(self.processor.image_processor).__name__} makes {num_tokens} visual tokens of a picture of "
                f"{picture.width} by {picture.height}, however it is shrunk: leave out resize. pool averages tokens "
                "behind the tower."
            )
        return best[1], best[2]

    def candidates(self, size: Size, num_tokens: int, target: int) -> Iterator[tuple[Any, Size]]:
        """Processors and sizes of a picture among which the nearest is sought."""
        images = self.processor.image_processor
        tiles = vars(images).get("max_patches"), vars(images).get("image_grid_pinpoints")
        square = square_side(images)
        if "max_image_tokens" in vars(images):  # of a picture that is not cut
            for number in range(images.min_tiles, images.max_tiles):
                yield self.copy(f"{number} tiles", max_tiles=number), size
            # sides are rounded down, so that a limit brings fewer tokens than it allows
            for most in sorted({min(round(share * target), images.max_image_tokens) for share in (1, 1.25, 1.5, 2)}):
                limits = {"min_image_tokens": 1, "max_image_tokens": most}
                yield self.copy(f"{most} tokens", do_image_splitting=False, **limits), size
        elif "do_image_splitting" in vars(images):
            tile = images.max_image_size["longest_edge"]
            for number in range(1, images.size["longest_edge"] // tile):
                yield self.copy(f"longest edge {number}", size={"longest_edge": number * tile}), size
            yield self.copy("one tile", do_image_splitting=False), size
        elif tiles[1]:
            for height, width in tiles[1]:
                scale = min(width / size[0], height / size[1])
                if scale < 1:
                    yield self.processor, scaled(size, scale)
            # a picture of one patch gets the smallest of them
            yield self.processor, scaled(size, 1 / max(size))
        elif tiles[0]:
            for number in range(1, tiles[0]):
                yield self.copy(f"{number} tiles", max_patches=number), size
        elif self.patch_side:
            width, height = nearest_grid(size, target)
            yield self.any_size(), (width * self.patch_side, height * self.patch_side)
        elif square:
            grid = nearest_grid((1, 1), target)[0]
            yield self.square(grid, square // math.isqrt(num_tokens)), size
        else:
            yield from self.halvings(size, target)

    @property
    def patch_side(self) -> int:
        """Pixels of a side of what becomes one token, where the processor takes pictures of any size; else 0."""
        merge = vars(self.processor.image_processor).get("merge_size") or vars(self.processor).get(
            "spatial_merge_size"
        )
        return merge * vars(self.processor.image_processor)["patch_size"] if merge else 0

    def any_size(self) -> Any:
        """The processor without the smallest size that it enlarges pictures to."""
        size = self.processor.image_processor.size
        if size.get("shortest_edge") is None:
            return self.processor
        smallest = {"shortest_edge": self.patch_side**2, "longest_edge": size["longest_edge"]}
        return self.copy("any size", size=smallest)

    def square(self, grid: int, patch: int) -> Any:
        """The processor that makes every picture a square of `grid` by `grid` patches."""
        side = {"height": grid * patch, "width": grid * patch}
        images = self.processor.image_processor
        cropped = vars(images).get("crop_size") is not None
        settings: dict[str, Any] = {"size": side}
        if cropped:
            shortest = images.size.get("shortest_edge") is not None
            settings = {"size": {"shortest_edge": grid * patch} if shortest else side, "crop_size": side}
        made = self.copy(f"square {grid}", **settings)
        if "image_seq_length" in vars(made):  # placeholders of every picture
            made.image_seq_length = grid**2
        return made

    def halvings(self, size: Size, target: int) -> Iterator[tuple[Any, Size]]:
        low, high = 0.0, 1.0
        for _ in range(NUM_HALVINGS):
            middle = (low + high) / 2
            smaller = scaled(size, middle)
            yield self.processor, smaller
            more = self.count(self.processor, Image.new("RGB", smaller)) > target
            low, high = (low, middle) if more else (middle, high)

    def copy(self, name: str, **settings: Any) -> Any:
        """The processor with other settings for pictures; the same object for the same `name`."""
        if name not in self.copies:
            made = copy.copy(self.processor)
            made.image_processor = copy.copy(self.processor.image_processor)
            for setting, value in settings.items():
                setattr(made.image_processor, setting, value)
            self.copies[name] = made
        return self.copies[name]


def enlarged(sample: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """A sample whose pictures were shrunk to a fraction of their pixels and enlarged again: what detail is left."""
    pictures = [picture_of(image).convert("RGB") for image in images_of(sample)]
    smaller = [one.resize(scaled(one.size, ratio**0.5), Image.Resampling.BICUBIC) for one in pictures]
    again = [small.resize(one.size, Image.Resampling.BICUBIC) for small, one in zip(smaller, pictures, strict=True)]
    return {**sample, "images": again, "image": None}


def square_side(images: Any) -> int | None:
    """Pixels of a side of the square that an image processor makes of every picture, if it does."""
    crop = vars(images).get("crop_size") if vars(images).get("do_center_crop", True) else None
    size = crop if crop is not None else images.size
    height, width = size.get("height"), size.get("width")
    return height if height is not None and height == width else None


def nearest_grid(size: Size, target: int) -> Size:
    """Columns and rows of a grid of about `target` cells that a picture of `size` is covered by, its shape kept."""
    width, height = size
    candidates = set()
    for side in range(1, target + 1):
        candidates |= {(side, max(1, round(side * height / width))), (max(1, round(side * width / height)), side)}

    def distance(grid: Size) -> tuple[int, float]:
        columns, rows = grid
        return abs(columns * rows - target), abs(math.log(columns * height / (rows * width)))

    return min(candidates, key=distance)


def scaled(size: Size, scale: float) -> Size:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
