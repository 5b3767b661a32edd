"""Average pooling: the grid of tokens becomes a coarser one, each of whose tokens is the mean of those it covers.

The plainest way to fewer tokens after the tower, and a baseline of UniPruneBench (arXiv 2511.02650). It looks neither
at the tokens nor at the question.
"""

import math

import torch
from torch import Tensor

from tprl_hf.modeling.token_pruner import SampleTokens, SetPruner


class PoolPruner(SetPruner):
    """Covers each image, crop and frame with as many cells as it keeps tokens; a cell becomes the mean of its tokens.

    Cells are as square as the budget allows: a fourth of a 12 by 12 grid are 6 by 6 cells of 2 by 2 tokens. Where the
    budget does not divide into rows and columns, some rows of cells have one cell more. Several images, crops or
    frames share the budget by their sizes. A mean has the place of the token in the middle of its cell. Rows for
    deeper LLM layers (deepstack) are not averaged.

    Args:
        **budget: see [`TokenPruner`]; no threshold.
    """

    def select(self, sample: SampleTokens, count: int) -> Tensor:
        return middles(sample, cells_of(sample, count))

    def join(self, sample: SampleTokens, kept: Tensor) -> Tensor:
        if not kept.any():
            return sample.tokens
        cells = cells_of(sample, int(kept.sum()))
        return sample.tokens.index_copy(0, middles(sample, cells), means(sample.tokens, cells).to(sample.tokens.dtype))


def cells_of(sample: SampleTokens, count: int) -> Tensor:
    """The cell of each token, `int64 [n]`, of `count` in all; -1 where an image is too small a part to have one."""
    layout = sample.layout
    cells = torch.full_like(layout.row, -1)
    _, block = torch.stack([layout.image, layout.block]).unique(dim=1, return_inverse=True)
    sizes = block.bincount()
    ends = ((sizes.cumsum(0) * count).float() / len(block)).round().long()
    first = 0
    for number, end in enumerate(ends.tolist()):
        own = (block == number).nonzero()[:, 0]
        if end > first:
            grid = int(layout.height[own[0]]), int(layout.width[own[0]])
            row, column = layout.row[own], layout.column[own]
            if len(own) < math.prod(grid):  # some places have no token: a cell there would be empty
                row, column, grid = torch.zeros_like(row), torch.arange(len(own), device=row.device), (1, len(own))
            cells[own] = first + cell_numbers(row, column, grid, end - first)
        first = end
    return cells


def cell_numbers(row: Tensor, column: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """The cell, from 0 to `count - 1`, of tokens at `row` and `column` of a full `grid` of height and width."""
    height, width = grid
    num_bands = min(max(round((count * height / width) ** 0.5), -(-count // width), 1), height, count)
    band = row * num_bands // height
    starts = torch.arange(num_bands + 1, device=row.device) * count // num_bands  # cells before each band of rows
    in_band = starts[band + 1] - starts[band]
    return starts[band] + column * in_band // width


def means(values: Tensor, cells: Tensor) -> Tensor:
    """The mean of `values [n, D]` in each cell, float32 `[count, D]`."""
    covered = cells >= 0
    values, index = values[covered].float(), cells[covered]
    sums = values.new_zeros(int(index.max()) + 1, values.shape[1]).index_add(0, index, values)
    return sums / index.bincount()[:, None]


def middles(sample: SampleTokens, cells: Tensor) -> Tensor:
    """Index of the token in the middle of each cell, `int64 [count]`."""
    places = torch.stack([sample.layout.row, sample.layout.column], dim=1).float()
    away = (places - means(places, cells)[cells]).square().sum(1)
    order = away.argsort(stable=True)
    order = order[cells[order].argsort(stable=True)]  # by cell, the nearest to its middle first
    index = cells[order]
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    return order[first & (index >= 0)]
