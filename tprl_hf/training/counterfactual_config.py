"""Configuration of counterfactual credit."""

from dataclasses import dataclass, field
from typing import ClassVar

from tprl_hf.modeling.values import Check, whole

from .rollout_config import BudgetedRolloutConfig, Score


@dataclass
class CounterfactualConfig(BudgetedRolloutConfig):
    r"""
    Configuration of [`CounterfactualTrainer`]. See [`RolloutConfig`] and [`BudgetedRolloutConfig`] for
    what the algorithms share.

    Args:
        rollout_keep_ratios (`list[float]`, defaults to 1/3, 2/9, 1/9 and 1/18), shared_budget (`float`, defaults to
        0.25), efficiency_coef (`float`, defaults to 0.0):
            Masks are drawn at budgets, so that nothing is paid for small ones. Without budgets only bits that are
            flipped are paid for, so a policy hardly learns to keep less.
        score (`str`, defaults to `"logprob"`), min_spread (`float`, defaults to 0.02):
            One flipped bit seldom changes whether an answer is correct, but how likely it is.
        num_flips (`int`, defaults to 24):
            Bits of each trajectory that are flipped, drawn by their variance `p * (1 - p)`; the others' advantages are
            0. Trajectories whose score cannot rise by `min_spread` are not flipped.
        weight_by_budget (`bool`, defaults to `True`):
            Multiply advantages by the budget that a mask was drawn at. A token matters the more the fewer there are:
            without this, small budgets decide almost alone what is learned.
        scale_advantages (`bool`, defaults to `True`):
            Divide them by their root mean square over the buffer.
        num_mini_batches (`int`, defaults to 1), num_iterations (`int`, defaults to 1), beta (`float`, defaults to
        0.005), learning_rate (`float`, defaults to 1.5e-4), num_train_epochs (`float`, defaults to 1):
            One update from each buffer, which is what the derivation is for.
    """

    checks: ClassVar[dict[str, Check]] = {"num_flips": whole(1, cure="Without a flip nothing is learned.")}

    rollout_keep_ratios: list[float] | None = field(default_factory=lambda: [1 / 3, 2 / 9, 1 / 9, 1 / 18])
    shared_budget: float = 0.25
    score: Score = "logprob"
    efficiency_coef: float = 0.0
    min_spread: float = 0.02
    num_flips: int = 24
    weight_by_budget: bool = True
    scale_advantages: bool = True
    num_mini_batches: int = 1
    num_iterations: int = 1
    beta: float = 0.005
    learning_rate: float = 1.5e-4
    num_train_epochs: float = 1

    def __post_init__(self):
        super().__post_init__()
        if self.weight_by_budget and not self.rollout_keep_ratios:
            raise ValueError("weight_by_budget=True multiplies by the budgets of rollout_keep_ratios: set these too.")
