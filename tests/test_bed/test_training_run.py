"""Processes that train together, and settings from the command line."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tprl_hf.test_bed.training_run import (
    average_gradients,
    config_of,
    drawn_side,
    join_processes,
    leave_processes,
    run_processes,
)


@dataclass
class Settings:
    output_dir: str
    steps: int = 3
    learning_rate: float = 1e-3


def note_gradients(rank: int, num_processes: int, folder: Path, port: int) -> None:
    """What a process has after averaging, where each had gradients and a time of its own."""
    torch.set_num_threads(1)
    join_processes(rank, num_processes, port)
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.arange(6.0).view(2, 3) * (rank + 1)
    parameters[2].grad = torch.ones(1) * rank  # the second one had no part in the loss
    value = average_gradients(parameters, 10.0 * rank)
    found = [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]
    (folder / f"{rank}.json").write_text(json.dumps([found, value]))
    leave_processes()
    assert not dist.is_initialized()


@pytest.mark.parametrize("number", [1, 2])
def test_processes_get_the_same_mean(tmp_path, number):
    run_processes(note_gradients, number, number, tmp_path)
    mean = (number + 1) / 2
    expected = [[[[0.0, mean, 2 * mean], [3 * mean, 4 * mean, 5 * mean]], None, [mean - 1]], 10 * (mean - 1)]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(number)] == [expected] * number


def test_each_field_is_an_option(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--output-dir", str(tmp_path / "new"), "--learning-rate", "0.5"])
    assert config_of(Settings, "What it does.") == Settings(str(tmp_path / "new"), 3, 0.5)
    assert (tmp_path / "new").is_dir()
    monkeypatch.setattr(sys, "argv", ["train", "--output-dir", "x", "--steps", "many"])
    with pytest.raises(SystemExit):
        config_of(Settings, "What it does.")
    assert "--steps: invalid int value: 'many'" in capsys.readouterr().err


def test_a_third_of_the_sizes_is_full_and_small_ones_are_drawn_as_often_as_large_ones():
    sides = [drawn_side(np.random.default_rng([5, step]), 4, 16) for step in range(6000)]
    assert set(sides) == set(range(4, 17))
    shares = [np.mean(part) for part in (np.equal(sides, 16), np.less(sides, 8))]
    assert shares == pytest.approx([1 / 3, 1 / 3], abs=0.02)
    assert {drawn_side(np.random.default_rng(step), 16, 16) for step in range(9)} == {16}
