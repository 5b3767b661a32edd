"""Configuration of GRPO."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers.utils import logging

from tprl_hf.modeling.values import COUNT, FRACTION, Check, whole

from .rollout_config import BudgetedRolloutConfig

logger = logging.get_logger(__name__)


@dataclass
class TPRLGRPOConfig(BudgetedRolloutConfig):
    r"""
    Configuration of [`TPRLGRPOTrainer`]. Names are those of TRL's `GRPOConfig` where a thing is the same: `beta` is
    the weight of the divergence, not of efficiency. See [`RolloutConfig`] and [`BudgetedRolloutConfig`] for what the
    algorithms share.

    Args:
        per_device_train_batch_size (`int`, defaults to 8), num_generations (`int`, defaults to 8):
            Questions in a buffer, and the group of each.
        num_steps (`int`, defaults to 3):
            Steps T of a trajectory at most.
        lambda_disc (`float`, defaults to 0.5):
            Step t draws from `lambda_disc ** t * p` (eq. 14), t counted from 0.
        score_every_step (`bool`, defaults to `True`):
            Score after each step (eq. 4). Else only after the last one, which costs a third of the time: the scores of
            the steps between cancel in the first step's return, and later steps are credited with all of it too.
        scale_rewards (`"group"` or `"none"`, defaults to `"group"`):
            Advantages are the returns minus the mean of their group, over its standard deviation; or minus the mean of
            the group's other returns, as in RLOO, which is the former's numerator times `n / (n - 1)`.
        ratio (`"joint"` or `"token"`, defaults to `"joint"`):
            The clipped ratio is that of all bits of a step, or that of each bit.
        draw (`"bits"` or `"sets"`, defaults to `"bits"`):
            Draw each bit by itself, or sets of tokens without replacement: every rollout then keeps exactly as many as
            its budget says, as in TwigVLM++ (arXiv 2503.14075 v3). Sets need `rollout_keep_ratios`, `lambda_disc=1`
            and no shared budget.
        num_probes (`int`, defaults to 0):
            So many rollouts of each question are scored first, and the others only where the scores of these differ by
            `min_spread`, so that questions which teach nothing cost less. 0 scores all. Needs
            `score_every_step=False`.

    Raises:
        `ValueError`: for settings that exclude each other.
    """

    checks: ClassVar[dict[str, Check]] = {
        "num_generations": whole(2, cure="GRPO compares the rollouts of a question."),
        "num_steps": COUNT,
        "lambda_disc": FRACTION,
        "num_probes": whole(0),
    }

    per_device_train_batch_size: int = 8
    num_generations: int = 8
    num_steps: int = 3
    lambda_disc: float = 0.5
    score_every_step: bool = True
    scale_rewards: Literal["group", "none"] = "group"
    ratio: Literal["joint", "token"] = "joint"
    draw: Literal["bits", "sets"] = "bits"
    num_probes: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.draw == "sets" and (not self.rollout_keep_ratios or self.shared_budget or self.lambda_disc != 1):
            raise ValueError(
                f'draw="sets" keeps as many tokens as a budget says: set rollout_keep_ratios, shared_budget=0 and '
                f"lambda_disc=1; got {self.rollout_keep_ratios}, {self.shared_budget} and {self.lambda_disc}."
            )
        if self.rollout_keep_ratios and self.num_steps > 1 and self.lambda_disc != 1:
            logger.warning(
                f"lambda_disc={self.lambda_disc} draws fewer tokens in later steps than rollout_keep_ratios ask for, "
                "whatever the policy says, so that these steps teach little: set lambda_disc=1, or num_steps=1."
            )
        if self.num_probes and not 2 <= self.num_probes < self.num_generations:
            raise ValueError(
                f"num_probes must be 0, or at least 2 and less than num_generations={self.num_generations}; "
                f"got {self.num_probes}."
            )
        if self.num_probes and (self.score_every_step or self.min_spread == 0):
            raise ValueError(
                f"num_probes={self.num_probes} saves the scores of questions that min_spread leaves out: set "
                f"score_every_step=False and min_spread above 0; got {self.score_every_step} and {self.min_spread}."
            )
