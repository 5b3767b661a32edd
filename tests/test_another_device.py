"""Nothing assumes that tensors lie on the CPU: the package on a GPU where there is one, else on a pretended device."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "part",
    [
        "control",
        "families",
        "projector_elsewhere",
        "default_device",
        "steps",
        "commands",
        "more_commands",
        "training",
        "more_training",
        "train_command",
    ],
)
def test_on_another_device(part):
    command = [sys.executable, "-m", "tests.stand_ins.on_another_device", part]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-4000:]
