"""What our trainers do at the start of a training, and before each step of the optimizer."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers import TrainerCallback

if TYPE_CHECKING:
    from .pruner_trainer import PrunerTrainer


class AtTheStart(TrainerCallback):
    """Calls a function before the first step, when transformers has begun a new log; not in a resumed run."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.function()


class StopAtNaN(TrainerCallback):
    """Stops before a gradient that is not finite reaches the weights."""

    def __init__(self, trainer: "PrunerTrainer"):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                self.trainer.stop_at(f"The gradient of {name} is not finite")
