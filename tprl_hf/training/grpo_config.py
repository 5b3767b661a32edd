"""Configuration of GRPO."""

from dataclasses import dataclass

from .ppo_config import TPRLPPOConfig


@dataclass
class TPRLGRPOConfig(TPRLPPOConfig):
    r"""
    Configuration of [`TPRLGRPOTrainer`]: that of PPO with other defaults.

    Args:
        per_device_train_batch_size (`int`, defaults to 8), num_rollouts (`int`, defaults to 8):
            Questions in a buffer, and the group of each.
        advantages (`str`, defaults to `"group"`):
            Returns standardised in their group.
        gamma (`float`, defaults to 1.0), whiten_advantages (`bool`, defaults to `False`),
        vf_coef (`float`, defaults to 0.0), entropy_coef (`float`, defaults to 0.0), kl_coef (`float`, defaults to
        0.04):
            As in GRPO: no values, no entropy, and a pull to the start.
    """

    per_device_train_batch_size: int = 8
    num_rollouts: int = 8
    advantages: str = "group"
    gamma: float = 1.0
    whiten_advantages: bool = False
    vf_coef: float = 0.0
    entropy_coef: float = 0.0
    kl_coef: float = 0.04
