"""Configuration of the autoencoder's training."""

from dataclasses import dataclass
from typing import ClassVar

from .policy_config import PrunerTrainingConfig


@dataclass
class AutoencoderConfig(PrunerTrainingConfig):
    r"""
    Configuration of [`AutoencoderTrainer`]. How wide the codes are is a setting of [`TPRLConfig`].

    Args:
        learning_rate (`float`, defaults to 1e-4), num_train_epochs (`float`, defaults to 10),
        per_device_train_batch_size (`int`, defaults to 256):
            As in the repository of the paper's authors; the paper itself does not say. A batch counts images.
    """

    some_metrics: ClassVar[str] = "'eval_explained_variance'"

    learning_rate: float = 1e-4
    num_train_epochs: float = 10
    per_device_train_batch_size: int = 256
