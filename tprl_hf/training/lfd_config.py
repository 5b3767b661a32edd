"""Configuration of learning from demonstrations."""

from dataclasses import dataclass

from .policy_config import PolicyTrainingConfig


@dataclass
class LfDConfig(PolicyTrainingConfig):
    r"""
    Configuration of [`LfDTrainer`].

    Args:
        train_encoder (`bool`, defaults to `False`):
            Let the autoencoder's encoder follow the policy's loss. The paper freezes it; codes that need not
            reconstruct everything can be better for pruning.
        learning_rate (`float`, defaults to 5e-5), num_train_epochs (`float`, defaults to 5),
        per_device_train_batch_size (`int`, defaults to 128):
            As in the repository of the paper's authors; the paper itself does not say.
    """

    train_encoder: bool = False
    learning_rate: float = 5e-5
    num_train_epochs: float = 5
    per_device_train_batch_size: int = 128
