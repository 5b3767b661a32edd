"""Configuration of noise gates."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from tprl_hf.modeling.values import KEPT_FRACTION, Check, list_of

from .rollout_config import RolloutConfig


@dataclass
class NoiseGateConfig(RolloutConfig):
    r"""
    Configuration of [`NoiseGateTrainer`]. See [`RolloutConfig`] for what the algorithms share; `min_logprob`,
    `log_completions` and what belongs to reward functions have no effect here.

    Args:
        rollout_keep_ratios (`list[float]`, defaults to 1/3, 2/9, 1/9 and 1/18):
            Budgets, one of these for each question: its gates sum to so many tokens.
        score (`"logprob"`, `"agreement"` or `"kl"`, defaults to `"kl"`):
            What is maximised: the mean log-probability of the reference answer, or of what the LVLM itself answers
            unpruned, or minus the divergence from its unpruned next-token distributions.
        per_device_train_batch_size (`int`, defaults to 32):
            Questions of an update.
        micro_batch_size (`int`, *optional*, defaults to 16):
            Prompts that run through the LLM at once, with all their visual tokens and with gradients.
        num_mini_batches (`int`, defaults to 1), learning_rate (`float`, defaults to 1.5e-4), num_train_epochs
        (`float`, defaults to 1):
            As of [`CounterfactualConfig`].
    """

    no_checkpointing: ClassVar[str] = "transformers does so only in training mode, and the LVLM stays as it answers"
    checks: ClassVar[dict[str, Check]] = {"rollout_keep_ratios": list_of(KEPT_FRACTION, least=1)}

    rollout_keep_ratios: list[float] = field(default_factory=lambda: [1 / 3, 2 / 9, 1 / 9, 1 / 18])
    score: Literal["logprob", "agreement", "kl"] = "kl"
    per_device_train_batch_size: int = 32
    micro_batch_size: int | None = 16
    num_mini_batches: int = 1
    learning_rate: float = 1.5e-4
    num_train_epochs: float = 1

    @property
    def passes_per_buffer(self) -> int:
        return 1
