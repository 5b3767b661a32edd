"""Training and saving in a process of its own that is cut off: killed, or out of disk, at a chosen moment.

Faults are set in the child by this module alone. Children are forked from a server that has imported all it needs.
"""

import errno
import io
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.cli import processes
from tprl_hf.cli.main import main
from tprl_hf.cli.stop_signals import SaveAndStop
from tprl_hf.modeling import checkpoint_tprl
from tprl_hf.training.saved_masks import SavedMasks
from tprl_hf.training.training_lock import alone_in

# how often each stage is killed; docs/reliability.md has the figures of 40, and of 12 for other faults
FEW = {"autoencoder": 6, "demonstrations": 5, "lfd": 6, "ppo": 2}
FEW |= dict.fromkeys(("grpo", "mapo", "counterfactual", "noise_gate", "tune"), 1)
BY_DEFAULT = {
    "autoencoder": {"denied"},
    "demonstrations": {"full", "SIGTERM", "missing"},
    "lfd": {"full", "denied", "SIGTERM", "SIGINT"},
    "ppo": {"full", "SIGINT"},
    "grpo": {"denied"},
    "mapo": {"full"},
    "counterfactual": {"denied"},
    "noise_gate": {"full", "zeroed"},
    "tune": {"full", "SIGTERM", "truncated"},
}
LIMIT = 300
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def number_of_faults(stage: str) -> int:
    return int(os.environ.get("TPRL_TEST_FAULTS", FEW[stage]))


def number_of_others(stage: str, fault: str) -> int:
    """How often a stage meets a full disk, missing rights, a signal or a damaged file: by default one of these."""
    if "TPRL_TEST_FAULTS" in os.environ:
        return max(int(os.environ["TPRL_TEST_FAULTS"]) // 3, 1)
    return int(fault in BY_DEFAULT[stage])


@dataclass
class Fault:
    """
    What happens to a child.

    Args:
        what (`str`): `count` nothing, `kill` SIGKILL, `full` no more room, `denied` no rights, or a signal's name.
        where (`str`): the directory whose changes are counted.
        at (`float`): the number of the change; in seconds with `timed`; of a signal, the training step.
        timed (`bool`): whether `at` is a time.
    """

    what: str
    where: str
    at: float = 0
    timed: bool = False


class Changes:
    """Counts what a process does to a directory, and strikes at one of these moments."""

    def __init__(self, fault: Fault):
        self.fault, self.count = fault, 0

    def __call__(self) -> None:
        self.count += 1
        if self.fault.what == "denied" and self.count >= self.fault.at:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.fault.where)
        if self.count != self.fault.at or self.fault.timed:
            return
        if self.fault.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault.what == "full":  # for files; the pipe of the output is none
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def watch(self, event: str, arguments: tuple) -> None:
        """An audit hook: Python calls it before each change to a file that is made from Python."""
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, (str, bytes)) or not (flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
        elif event not in CHANGES:
            return
        if os.fsdecode(arguments[0]).startswith(self.fault.where):
            self()

    def before_and_within(self, save: Any, as_bytes: Any) -> Any:
        """`save`, which writes without Python: a moment before it, and one with half of the file written."""

        def watched(what, path, *args, **kwargs):
            if str(path).startswith(self.fault.where):
                self()
                if self.fault.what == "kill" and self.count + 1 == self.fault.at:
                    half = as_bytes(what)
                    Path(path).write_bytes(half[: len(half) // 2])
                self()
            return save(what, path, *args, **kwargs)

        return watched


def torch_bytes(what: Any) -> bytes:
    buffer = io.BytesIO()
    save_with_torch(what, buffer)
    return buffer.getvalue()


save_with_torch = torch.save


def send_at_step(fault: Fault) -> None:
    """A signal within a training step, or when a batch of demonstrations is noted."""
    begin, add = SaveAndStop.on_step_begin, SavedMasks.add

    def on_step_begin(self, args, state, control, **kwargs):
        begin(self, args, state, control, **kwargs)
        if state.global_step + 1 == fault.at:
            os.kill(os.getpid(), getattr(signal, fault.what))

    def add_masks(self, first, masks):
        add(self, first, masks)
        if len(self.found) >= fault.at:
            os.kill(os.getpid(), getattr(signal, fault.what))

    SaveAndStop.on_step_begin, SavedMasks.add = on_step_begin, add_masks


def child(function: Any, arguments: list, fault: Fault, connection: Any) -> None:
    output = connection.fileno()
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    changes = Changes(fault)
    if fault.timed:
        timer = threading.Timer(fault.at, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    elif fault.what.startswith("SIG"):
        send_at_step(fault)
    torch.save = changes.before_and_within(torch.save, torch_bytes)
    checkpoint_tprl.save_file = changes.before_and_within(checkpoint_tprl.save_file, safetensors.torch.save)
    sys.addaudithook(changes.watch)
    code = function(*arguments)
    print(f"changes: {changes.count}", flush=True)
    sys.stderr.flush()
    os._exit(code)


def save_another(source: str, directory: str) -> int:
    """Saves the model in `source` over the one in `directory`."""
    model = TPRLForConditionalGeneration.from_pretrained(source)
    try:
        model.save_pretrained(directory)
    except OSError as error:
        print(error, flush=True)
        return 2
    return 0


def show_life(folder: str) -> int:
    """What the first of two processes does, for a minute."""
    os.environ.update(RANK="0", WORLD_SIZE="2")
    processes.PATIENCE = 3.0
    with processes.signs_of_life(Path(folder)):
        print("alive", flush=True)
        time.sleep(60)
    return 0


def hold_lock(folder: str) -> int:
    """What another training does, for a minute."""
    with alone_in(Path(folder)):
        print("held", flush=True)
        time.sleep(60)
    return 0


@dataclass
class Ended:
    code: int
    output: str

    @property
    def changes(self) -> int:
        return int(self.output.rsplit("changes: ", 1)[1].split()[0])


server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["tests.training.cut_off"])


def start(function: Any, arguments: list, fault: Fault) -> tuple[Any, Any]:
    """`function` in a new process, which is returned with its output as a binary file."""
    receiver, sender = os.pipe()
    theirs = Connection(sender)
    process = server.Process(target=child, args=(function, arguments, fault, theirs))
    process.start()
    theirs.close()
    return process, open(receiver, "rb")


def run(function: Any, arguments: list, fault: Fault) -> Ended:
    """`function` in a new process, until it ends."""
    process, pipe = start(function, arguments, fault)
    with pipe:
        output = pipe.read().decode()
    process.join(LIMIT)
    assert process.exitcode is not None
    return Ended(process.exitcode, output)


def train(arguments: list[str], fault: Fault) -> Ended:
    """`tprl train`."""
    return run(main, [["train", *arguments]], fault)
