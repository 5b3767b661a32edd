"""VisionZip: the tokens to which the vision tower attends, and averages of the rest.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (arXiv 2412.04467). It never
looks at the question. The authors also offer a version with a fine-tuned projector; this is the training-free one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tprl_hf.modeling.token_pruner import SampleTokens, SetPruner
from tprl_hf.modeling.values import UNIT, flag


class VisionZip(SetPruner):
    """Keeps the dominant tokens (largest attention received) and merges the others into a few contextual ones.

    Of the tokens that are not dominant, targets at equal steps are kept; each other one joins the target it is most
    similar to, and a target becomes the mean of itself and what joined it. The paper compares attention keys; here
    it is the cosine of the tokens that the LLM gets. Rows for deeper LLM layers (deepstack) are not merged.

    Args:
        dominant_ratio (`float`, defaults to 27/32): share of the budget for dominant tokens; the default is the
            paper's for LLaVA-1.5 (54 and 10 of 64).
        merge (`bool`, defaults to `True`): whether targets become means; otherwise what is not kept is only removed.
        **budget: see [`TokenPruner`]; no threshold.

    Raises:
        `ValueError`: for a `dominant_ratio` outside [0, 1].
    """

    needs_attention = True
    not_settings = ("merge",)  # the name of a method

    def __init__(self, dominant_ratio: float = 27 / 32, merge: bool = True, **budget):
        super().__init__(**budget)
        self.dominant_ratio = UNIT("dominant_ratio", dominant_ratio)
        self.merges = flag("merge", merge)

    def settings(self) -> dict[str, Any]:
        found = super().settings()
        return found if self.merges else {**found, "merge": False}

    def select(self, sample: SampleTokens, count: int) -> Tensor:
        dominant, rest = self.split(sample, count)
        return torch.cat([dominant, rest[even_steps(len(rest), count - len(dominant)).to(rest.device)]])

    def split(self, sample: SampleTokens, count: int) -> tuple[Tensor, Tensor]:
        """Indices of the dominant tokens for a budget of `count`, and of the others in their order."""
        assert sample.attention is not None
        order = sample.attention.argsort(descending=True, stable=True)
        num_dominant = round(count * self.dominant_ratio)
        return order[:num_dominant], order[num_dominant:].sort().values

    def join(self, sample: SampleTokens, kept: Tensor) -> Tensor | None:
        _, rest = self.split(sample, int(kept.sum()))
        targets, others = rest[kept[rest]], rest[~kept[rest]]
        if not self.merges or not len(targets) or not len(others):
            return None
        return sample.tokens.index_copy(0, targets, join_most_similar(sample.tokens[targets], sample.tokens[others]))


def even_steps(length: int, count: int) -> Tensor:
    """`count` of the indices 0 ... length - 1 at equal steps from the first, `int64 [count]`."""
    return torch.arange(count) * length // max(count, 1)


def join_most_similar(targets: Tensor, others: Tensor) -> Tensor:
    """Means `[m, D]` of each of `targets [m, D]` and those of `others [n, D]` that are closest to it by cosine."""
    similarity = F.normalize(others.float(), dim=-1) @ F.normalize(targets.float(), dim=-1).T
    joined = F.one_hot(similarity.argmax(dim=1), len(targets)).float()  # [n, m]
    sums = targets.float() + joined.T @ others.float()
    return (sums / (1 + joined.sum(0))[:, None]).to(targets.dtype)
