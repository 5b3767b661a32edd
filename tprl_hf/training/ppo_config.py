"""Configuration of PPO."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from tprl_hf.modeling.values import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, UNIT, Check

from .rollout_config import RolloutConfig


@dataclass
class TPRLPPOConfig(RolloutConfig):
    r"""
    Configuration of [`TPRLPPOTrainer`]. The defaults are the paper's; what the paper leaves open is as in its authors'
    repository. See [`RolloutConfig`] for what the algorithms share.

    Args:
        num_steps (`int`, defaults to 3):
            Steps T of a trajectory at most.
        lambda_disc (`float`, defaults to 0.5):
            Step t draws from `lambda_disc ** t * p` (eq. 14), t counted from 0.
        score_every_step (`bool`, defaults to `True`):
            Score after each step (eq. 4). Else only after the last one, whose reward is then the whole change from the
            unpruned prompt: far fewer tokens for the LLM. Where `gamma` and `lam` are 1 the first step's return is the
            same; later steps are then credited with the whole change too.
        alpha (`float`, defaults to 1.0), beta (`float`, defaults to 0.1):
            Weights of score and efficiency in the reward (eq. 4).
        gamma (`float`, defaults to 0.99), lam (`float`, defaults to 0.95):
            Discount and trace decay (eq. 20-21).
        whiten_advantages (`bool`, defaults to `True`):
            Standardise them over the buffer. Not in the paper.
        num_ppo_epochs (`int`, defaults to 4):
            Passes over a buffer.
        ratio (`"joint"` or `"token"`, defaults to `"joint"`):
            The clipped ratio is that of all bits of a step, or that of each bit.
        cliprange (`float`, defaults to 0.2), cliprange_value (`float`, defaults to 0.2):
            Of the ratio, and of the value, whose clipping is not in the paper.
        vf_coef (`float`, defaults to 0.5), entropy_coef (`float`, defaults to 0.01):
            Weights of value loss and entropy. Entropy is the mean over bits, so that it does not grow with the image.
        critic_learning_rate (`float`, defaults to 3e-5):
            Of the value head; `learning_rate` is that of the policy with the shared attention.
    """

    checks: ClassVar[dict[str, Check]] = {
        "num_steps": COUNT,
        "lambda_disc": FRACTION,
        "alpha": NOT_NEGATIVE,
        "beta": NOT_NEGATIVE,
        "gamma": UNIT,
        "lam": UNIT,
        "num_ppo_epochs": COUNT,
        "cliprange": POSITIVE,
        "cliprange_value": POSITIVE,
        "vf_coef": NOT_NEGATIVE,
        "entropy_coef": NOT_NEGATIVE,
        "critic_learning_rate": NOT_NEGATIVE,
    }

    num_steps: int = 3
    lambda_disc: float = 0.5
    score_every_step: bool = True
    alpha: float = 1.0
    beta: float = 0.1
    gamma: float = 0.99
    lam: float = 0.95
    whiten_advantages: bool = True
    num_ppo_epochs: int = 4
    ratio: Literal["joint", "token"] = "joint"
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.5
    entropy_coef: float = 0.01
    critic_learning_rate: float = 3e-5

    @property
    def passes_per_buffer(self) -> int:
        return self.num_ppo_epochs
