"""Configuration of MAPO."""

from dataclasses import dataclass
from typing import ClassVar

from tprl_hf.modeling.values import Check, number, whole

from .grpo_config import TPRLGRPOConfig


@dataclass
class TPRLMAPOConfig(TPRLGRPOConfig):
    r"""
    Configuration of [`TPRLMAPOTrainer`]. It has the fields of [`TPRLGRPOConfig`], but advantages are never scaled by
    the spread of a group; questions do not share a budget, because a memory belongs to a question's own; bits are
    drawn, because a memory does not know the order in which a set was drawn; and there are no probes.

    Args:
        memory_size (`int`, defaults to 8):
            Trajectories that are remembered of each question at each budget.
        memory_weight (`float`, defaults to 0.1):
            The least weight of the memory in a question's gradient, in (0, 1): the paper's alpha. Where the policy
            gives the memory a larger probability, the weight is that probability.

    Raises:
        `ValueError`: for settings that exclude each other.
    """

    checks: ClassVar[dict[str, Check]] = {
        "memory_size": whole(1, cure="Without a memory it is GRPO."),
        "memory_weight": number(above=0, below=1, what="the least share of the memory, a number in (0, 1)"),
    }

    scale_rewards: str = "none"  # type: ignore[assignment]
    memory_size: int = 8
    memory_weight: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.scale_rewards != "none":
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r}: MAPO compares remembered trajectories with new ones, whose "
                'spread they do not share. Use "none".'
            )
        if self.draw != "bits":
            raise ValueError(f'draw={self.draw!r}: MAPO remembers sets, not the order of their draw. Use "bits".')
        if self.num_probes:
            raise ValueError(f"num_probes={self.num_probes}: MAPO scores all rollouts of a question. Use 0.")
        if self.shared_budget:
            raise ValueError(
                f"shared_budget={self.shared_budget}: what MAPO remembers belongs to a question's own budget. Use 0."
            )
