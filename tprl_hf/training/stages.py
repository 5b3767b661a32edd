"""The stages of training: the one list of them. Imports no torch."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Stage:
    """
    One stage of a recipe. Its classes are names that `tprl_hf.training` offers, so that the table is light to import.

    Args:
        config, trainer (`str`, *optional*): the pair of classes. Stages without them are functions: `demonstrations`
            makes data, `tune` trains the LLM with TRL's trainer.
        starts_from (`tuple[str, ...]`): the stages whose model it starts from: the first of these that a recipe has.
            Without one it starts from a new policy.
        learns_from (`str`, *optional*): the stage whose data it learns from, instead of the recipe's `data`.
        takes_rewards (`bool`): whether `reward_funcs` may be named in its section.
    """

    config: str | None = None
    trainer: str | None = None
    starts_from: tuple[str, ...] = ()
    learns_from: str | None = None
    takes_rewards: bool = False

    def classes(self) -> tuple[Any, Any]:
        """Config and trainer."""
        training = import_module("tprl_hf.training")
        assert self.config is not None and self.trainer is not None
        return getattr(training, self.config), getattr(training, self.trainer)


_RL: dict[str, Any] = {"starts_from": ("lfd", "autoencoder"), "takes_rewards": True}

# In the order in which `tprl train all` runs them. The pair of a stage NAME is in NAME_config.py and NAME_trainer.py.
STAGES: dict[str, Stage] = {
    "autoencoder": Stage("AutoencoderConfig", "AutoencoderTrainer"),
    "demonstrations": Stage(starts_from=("autoencoder",)),
    "lfd": Stage("LfDConfig", "LfDTrainer", starts_from=("autoencoder",), learns_from="demonstrations"),
    "ppo": Stage("TPRLPPOConfig", "TPRLPPOTrainer", **_RL),
    "grpo": Stage("TPRLGRPOConfig", "TPRLGRPOTrainer", **_RL),
    "mapo": Stage("TPRLMAPOConfig", "TPRLMAPOTrainer", **_RL),
    "counterfactual": Stage("CounterfactualConfig", "CounterfactualTrainer", **_RL),
    "noise_gate": Stage("NoiseGateConfig", "NoiseGateTrainer", starts_from=("lfd", "autoencoder")),
    "tune": Stage(starts_from=("counterfactual", "mapo", "grpo", "ppo", "noise_gate", "lfd")),
}


def stages_until(name: str) -> list[str]:
    """The stages that may have led to `name`, and `name`, in their order."""
    found, waiting = set(), [name]
    while waiting:
        stage = waiting.pop()
        found.add(stage)
        before = (*STAGES[stage].starts_from, STAGES[stage].learns_from)
        waiting += [one for one in before if one is not None and one not in found]
    return [stage for stage in STAGES if stage in found]
