"""What `tprl count` says is what `prune` does."""

import json

import pytest

from tests.families.stock_processors import save
from tests.families.tiny_models import build
from tests.stand_ins.noise import noise
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.cli.main import main
from tprl_hf.evaluation.answers import chat_inputs
from tprl_hf.loading import load_model
from tprl_hf.pictures import open_picture


@pytest.fixture
def pictures(tmp_path):
    for name, size in (("wide", (60, 30)), ("small", (30, 30))):
        noise(size).save(tmp_path / f"{name}.png")
    return [str(tmp_path / "wide.png"), str(tmp_path / "small.png")]


def of(pictures):
    return [word for path in pictures for word in ("--image", path)]


def counted(capsys, *words):
    assert main(["count", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("budget", [{}, {"num_keep": 5}, {"keep_ratio": 0.5}, {"threshold": 0.5}, {"prune": False}])
def test_the_embedded_model(capsys, pictures, budget):
    words = ["--no-prune"] if "prune" in budget else [f"--{n.replace('_', '-')}={v}" for n, v in budget.items()]
    found = counted(capsys, *of(pictures), "--question", "is there a red circle ?", *words)["prompt"]
    model, processor = load_model()
    images = [open_picture(path) for path in pictures]
    inputs = chat_inputs(processor, [{"images": images, "prompt": "is there a red circle ?"}])
    plan = model.prune(**inputs, **budget)
    assert found["prompt_tokens"] == inputs["input_ids"].shape[1] and found["max_positions"] == 1024
    assert found["visual_tokens"] == int(plan.num_visual) == 288
    kept = None if "threshold" in budget else int(plan.num_kept)
    assert found["kept_tokens"] == kept
    assert found["llm_tokens"] == (None if kept is None else found["prompt_tokens"] - 288 + kept)


@pytest.mark.parametrize(
    ("own", "bounds", "kept"),
    [
        ({"keep_ratio": 0.5}, {"max_keep": 10}, 10),
        ({"keep_ratio": 0.5, "max_keep": 10}, {}, 10),
        ({"keep_ratio": 0.5, "max_keep": 20}, {"max_keep": 10}, 10),
        ({"num_keep": 2}, {"min_keep": 7}, 7),
        ({"keep_ratio": 0.5}, {}, 72),
    ],
)
def test_bounds_of_the_pruner_and_of_the_config_both_hold(capsys, pictures, tmp_path, own, bounds, kept):
    embedded, processor = load_model()
    model = TPRLForConditionalGeneration.from_base_model(embedded.lvlm, **bounds)
    model.set_pruner("uniform", **own)
    model.save_pretrained(tmp_path, save_base_model=True)
    processor.save_pretrained(tmp_path)
    images = [open_picture(pictures[1])]
    inputs = chat_inputs(processor, [{"images": images, "prompt": "is there a red circle ?"}])
    assert int(model.prune(**inputs).num_kept) == kept
    assert counted(capsys, "--image", pictures[1], str(tmp_path))["images"][0]["kept_tokens"] == kept


def test_a_checkpoint_without_a_budget_keeps_a_third_as_the_commands_do(capsys, pictures, tmp_path):
    embedded, processor = load_model()
    TPRLForConditionalGeneration.from_base_model(embedded.lvlm).save_pretrained(tmp_path, save_base_model=True)
    processor.save_pretrained(tmp_path)
    words = ["--image", pictures[1], str(tmp_path)]
    assert [counted(capsys, *words, *more)["images"][0]["kept_tokens"] for more in ((), ("--no-prune",))] == [48, 144]


def test_a_family_with_tokens_by_size_and_without_weights(capsys, pictures, tmp_path):
    build("llava_next").config.save_pretrained(tmp_path / "base")
    save("llava_next", tmp_path / "base")
    found = counted(capsys, *of(pictures), str(tmp_path / "base"))
    wide, small = found["images"]
    assert wide["visual_tokens"] > small["visual_tokens"] > 0
    assert found["prompt"]["visual_tokens"] == wide["visual_tokens"] + small["visual_tokens"]
    assert wide["kept_tokens"] == round(wide["visual_tokens"] / 3)


def test_in_words(capsys, pictures):
    assert main(["count", *of(pictures), "--threshold", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{pictures[0]}: 60 x 30 pixels, 144 visual tokens, those above the threshold kept"
    assert main(["count", *of(pictures), "--num-keep", "10"]) == 0
    assert "288 visual tokens, 10 kept; the LLM reads" in capsys.readouterr().out.splitlines()[-1]
    assert main(["count", "--image", "none.png"]) == 2
    assert "There is no image file none.png" in capsys.readouterr().err
