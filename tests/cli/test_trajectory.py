"""`tprl trajectory`: the policy's steps, each with what the model answers there."""

import re
from itertools import pairwise

import pytest
import torch
from PIL import Image

from tests.families.tiny_models import build
from tests.families.tiny_processor import make_processor
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.cli.main import main
from tprl_hf.evaluation.answers import chat_inputs
from tprl_hf.evaluation.trajectory import trajectory_of
from tprl_hf.modeling.budget import Budget

QUESTION = "word7 word8"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TPRLForConditionalGeneration.from_base_model(
        build("llava"), keep_ratio=0.25, num_steps=3, policy_training={"stage": "ppo"}, policy_num_heads=2
    )


def logprob_by_hand(model, inputs, answer_ids, keep_mask) -> float:
    """Mean log-probability of the answer's tokens, one forward a token."""
    found, ids = [], inputs["input_ids"]
    for token in answer_ids:
        logits = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), query_mask=torch.nn.functional.pad(
                inputs["query_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1])
            ), pixel_values=inputs["pixel_values"], keep_mask=keep_mask,
        ).logits  # fmt: skip
        found.append(logits[0, -1].float().log_softmax(-1)[token].item())
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return sum(found) / len(found)


@torch.no_grad()
@pytest.mark.parametrize("budget", [Budget(keep_ratio=0.25), Budget(num_keep=3), Budget(threshold=0.5)])
def test_the_last_state_is_that_of_generate_and_each_is_scored(model, image_file, budget):
    processor = make_processor()
    sample = {"images": [Image.open(image_file).convert("RGB")], "prompt": QUESTION, "answer": "word11 word12"}
    steps = trajectory_of(model, processor, sample, budget, max_new_tokens=4)
    inputs = chat_inputs(processor, [sample])
    given = {name: value for name in ("keep_ratio", "num_keep", "threshold") if (value := getattr(budget, name))}
    plan = model.prune(**inputs, **given)
    assert steps[-1].keep_mask.equal(plan.keep_mask)
    torch.testing.assert_close(steps[-1].probs[plan.keep_mask], plan.scores[plan.keep_mask] - 2)
    assert len(steps) == 4 and steps[0].num_kept == 16 and steps[0].keep_mask.all()
    answer_ids = [*processor.tokenizer("word11 word12", add_special_tokens=False).input_ids]
    answer_ids.append(processor.tokenizer.eos_token_id)
    for before, after in pairwise(steps):
        assert not (after.keep_mask & ~before.keep_mask).any()
    for step in steps:
        sequences = model.generate(**inputs, keep_mask=step.keep_mask, do_sample=False, max_new_tokens=4)
        text = processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert step.answer == text and step.num_kept == int(step.keep_mask.sum())
        assert step.score == pytest.approx(logprob_by_hand(model, inputs, answer_ids, step.keep_mask), abs=1e-4)


def test_the_command_writes_table_and_pictures(model, image_file, tmp_path, capsys):
    path = tmp_path / "model"
    model.save_pretrained(path, save_base_model=True)
    make_processor().save_pretrained(path)
    words = ["trajectory", str(image_file), QUESTION, str(path), "--num-keep", "4", "--max-new-tokens", "3"]
    assert main([*words, "--output-dir", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out.strip()
    assert re.findall(r"\d+ of 16", table) == ["16 of 16", "10 of 16", "6 of 16", "4 of 16"]
    assert (tmp_path / "out" / "kept_tokens.png").stat().st_size > 1000
    assert "t = 3: 4 kept" in (tmp_path / "out" / "kept_tokens.html").read_text()

    assert main([*words, "--steps", "1", "--output-dir", str(tmp_path / "out")]) == 0
    assert re.findall(r"\d+ of 16", capsys.readouterr().out) == ["16 of 16", "4 of 16"]


def test_what_cannot_be_drawn_is_refused(base_checkpoint, image_file, capsys):
    words = ["trajectory", str(image_file), QUESTION, str(base_checkpoint)]
    assert main(words) == 2
    assert "policy has not been trained" in capsys.readouterr().err
    assert main([*words, "--no-prune"]) == 2
    assert "--no-prune leaves no steps to draw" in capsys.readouterr().err
