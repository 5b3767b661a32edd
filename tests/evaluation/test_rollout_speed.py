"""The command that compares rollouts with the naive loop, on a few questions."""

import json
import sys

import pytest

import tprl_hf
from tprl_hf.evaluation import rollout_speed
from tprl_hf.evaluation.rollout_speed import FIRST, LATER, NAIVE, NAIVE_CACHED, UPDATED, report


def test_ratios_are_those_within_a_round():
    """Of the medians the first would be 2; a way is once as fast as itself."""
    found = {NAIVE: [1.0, 2.0, 10.0], NAIVE_CACHED: [2.0, 2.0, 20.0], LATER: [4.0, 3.0, 10.0]}
    table = {row["way"]: row for row in report(found)}
    assert table[LATER][f"times the {NAIVE}"] == {"median": 1.5, "lowest": 1.0, "highest": 4.0}
    for name, row in table.items():
        if f"times the {name}" in row:
            assert row[f"times the {name}"] == {"median": 1.0, "lowest": 1.0, "highest": 1.0}
        assert (row["lowest"], row["highest"]) == (min(found[name]), max(found[name]))


def test_the_command_says_what_it_measured_and_how(tmp_path, monkeypatch, capsys):
    words = [str(tmp_path / "speed.json"), "--questions", "4", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["rollout_speed", *words])
    rollout_speed.main()
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [row["way"] for row in found["ways"]] == [NAIVE, NAIVE_CACHED, FIRST, LATER, UPDATED]
    assert found["command"] == f"python -m tprl_hf.evaluation.rollout_speed {' '.join(words)}"
    said = {"unit": "rollouts in a CPU second", "dtype": "torch.float32", "questions": 4, "steps": 3, "rounds": 1}
    assert found.items() >= {**said, "version": tprl_hf.__version__}.items()
    assert out.startswith("4 questions, 3 steps, 1 rounds, torch.float32, cpu\nrollouts in a CPU second, median")
    for row in found["ways"]:
        assert row["lowest"] == row["rollouts_per_second"] == row["highest"] > 0
        assert f"{row['way']:28} {row['rollouts_per_second']:7.2f} (" in out
        ratio = row["rollouts_per_second"] / found["ways"][0]["rollouts_per_second"]
        assert row[f"times the {NAIVE}"]["median"] == pytest.approx(ratio)
