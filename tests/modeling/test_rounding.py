"""What rounding of a base model in bfloat16 or float16 can do to keep masks, and what it cannot."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.families.tiny_models import build, collate, sample
from tests.families.tiny_processor import make_processor
from tests.training.conftest import make_dataset
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.evaluation.compare_dtypes import Choice, as_markdown, compare_choices, compare_dtypes
from tprl_hf.evaluation.compare_dtypes import main as compare_dtypes_command
from tprl_hf.modeling import Budget
from tprl_hf.modeling.keep_mask import keep_above_threshold, keep_top_k
from tprl_hf.pruners import PRUNERS
from tprl_hf.pruners.llm_attention import LLMAttentionPruner

POLICY = {"latent_dim": 8, "policy_num_heads": 4, "policy_dim": 16, "policy_training": {"stage": "lfd"}}
NAMES = [*PRUNERS, "learned"]


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def model(request):
    torch.manual_seed(0)
    model = TPRLForConditionalGeneration.from_base_model(build("llava"), **POLICY)
    for weight in (*model.policy.parameters(), *model.autoencoder.parameters()):
        torch.nn.init.normal_(weight, std=0.5)
    return model.to(request.param).eval()


def pruner_of(name, model):
    return model.learned_pruner() if name == "learned" else PRUNERS[name]()


def test_scores_that_are_off_by_little_move_only_tokens_at_the_cut():
    """Brute force: 3,000 rows of scores, each exact and rounded."""
    generator = torch.Generator().manual_seed(0)
    num_moved = num_safe = 0
    for width in (1e-3, 0.1, 1.0):
        exact = torch.randn(1000, 24, generator=generator, dtype=torch.float64)
        error = (2 * torch.rand(exact.shape, generator=generator, dtype=torch.float64) - 1) * width
        valid = torch.rand(exact.shape, generator=generator) < 0.9
        counts = torch.minimum(torch.full((1000,), 8), valid.sum(1) - 1)
        first, second = (keep_top_k(scores, valid, counts) for scores in (exact, exact + error))
        for row in range(1000):
            largest = float(error[row, valid[row]].abs().max())
            pairs = [
                Choice(mask[row, valid[row]], scores[row, valid[row]])
                for mask, scores in ((first, exact), (second, exact + error))
            ]
            found = compare_choices([pairs[1]], [pairs[0]])
            assert found["farthest"] <= 2 + 1e-6 and found["rounding"][2] == pytest.approx(largest)
            if found["could_differ"] == 0:
                assert found["equal"] == 1
                num_safe += 1
            num_moved += found["equal"] == 0
    assert num_moved > 500 and num_safe > 500


def test_comparing_choices_counts_by_hand():
    masks = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]).bool()
    found = compare_choices([Choice(masks[0]), Choice(masks[0])], [Choice(masks[0]), Choice(masks[1])])
    assert found == {"equal": 0.5, "jaccard": pytest.approx((1 + 1 / 3) / 2), "bits": 1.0}
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [3.0, 2.0, 1.5, 0.0]])
    found = compare_choices([Choice(masks[0], logits[1])], [Choice(masks[1], logits[0])])
    assert found["rounding"] == [1.0, 1.0, 1.0] and found["gap"] == [1.0, 1.0, 1.0]
    assert found["could_differ"] == 1 and found["farthest"] == 1.0


@pytest.mark.parametrize("odd", [torch.nan, -torch.inf, torch.inf])
def test_scores_that_are_not_finite_have_a_meaning(odd):
    """700 random cases: the budget is met, separators stay, NaN and -inf come last and inf first, in their order."""
    rng = random.Random(0)
    for _ in range(700):
        length = rng.randint(1, 9)
        scores = torch.tensor([[rng.choice([odd, odd, 0.0, 1.0]) for _ in range(length)]])
        valid = torch.tensor([[rng.random() < 0.7 for _ in range(length)]])
        protected = valid & torch.tensor([[rng.random() < 0.2 for _ in range(length)]])
        count = rng.randint(0, int(valid.sum()))
        free = [i for i in range(length) if valid[0, i] and not protected[0, i]]
        least = int(protected.sum()) + bool(free) if count else 0
        kept = keep_top_k(scores, valid, torch.tensor([count]), protected)[0]
        assert kept.sum() == max(count, least) and not (kept & ~valid[0]).any()
        values = np.nan_to_num(scores[0].numpy(), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        best = sorted(free, key=lambda i: (-values[i], i))[: int(kept.sum()) - int(protected.sum())] if count else []
        expected = {*best, *(protected[0].nonzero()[:, 0].tolist() if count else [])}
        assert set(kept.nonzero()[:, 0].tolist()) == expected
    above = keep_above_threshold(torch.tensor([[0.9, odd, 0.1]]), torch.ones(1, 3).bool(), Budget(threshold=0.5))
    assert above.tolist() == [[True, odd == torch.inf, False]]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_pruners_compute_in_float32(model, name):
    """From the features on: the same features in float32 give the same choice."""
    pruner = pruner_of(name, model)
    if isinstance(pruner, LLMAttentionPruner):
        pytest.skip("it runs layers of the base model, in the base model's dtype")
    batch = collate("llava", [sample("llava", 1, 1), sample("llava", 2, 2)])
    with model.using(pruner):
        seen = model.pruning_inputs(**batch)
    assert seen.tokens.dtype == model.dtype != torch.float32
    wide = replace(seen, tokens=seen.tokens.float(), query=seen.query.float())
    for ratio in (1 / 3, 1 / 9):
        masks, scores = pruner.choose(seen, Budget(keep_ratio=ratio))
        assert scores.dtype == torch.float32 and torch.equal(masks, pruner.choose(wide, Budget(keep_ratio=ratio))[0])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_autocast_does_not_reach_a_choice(name):
    """Features of the tower are those of autocast; what is kept of the same features is the same without it."""
    torch.manual_seed(0)
    model = TPRLForConditionalGeneration.from_base_model(build("llava"), **POLICY).eval()
    for weight in (*model.policy.parameters(), *model.autoencoder.parameters()):
        torch.nn.init.normal_(weight, std=0.5)
    batch = collate("llava", [sample("llava", 1, 1), sample("llava", 2, 2)])
    with model.using(pruner_of(name, model)):
        with torch.autocast("cpu", torch.bfloat16):
            features = model.encode_images(**batch)
        bare = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        expected = model.prune(**bare, visual_features=features, keep_ratio=1 / 3)
        with torch.autocast("cpu", torch.bfloat16):
            found = model.prune(**bare, visual_features=features, keep_ratio=1 / 3)
    assert features.modalities["image"].rows.dtype == torch.bfloat16
    assert torch.equal(found.keep_mask, expected.keep_mask) and torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
@torch.no_grad()
def test_the_dtype_of_new_tensors_does_not_reach_a_choice(name, dtype):
    """A program may set one with `torch.set_default_dtype`; the policy is one that reads all that it can read."""
    told = {"policy_positions": True, "policy_budget": True, "policy_similarity": True, "policy_steps": 2}
    torch.manual_seed(0)
    model = TPRLForConditionalGeneration.from_base_model(build("llava"), **POLICY, **told, num_steps=2).eval()
    for weight in (*model.policy.parameters(), *model.autoencoder.parameters()):
        torch.nn.init.normal_(weight, std=0.5)
    batch = collate("llava", [sample("llava", 1, 1), sample("llava", 2, 2)])
    with model.using(pruner_of(name, model)):
        expected = model.prune(**batch, keep_ratio=0.3)
        torch.set_default_dtype(dtype)
        try:
            found = model.prune(**batch, keep_ratio=0.3)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(found.keep_mask, expected.keep_mask) and torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_equal_tokens_are_chosen_by_position_whatever_the_batch(model, name):
    """Of tokens that are all the same, each method takes the same ones in every row of every batch."""
    pruner = pruner_of(name, model)
    batch = collate("llava", [sample("llava", 1, 1), sample("llava", 2, 2), sample("llava", 1, 1)])
    with model.using(pruner):
        seen = model.pruning_inputs(**batch)
        same = seen.tokens[:, :1].expand_as(seen.tokens).contiguous()
        attention = None if seen.attention is None else torch.ones_like(seen.attention)
        first, _ = pruner.choose(replace(seen, tokens=same, attention=attention), Budget(keep_ratio=1 / 3))
        again, _ = pruner.choose(replace(seen, tokens=same, attention=attention), Budget(keep_ratio=1 / 3))
    assert torch.equal(first, again) and torch.equal(first[0], first[2])


def test_the_page_has_the_table_of_the_file():
    docs = Path(__file__).parents[2] / "docs"
    found = json.loads((docs / "results" / "mosaic_llava" / "dtypes.json").read_text())
    page = (docs / "reliability.md").read_text()
    assert found["num_samples"] == 2400 and as_markdown(found["rows"]) in page
    assert found["command"].split()[2] in page
    assert max(row["masks"]["farthest"] for row in found["rows"] if "gap" in row.get("masks", {})) <= 2


def test_dtypes_are_compared_on_a_tiny_model(tmp_path):
    def load(dtype):
        torch.manual_seed(0)
        model = TPRLForConditionalGeneration.from_base_model(build("llava"), **POLICY)
        model.generation_config.eos_token_id = 2
        return model.to(dtype).eval(), make_processor()

    rows = compare_dtypes(load, make_dataset(), ["bfloat16"], (8, 3), tmp_path / "parts")

    def load_again(dtype):
        raise AssertionError("measured again")

    assert compare_dtypes(load_again, make_dataset(), ["bfloat16"], (8, 3), tmp_path / "parts") == rows
    (tmp_path / "parts/bfloat16.pt").unlink()
    with pytest.raises(AssertionError, match="measured again"):
        compare_dtypes(load_again, make_dataset(), ["bfloat16"], (8, 3), tmp_path / "parts")
    assert [row["dtype"] for row in rows] == ["float32"] * 10 + ["bfloat16"] * 10
    for row in rows:
        assert row["accuracy"]["count"] == 8
        if row["pruner"] == "none":
            assert "masks" not in row and "batch" not in row
            continue
        assert ("masks" in row) == (row["dtype"] == "bfloat16")
        assert 0 <= row["batch"]["jaccard"] <= 1 and ("gap" in row["batch"]) == (row["pruner"] == "learned")
    alone = [row["batch"] for row in rows if row["dtype"] == "float32" and row["pruner"] != "none"]
    assert all(found["equal"] == 1 for found in alone)
    assert all(row["masks"].get("farthest", 0) <= 2 + 1e-4 for row in rows if "masks" in row)


def test_the_command_writes_rows_and_what_they_were_measured_with(tmp_path, capsys):
    compare_dtypes_command([str(tmp_path / "dtypes.json"), "--num-samples", "6", "--dtypes", "bfloat16"])
    assert [path.name for path in tmp_path.iterdir()] == ["dtypes.json"]
    found = json.loads((tmp_path / "dtypes.json").read_text())
    assert (found["num_samples"], found["seed"], len(found["rows"])) == (6, 7, 20)
    assert "--num-samples 6 --seed 7 --dtypes bfloat16" in found["command"] and found["versions"]["torch"]
    table = capsys.readouterr().out.strip()
    assert table == as_markdown(found["rows"]) and table.count("\n") == 11
