"""The command that compares rollouts with the naive loop, on a few questions."""

import json
import sys

import pytest

import tprl_hf
from tprl_hf.evaluation import presets, rollout_speed
from tprl_hf.evaluation.rollout_speed import FIRST, LATER, NAIVE, NAIVE_CACHED, UPDATED, report


def test_ratios_are_those_within_a_round():
    """Of the medians the first would be 2; a way is once as fast as itself."""
    found = {NAIVE: [1.0, 2.0, 10.0], NAIVE_CACHED: [2.0, 2.0, 20.0], LATER: [4.0, 3.0, 10.0]}
    tokens = {name: [30.0, 10.0, 20.0] for name in found}
    table = {row["way"]: row for row in report(found, tokens)}
    assert all(row["llm_tokens_per_rollout"] == 20 for row in table.values())
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


def test_a_shape_with_random_weights_reads_prompts_of_the_wanted_length(tmp_path, monkeypatch, capsys):
    """576 visual tokens and about 40 of text: the naive loop reads the prompt once and three times a part of it."""
    text = {**presets.VICUNA_7B, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {**presets.CLIP_L_336, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    tiny = presets.Preset("llava", {"vision_config": {**vision, "num_attention_heads": 2}, "text_config": text}, 1, "")
    monkeypatch.setitem(presets.PRESETS, "tiny", tiny)
    words = [
        str(tmp_path / "speed.json"),
        "--model",
        "tiny",
        "--text-tokens",
        "40",
        "--questions",
        "4",
        "--rounds",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["rollout_speed", *words])
    rollout_speed.main()
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["dtype"] == "torch.bfloat16" and found["command"].endswith(" ".join(words))
    tokens = {row["way"]: row["llm_tokens_per_rollout"] for row in found["ways"]}
    assert tokens[FIRST] > 576 + 4 * 35 and tokens[FIRST] > tokens[LATER] > 3 * 35
    assert tokens[UPDATED] == tokens[LATER] and tokens[NAIVE] == tokens[NAIVE_CACHED]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["rollout_speed", "--model", "qwen2-vl-2b"])
    with pytest.raises(ValueError, match="qwen2-vl-2b is not a LLaVA: name a LLaVA-shaped preset"):
        rollout_speed.main()
