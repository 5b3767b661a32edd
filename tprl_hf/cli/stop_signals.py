"""Ctrl-C and SIGTERM while a stage is trained: the step is ended and saved where that takes seconds."""

import signal
import sys
import threading
from typing import Any

import torch
from transformers import TrainerCallback

SECONDS_TO_SAVE = 15


class Stopped(BaseException):
    """
    A signal asked this process to end. Not an `Exception`, as `KeyboardInterrupt` is none.

    Args:
        signum (`int`): which signal.
        saved (`str`, *optional*): the step that was saved because of it, and where.
    """

    def __init__(self, signum: int, saved: str | None = None):
        super().__init__(signum)
        self.signum, self.saved = signum, saved


class StopSignals:
    """
    Within it a first SIGINT or SIGTERM waits for the end of a training step and for its checkpoint, but for no longer
    than 15 seconds. Outside of training, and at a second signal, [`Stopped`] is raised at once.
    """

    def __init__(self):
        self.is_training = False
        self.received: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
                if signal.getsignal(signum) != signal.SIG_IGN:  # as under nohup
                    self.before[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *error) -> None:
        if self.before:
            signal.alarm(0)
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def handle(self, signum: int, frame: Any) -> None:
        if self.received is None and self.is_training:
            self.received = signum
            signal.alarm(SECONDS_TO_SAVE)
            name = signal.Signals(signum).name
            print(f"{name}: saving after this step. A second signal stops at once.", file=sys.stderr, flush=True)
            return
        raise Stopped(self.received or signum)


class SaveAndStop(TrainerCallback):
    """Lets a trainer end at the step at which any of its processes was told to."""

    def __init__(self, signals: StopSignals, trainer: Any):
        self.signals, self.trainer = signals, trainer
        self.stops = False

    def on_step_begin(self, args, state, control, **kwargs):
        self.signals.is_training = True

    def on_step_end(self, args, state, control, **kwargs):
        received = self.signals.received or 0
        if args.world_size > 1:  # all save the same step
            given = self.trainer.accelerator.gather(torch.tensor([received], device=args.device))
            received = int(given.max())
            self.signals.received = received or None
        if received:
            self.stops = control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if self.stops:
            saved = f"step {state.global_step} is in {args.output_dir}/checkpoint-{state.global_step}"
            raise Stopped(self.signals.received or signal.SIGTERM, saved)

    def on_train_end(self, args, state, control, **kwargs):
        self.signals.is_training = False
