"""Training: config and trainer in pairs, an algorithm a file; `stages` is the list of them.

The names are loaded when they are first used, so that importing this package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .stages import STAGES

if TYPE_CHECKING:  # for editors; at run time the table below says where a name is
    from .autoencoder_config import AutoencoderConfig as AutoencoderConfig
    from .autoencoder_trainer import AutoencoderTrainer as AutoencoderTrainer
    from .calibration import calibrate_threshold as calibrate_threshold
    from .counterfactual_config import CounterfactualConfig as CounterfactualConfig
    from .counterfactual_trainer import CounterfactualTrainer as CounterfactualTrainer
    from .demonstrations import budget_steps as budget_steps
    from .demonstrations import generate_demonstrations as generate_demonstrations
    from .escalation import calibrate_escalation as calibrate_escalation
    from .grpo_config import TPRLGRPOConfig as TPRLGRPOConfig
    from .grpo_trainer import TPRLGRPOTrainer as TPRLGRPOTrainer
    from .lfd_config import LfDConfig as LfDConfig
    from .lfd_trainer import LfDTrainer as LfDTrainer
    from .mapo_config import TPRLMAPOConfig as TPRLMAPOConfig
    from .mapo_trainer import TPRLMAPOTrainer as TPRLMAPOTrainer
    from .noise_gate_config import NoiseGateConfig as NoiseGateConfig
    from .noise_gate_trainer import NoiseGateTrainer as NoiseGateTrainer
    from .ppo_config import TPRLPPOConfig as TPRLPPOConfig
    from .ppo_trainer import TPRLPPOTrainer as TPRLPPOTrainer
    from .teachers import AnswerTeacher as AnswerTeacher
    from .teachers import BoxTeacher as BoxTeacher
    from .teachers import GradientTeacher as GradientTeacher
    from .teachers import LeaveOutTeacher as LeaveOutTeacher
    from .tuning import MixedBudgets as MixedBudgets
    from .tuning import tune_lvlm as tune_lvlm

_MODULE_OF = {
    **{stage.config: f"{name}_config" for name, stage in STAGES.items() if stage.config},
    **{stage.trainer: f"{name}_trainer" for name, stage in STAGES.items() if stage.trainer},
    "generate_demonstrations": "demonstrations",
    "budget_steps": "demonstrations",
    "AnswerTeacher": "teachers",
    "BoxTeacher": "teachers",
    "GradientTeacher": "teachers",
    "LeaveOutTeacher": "teachers",
    "calibrate_threshold": "calibration",
    "tune_lvlm": "tuning",
    "MixedBudgets": "tuning",
    "calibrate_escalation": "escalation",
}

__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tprl_hf.training' has no attribute '{name}'")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
