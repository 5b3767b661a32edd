"""The oracle: it is told where the answer is. Above it no pruner of these budgets should be expected."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tprl_hf.modeling.token_pruner import PruningInputs, TokenPruner

from .uniform import NUM_BITS, dither_order


class OraclePruner(TokenPruner):
    """First the tokens that lie on the boxes the question is about, by how much of them is covered; then an even grid.

    No method, but a bound: the boxes are part of the data (see `boxes` of [`~tprl_hf.data.mosaic_vqa`]). Where there
    are none, as when the answer is "no", it keeps what [`UniformPruner`] keeps.

    Args:
        boxes (`list`): for each sample of the batch to come, in its order, the boxes `(x0, y0, x1, y1)` on its first
            image, in pixels.
        sizes (`list[tuple[int, int]]`): width and height of that image, which the tower must see as a whole.
        **budget: see [`TokenPruner`].

    Raises:
        `ValueError`: in use, for a batch of another size, or an image that was cut into tiles.
    """

    def __init__(self, boxes: Sequence[Sequence[Sequence[float]]], sizes: Sequence[tuple[int, int]], **budget):
        super().__init__(**budget)
        if len(boxes) != len(sizes):
            raise ValueError(f"Got the boxes of {len(boxes)} samples and the sizes of {len(sizes)} images.")
        self.boxes = boxes
        self.sizes = sizes

    def score(self, inputs: PruningInputs) -> Tensor:
        layout = inputs.layout
        if len(self.boxes) != len(inputs.valid):
            raise ValueError(f"The oracle knows the boxes of {len(self.boxes)} samples, not of {len(inputs.valid)}.")
        if (layout.block[inputs.valid] > 0).any():
            raise ValueError("The oracle cannot lay boxes over an image that was cut into tiles.")
        scores = -dither_order(layout.row, layout.column).float() / 4.0**NUM_BITS
        for row, (boxes, size) in enumerate(zip(self.boxes, self.sizes, strict=True)):
            if inputs.valid[row].any():
                first = layout.image[row] == layout.image[row, inputs.valid[row]].min()
                scores[row] += covered(inputs, row, boxes, size) * first
        return scores


def covered(inputs: PruningInputs, row: int, boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> Tensor:
    """1 plus the largest share of each token's cell that one of the boxes covers, and 0 for the others, `[N]`."""
    height, width = inputs.layout.height[row].float(), inputs.layout.width[row].float()
    top, left = inputs.layout.row[row] / height, inputs.layout.column[row] / width
    best = torch.zeros(len(top), dtype=torch.float32, device=top.device)
    for x0, y0, x1, y1 in boxes:
        wide = (left + 1 / width).clamp(max=x1 / size[0]) - left.clamp(min=x0 / size[0])
        high = (top + 1 / height).clamp(max=y1 / size[1]) - top.clamp(min=y0 / size[1])
        share = wide.clamp(min=0) * high.clamp(min=0) * width * height
        best = torch.maximum(best, torch.where(share > 1e-6, 1 + share, torch.zeros_like(share)))
    return best
