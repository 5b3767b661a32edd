"""Where visual tokens lie: grids of images, crops and frames, and the separators between their rows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Consecutive visual tokens that form a grid, row by row.

    Args:
        height, width (`int`): tokens of content.
        row_newline (`bool`): each row ends in one separator token more.
        separator (`bool`): the block itself is a separator.
        dropped (`tuple[int, ...]`): places of the grid, counted row by row, that have no token.
    """

    height: int
    width: int
    row_newline: bool = False
    separator: bool = False
    dropped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dropped", tuple(self.dropped))  # files have lists

    @property
    def num_tokens(self) -> int:
        return self.height * (self.width + self.row_newline) - len(self.dropped)


SEPARATOR = Block(1, 1, separator=True)


@dataclass
class TokenLayout:
    """Where each visual token lies. All fields are tensors `[V]`, V tokens in placeholder order.

    Args:
        image (`int64`): index of the image or video in the batch.
        block (`int64`): index of the crop, tile or frame in that image.
        row, column (`int64`): place in the block's grid.
        height, width (`int64`): size of the block's grid.
        protected (`bool`): separator tokens (row ends), which pruning keeps.
    """

    image: Tensor
    block: Tensor
    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor
    protected: Tensor

    def __getitem__(self, index: Tensor) -> "TokenLayout":
        return TokenLayout(**{name: value[index] for name, value in vars(self).items()})

    def to(self, device: torch.device) -> "TokenLayout":
        """The same layout on `device`."""
        return self if self.image.device == device else self.from_stacked(self.stacked().to(device))

    def positions(self) -> Tensor:
        """Row and column in [0, 1], float32 `[V, 2]`."""
        row = (self.row.float() + 0.5) / self.height
        column = (self.column.float() + 0.5) / self.width
        return torch.stack([row, column.clamp(max=1.0)], dim=-1)

    @classmethod
    def from_blocks(cls, entries: list[list[Block]]) -> "TokenLayout":
        """Layout of all tokens from the blocks of each image."""
        return cls.from_stacked(stacked_fields(tuple(tuple(blocks) for blocks in entries if blocks)).clone())

    def stacked(self) -> Tensor:
        """All fields as one tensor, `int64 [7, V]`."""
        return torch.stack([value.long() for value in vars(self).values()])

    @classmethod
    def from_stacked(cls, stacked: Tensor) -> "TokenLayout":
        """The layout of which `stacked [7, ...]` are the fields."""
        image, block, row, column, height, width, protected = stacked
        return cls(image, block, row, column, height, width, protected.bool())


@lru_cache(maxsize=8)  # most models cut all images alike
def stacked_fields(entries: tuple[tuple[Block, ...], ...]) -> Tensor:
    """[`TokenLayout.stacked`] of the blocks of each image, `int64 [7, V]`. Not to be changed."""
    columns = []
    for image, blocks in enumerate(entries):
        for index, block in enumerate(blocks):
            width = block.width + block.row_newline
            row = torch.arange(block.height, device="cpu").repeat_interleave(width)
            column = torch.arange(width, device="cpu").repeat(block.height)
            protected = torch.full_like(row, block.separator) | (column == block.width)
            sizes = [torch.full_like(row, value) for value in (image, index, block.height, block.width)]
            fields = torch.stack([sizes[0], sizes[1], row, column, sizes[2], sizes[3], protected.long()])
            if block.dropped:
                has_token = torch.ones_like(protected, dtype=torch.bool)
                has_token[list(block.dropped)] = False
                fields = fields[:, has_token]
            columns.append(fields)
    return torch.cat(columns, dim=1) if columns else torch.zeros(7, 0, dtype=torch.long, device="cpu")


def without_places(block: Block, dropped: Iterator[bool]) -> Block:
    """`block` without the tokens for which `dropped` is True; values behind its last token are for other blocks."""
    return replace(block, dropped=tuple(i for i, gone in enumerate(islice(dropped, block.num_tokens)) if gone))


def square_block(length: int) -> Block:
    side = math.isqrt(length)
    return Block(side, side) if side * side == length else Block(1, length)


def grid_blocks(grid: list[int], length: int) -> list[Block]:
    """Blocks of an image or video of `grid` = (frames, height, width) patches that became `length` tokens."""
    frames, height, width = grid
    merge = math.isqrt(max(frames * height * width // max(length, 1), 1))
    block = Block(height // merge, width // merge)
    if frames * block.num_tokens != length:
        return [Block(1, length)]
    return [block] * frames


def sized_block(size: list[int], length: int) -> Block:
    """Block of an image of `size` = (height, width) pixels that became `length` tokens of its own shape."""
    pixels_per_token = math.sqrt(size[0] * size[1] / max(length, 1))
    block = Block(round(size[0] / pixels_per_token), round(size[1] / pixels_per_token))
    return block if block.num_tokens == length else square_block(length)


def join_rows(rows: list[int], lengths: list[int]) -> list[list[Block]]:
    """One grid for each image of `lengths` tokens, of which each run of placeholders is a row.

    Where rows and images disagree, an image is a square if possible.
    """
    rest, images = iter(rows), []
    for length in lengths:
        own: list[int] = []
        while sum(own) < length:
            own.append(next(rest, length))
        same = sum(own) == length and len(set(own)) == 1 and len(own) > 1
        images.append([Block(len(own), own[0]) if same else square_block(length)])
    return images


def join_tiles(tiles: list[list[Block]], runs: list[int]) -> list[list[Block]]:
    """Tiles that fill one run of placeholders belong to one image; left as they are where tiles and runs disagree."""
    images: list[list[Block]] = []
    rest = iter(tiles)
    for run in runs:
        image: list[Block] = []
        while sum(block.num_tokens for block in image) < run:
            image += next(rest, [Block(1, run + 1)])
        if sum(block.num_tokens for block in image) != run:
            return tiles
        images.append(image)
    return images
