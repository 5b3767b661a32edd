"""GRPO: PPO whose advantages come from a group of rollouts of one question instead of a value head."""

from .grpo_config import TPRLGRPOConfig
from .ppo_trainer import TPRLPPOTrainer


class TPRLGRPOTrainer(TPRLPPOTrainer):
    """
    Trains the policy by group-relative policy optimisation (arXiv 2402.03300): [`TPRLPPOTrainer`] with `"group"`
    advantages, no value loss and a divergence from the start. See there.
    """

    _name = "TPRL GRPO"
    args: TPRLGRPOConfig
