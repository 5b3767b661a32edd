"""The base of all pruners: it decides when, where and how many; a method only says what matters.

A method is one small subclass: [`TokenPruner`] with `score`, when tokens can be judged one by one, or [`SetPruner`]
with `select`, when they have to be chosen together.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .budget import Budget, keep_counts
from .configuration_tprl import CHECKS
from .keep_mask import keep_above_threshold, keep_top_k
from .pruning_policy import PruningPolicy, cosines
from .token_autoencoder import TokenAutoencoder
from .token_layout import TokenLayout
from .values import number

logger = logging.get_logger(__name__)


@dataclass
class PruningInputs:
    """What a pruner may look at. B samples, N visual tokens (padded on the right), Q question tokens, D LLM width.

    Args:
        tokens (`[B, N, D]`): visual tokens as the LLM would see them.
        valid (`bool [B, N]`): False for padding.
        num_visual (`int64 [B]`): visual tokens of each sample, on the CPU, where nothing waits for a GPU.
        layout ([`TokenLayout`] with fields `[B, N]`): where each token lies.
        protected (`bool [B, N]`, *optional*): the separators; `None` where there are none.
        query (`[B, Q, D]`): word embeddings of the question; Q is 0 in query-agnostic use.
        query_valid (`bool [B, Q]`): False for padding.
        sample_keys (`list[int]`): a number for each sample that depends on its prompt and nothing else.
        keep_ratio (`[B]`, *optional*): fraction that is to be kept, for policies that are told; without it no budget.
        attention (`float [B, N]`, *optional*): attention each token received in the vision tower; only there for
            pruners with `needs_attention`.
        known_similarity (`[B, N, Q]`, *optional*): [`similarity`] of inputs whose tokens were left out.
        lvlm (`PreTrainedModel`, *optional*): the base model, for methods that run a part of it. Others use it too:
            nothing in it is to be changed.
    """

    tokens: Tensor
    valid: Tensor
    num_visual: Tensor
    layout: TokenLayout
    protected: Tensor | None
    query: Tensor
    query_valid: Tensor
    sample_keys: list[int]
    keep_ratio: Tensor | None = None
    attention: Tensor | None = None
    known_similarity: Tensor | None = None
    lvlm: PreTrainedModel | None = None

    def similarity(self) -> Tensor:
        """Cosine of each visual token with each word of the question, as the LLM sees both: float32 `[B, N, Q]`."""
        return cosines(self.tokens, self.query)

    @property
    def query_mask(self) -> Tensor:
        """The old name of `query_valid`."""
        logger.warning_once("PruningInputs.query_mask is deprecated: its name is query_valid.")
        return self.query_valid


@dataclass
class SampleTokens:
    """The n tokens of one sample that a [`SetPruner`] chooses from: no padding, no separators.

    Args:
        tokens (`[n, D]`), attention (`float [n]`, *optional*), layout ([`TokenLayout`] with fields `[n]`),
        query (`[Q, D]`): as in [`PruningInputs`], of this sample alone.
    """

    tokens: Tensor
    attention: Tensor | None
    layout: TokenLayout
    query: Tensor

    @classmethod
    def of(cls, inputs: PruningInputs, row: int, free: Tensor) -> "SampleTokens":
        """The tokens `free` (`int64 [n]`) of sample `row`."""
        attention = None if inputs.attention is None else inputs.attention[row, free]
        layout = TokenLayout(**{name: value[row, free] for name, value in vars(inputs.layout).items()})
        return cls(inputs.tokens[row, free], attention, layout, inputs.query[row, inputs.query_valid[row]])


class TokenPruner:
    """Chooses which visual tokens stay. A method that judges tokens one by one overrides [`score`].

    Args:
        keep_ratio, num_keep, threshold: the pruner's own budget, at most one of them; see [`Budget`]. A budget in the
            call goes before it, the model's config after it.
        min_keep, max_keep: bounds of the budget.

    Raises:
        `ValueError`: for more than one budget, one out of its range, and bounds without a budget.
    """

    # Set by methods that read `PruningInputs.attention`, which costs one more pass through a layer of the tower.
    needs_attention = False
    # Arguments of `__init__` that a config does not keep.
    not_settings: tuple[str, ...] = ()

    def __init__(
        self,
        keep_ratio: float | None = None,
        num_keep: int | None = None,
        threshold: float | None = None,
        min_keep: int = 1,
        max_keep: int | None = None,
    ):
        has_budget = keep_ratio is not None or num_keep is not None or threshold is not None
        if not has_budget and (min_keep, max_keep) != (1, None):
            raise ValueError(
                f"min_keep={min_keep} and max_keep={max_keep} bound a budget; {type(self).__name__} has none: pass "
                "keep_ratio, num_keep or threshold with them."
            )
        self.budget = Budget(keep_ratio, num_keep, threshold, min_keep, max_keep) if has_budget else None

    def settings(self) -> dict[str, Any]:
        """The arguments that make this pruner again, but for those that have their default: what a config keeps.

        Each argument of `__init__` must be an attribute of the same name; those of the budget lie in `self.budget`.
        """
        found: dict[str, Any] = {}
        for cls in type(self).__mro__:
            if "__init__" not in vars(cls):
                continue
            parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
            holder = self.budget if cls is TokenPruner else self
            for parameter in parameters if holder is not None else ():
                if parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in self.not_settings:
                    value = getattr(holder, parameter.name)
                    if value != parameter.default:
                        found[parameter.name] = value
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                break
        return found

    def attach(self, lvlm: PreTrainedModel) -> None:
        """Called when a model takes this pruner, with its base model, for methods that run a part of it.

        Nothing is to be kept: other threads may use the pruner with other models. `PruningInputs.lvlm` is that in use.

        Raises:
            `ValueError`: for a base model with which the method does not work.
        """

    def score(self, inputs: PruningInputs) -> Tensor:
        """How much each token matters, float `[B, N]`; higher is kept, padding is ignored."""
        raise NotImplementedError(f"{type(self).__name__} must define `score`.")

    def choose(self, inputs: PruningInputs, budget: Budget) -> tuple[Tensor, Tensor]:
        """Keep mask `bool [B, N]` within `budget`, and the scores `[B, N]` it follows."""
        scores = self.score(inputs)
        if budget.threshold is not None:
            return keep_above_threshold(scores, inputs.valid, budget, inputs.protected), scores
        counts = keep_counts(inputs.num_visual, budget)
        return keep_top_k(scores, inputs.valid, counts, inputs.protected), scores

    def merge(self, inputs: PruningInputs, keep_mask: Tensor) -> Tensor | None:
        """What the LLM gets in place of the tokens, `[B, N, D]`, for methods that merge what goes into what stays.

        `None` leaves them as they are. Only rows where `keep_mask` is True are looked at.
        """
        return None


class SetPruner(TokenPruner):
    """Base of methods that choose a sample's tokens together, such as for diversity; they override [`select`].

    They have no scores, so a call with `threshold` raises `ValueError`.
    """

    def select(self, sample: SampleTokens, count: int) -> Tensor:
        """Indices of `count` of the sample's n tokens, `int64 [count]`, in any order."""
        raise NotImplementedError(f"{type(self).__name__} must define `select`.")

    def join(self, sample: SampleTokens, kept: Tensor) -> Tensor | None:
        """What the kept tokens become, `[n, D]`, where `kept` (`bool [n]`) is True; `None` leaves them as they are."""
        return None

    def choose(self, inputs: PruningInputs, budget: Budget) -> tuple[Tensor, Tensor]:
        if budget.threshold is not None:
            raise ValueError(
                f"{type(self).__name__} chooses tokens together and has no scores to compare with "
                f"threshold={budget.threshold}: pass keep_ratio or num_keep."
            )
        keep_mask, counts = torch.zeros_like(inputs.valid), keep_counts(inputs.num_visual, budget)
        if inputs.protected is not None:
            keep_mask |= inputs.protected
            counts = (counts - keep_mask.sum(1).cpu()).clamp(min=1)
        for row, count in enumerate(counts.tolist()):
            free = self.free(inputs, row)
            count = min(count, len(free))
            if count:
                keep_mask[row, free[self.select(SampleTokens.of(inputs, row, free), count)]] = True
        return keep_mask, keep_mask.float()

    def merge(self, inputs: PruningInputs, keep_mask: Tensor) -> Tensor | None:
        merged = None
        for row, kept in enumerate(keep_mask):
            free = self.free(inputs, row)
            joined = self.join(SampleTokens.of(inputs, row, free), kept[free])
            if joined is not None:
                merged = inputs.tokens.clone() if merged is None else merged
                merged[row, free] = joined.to(merged.dtype)
        return merged

    def free(self, inputs: PruningInputs, row: int) -> Tensor:
        """Indices of a sample's tokens that are neither padding nor separators."""
        return (inputs.valid[row] & ~inputs.layout.protected[row]).nonzero()[:, 0]


def read_similarity(policy: PruningPolicy, inputs: PruningInputs) -> PruningInputs:
    """`inputs` with the similarity of tokens and words, if the policy reads it."""
    if policy.similarity_proj is None or inputs.known_similarity is not None:
        return inputs
    return replace(inputs, known_similarity=inputs.similarity())


# What a threshold is compared with.
PROBABILITY = number(least=0, most=1, what="a number in [0, 1], a probability of keeping")


class LearnedPruner(TokenPruner):
    """The TPRL policy as a pruner (eq. 16): one shot by default, or several steps down to the budget.

    Args:
        policy ([`PruningPolicy`]), autoencoder ([`TokenAutoencoder`]): the trained networks.
        num_steps (`int`, defaults to 1): steps T; after step t of a budget rho, `rho ** ((t + 1) / T)` remain.
        threshold_keep_ratio (`float`, *optional*): what a policy that is told its budget is told when there is a
            threshold instead: the fraction that the threshold keeps on average.
        **budget: see [`TokenPruner`].
    """

    def __init__(
        self,
        policy: PruningPolicy,
        autoencoder: TokenAutoencoder,
        num_steps: int = 1,
        threshold_keep_ratio: float | None = None,
        **budget,
    ):
        super().__init__(**budget)
        self.policy = policy
        self.autoencoder = autoencoder
        self.num_steps = CHECKS["num_steps"]("num_steps", num_steps)
        self.threshold_keep_ratio = CHECKS["threshold_keep_ratio"]("threshold_keep_ratio", threshold_keep_ratio)

    def logits(self, inputs: PruningInputs, codes: Tensor, keep_mask: Tensor, step: int) -> Tensor:
        """Log-odds of keeping each token at `step`, given what is still kept: float32 `[B, N]`."""
        positions = inputs.layout.positions() if self.policy.position_proj is not None else None
        similarity = read_similarity(self.policy, inputs).known_similarity
        query, words = inputs.query, inputs.query_valid
        features = self.policy.features(codes, keep_mask, query, words, step, positions, inputs.keep_ratio, similarity)
        return self.policy.logits(features)

    def score(self, inputs: PruningInputs) -> Tensor:
        """Log-odds of the first step."""
        return self.logits(inputs, self.autoencoder.encode(inputs.tokens), inputs.valid, step=0)

    def choose(self, inputs: PruningInputs, budget: Budget) -> tuple[Tensor, Tensor]:
        """As the base does; the scores are the keep probability, plus 1 for each step that the token survived."""
        *_, last = self.trajectory(inputs, budget)
        return last

    def trajectory(self, inputs: PruningInputs, budget: Budget) -> Iterator[tuple[Tensor, Tensor]]:
        """Keep mask and scores after each of the `num_steps` steps, see [`choose`]."""
        codes = self.autoencoder.encode(inputs.tokens)
        num_visual, protected, above = inputs.num_visual, inputs.protected, budget
        keep_mask, scores = inputs.valid, torch.zeros_like(inputs.valid, dtype=torch.float32)
        if budget.threshold is None:
            share = keep_counts(num_visual, budget).float() / num_visual.clamp(min=1)
            share = share.masked_fill(num_visual == 0, 1.0)
        else:
            share = torch.full_like(num_visual, self.threshold_keep_ratio or 1.0, dtype=torch.float32)
            least = float(PROBABILITY("threshold", budget.threshold))
            probability = torch.tensor(least, dtype=torch.float32, device="cpu")
            above = replace(budget, threshold=float(probability.logit().nan_to_num()))
        inputs = read_similarity(self.policy, replace(inputs, keep_ratio=share.to(codes.device)))
        for step in range(self.num_steps):
            logits = self.logits(inputs, codes, keep_mask, step)
            scores = torch.where(keep_mask, step + logits.sigmoid(), scores)
            if budget.threshold is not None:
                keep_mask = keep_above_threshold(logits, keep_mask, above, protected)
            else:
                counts = (num_visual * share ** ((step + 1) / self.num_steps)).round().long()
                keep_mask = keep_top_k(logits, keep_mask, counts, protected)
            yield keep_mask, scores
