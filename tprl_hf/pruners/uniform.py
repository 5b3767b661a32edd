"""Uniform keeping: an even grid over each image."""

import torch
from torch import Tensor

from tprl_hf.modeling.token_pruner import PruningInputs, TokenPruner

NUM_BITS = 10  # grids of up to 1024 x 1024 tokens


class UniformPruner(TokenPruner):
    """Keeps tokens that lie evenly over the rows and columns of each image, crop and frame.

    The order is that of ordered dithering (Bayer's matrix): a quarter of the tokens is every second row and column, a
    half is a chessboard, and what lies between fills the gaps evenly. A larger budget keeps what a smaller one kept.

    Args:
        **budget: see [`TokenPruner`].
    """

    def score(self, inputs: PruningInputs) -> Tensor:
        return 1.0 - dither_order(inputs.layout.row, inputs.layout.column).float() / 4.0**NUM_BITS


def dither_order(row: Tensor, column: Tensor) -> Tensor:
    """Place of each token in Bayer's order, `int64`: smaller comes first."""
    order = torch.zeros_like(row)
    for bit in range(NUM_BITS):
        digit = 2 * (((row ^ column) >> bit) & 1) + ((row >> bit) & 1)
        order += digit * 4 ** (NUM_BITS - 1 - bit)
    return order
