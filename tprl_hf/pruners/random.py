"""Random keeping: the humble baseline, and a strong one."""

import zlib

import torch
from torch import Tensor

from tprl_hf.modeling.token_pruner import PruningInputs, TokenPruner
from tprl_hf.modeling.values import whole


class RandomPruner(TokenPruner):
    """Keeps a uniformly random set of tokens.

    The set depends on `seed` and on the sample's own prompt and number of tokens: on no batch mate, no batch position,
    and no global random state.

    Args:
        seed (`int`, defaults to 0): another seed gives another set.
        **budget: see [`TokenPruner`].
    """

    def __init__(self, seed: int = 0, **budget):
        super().__init__(**budget)
        self.seed = whole()("seed", seed)

    def score(self, inputs: PruningInputs) -> Tensor:
        scores = torch.zeros(inputs.valid.shape, dtype=torch.float32, device="cpu")
        for row, (key, count) in enumerate(zip(inputs.sample_keys, inputs.valid.sum(1).tolist(), strict=True)):
            # torch takes 32 bits of a seed, so both numbers are mixed down to these
            generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{self.seed} {key}".encode()))
            drawn = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
            scores[row, inputs.valid[row].cpu()] = drawn
        return scores.to(inputs.tokens.device)
