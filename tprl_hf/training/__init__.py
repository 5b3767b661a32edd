"""Training: config and trainer in pairs.

The names are loaded when they are first used, so that importing this package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .autoencoder_config import AutoencoderConfig
    from .autoencoder_trainer import AutoencoderTrainer
    from .calibration import calibrate_threshold
    from .demonstrations import budget_steps, generate_demonstrations
    from .grpo_config import TPRLGRPOConfig
    from .grpo_trainer import TPRLGRPOTrainer
    from .lfd_config import LfDConfig
    from .lfd_trainer import LfDTrainer
    from .ppo_config import TPRLPPOConfig
    from .ppo_trainer import TPRLPPOTrainer
    from .teachers import AnswerTeacher, GradientTeacher, LeaveOutTeacher

_MODULE_OF = {
    "AutoencoderConfig": "autoencoder_config",
    "AutoencoderTrainer": "autoencoder_trainer",
    "generate_demonstrations": "demonstrations",
    "budget_steps": "demonstrations",
    "AnswerTeacher": "teachers",
    "GradientTeacher": "teachers",
    "LeaveOutTeacher": "teachers",
    "LfDConfig": "lfd_config",
    "LfDTrainer": "lfd_trainer",
    "TPRLPPOConfig": "ppo_config",
    "TPRLPPOTrainer": "ppo_trainer",
    "TPRLGRPOConfig": "grpo_config",
    "TPRLGRPOTrainer": "grpo_trainer",
    "calibrate_threshold": "calibration",
}

__all__ = [
    "AutoencoderConfig",
    "AutoencoderTrainer",
    "generate_demonstrations",
    "budget_steps",
    "AnswerTeacher",
    "GradientTeacher",
    "LeaveOutTeacher",
    "LfDConfig",
    "LfDTrainer",
    "TPRLPPOConfig",
    "TPRLPPOTrainer",
    "TPRLGRPOConfig",
    "TPRLGRPOTrainer",
    "calibrate_threshold",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tprl_hf.training' has no attribute '{name}'")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
