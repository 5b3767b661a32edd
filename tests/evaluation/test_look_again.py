"""The comparison of second looks with fixed budgets, on a few questions of the embedded model."""

import json

import pytest

from tprl_hf.evaluation import look_again


def test_it_writes_what_was_read_beside_a_fixed_budget(tmp_path, capsys):
    path = tmp_path / "found.json"
    look_again.main([str(path), "--points", "1/18,1/3,1/6", "--num-samples", "30", "--num-validation", "40"])
    found = json.loads(path.read_text())
    (row,) = found["rows"]
    assert row["budgets"] == "1/18,1/3,1/6" and 0 < row["below"] < 1
    assert row["tokens_read"] == pytest.approx(8 + 48 * row["escalated"])
    assert row["tokens_read"] <= row["fixed_tokens"] < row["tokens_read"] + 1
    expected = row["accuracy"]["value"] - row["fixed_accuracy"]["value"]
    assert row["difference"]["value"] == pytest.approx(expected) and row["difference"]["count"] == 30
    assert found["none"]["value"] > 80
    assert "--num-samples 30" in found["command"] and str(tmp_path) not in found["command"]
    out = capsys.readouterr().out
    assert "| 1/18,1/3,1/6 |" in out and "Unpruned: " in out
