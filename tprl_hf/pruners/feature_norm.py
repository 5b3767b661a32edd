"""Feature norm: the simplest score that looks at the tokens at all.

High norms are not a sure sign of importance: vision transformers store global information in high-norm tokens of the
background (Darcet et al., "Vision Transformers Need Registers", arXiv 2309.16588), so both directions are offered.
"""

from torch import Tensor

from tprl_hf.modeling.token_pruner import PruningInputs, TokenPruner
from tprl_hf.modeling.values import flag


class FeatureNormPruner(TokenPruner):
    """Keeps the tokens with the largest Euclidean norm: `score_i = ||v_i||`.

    It never looks at the question, needs no attention and works with every family.

    Args:
        largest (`bool`, defaults to `True`): keep the largest norms; `False` keeps the smallest.
        **budget: see [`TokenPruner`].
    """

    def __init__(self, largest: bool = True, **budget):
        super().__init__(**budget)
        self.largest = flag("largest", largest)

    def score(self, inputs: PruningInputs) -> Tensor:
        norms = inputs.tokens.float().norm(dim=-1)
        return norms if self.largest else -norms
