"""What must always hold, for each family: pruning removes, and removes nothing else."""

import pytest
import torch

from tests.families.tiny_models import FAMILIES, build, collate, sample
from tests.reference import caught_by_decoder, delete_by_hand
from tprl_hf.modeling import TPRLForConditionalGeneration

TOLERANCE = 2e-5
BUDGETS = [{"keep_ratio": 1 / 3}, {"num_keep": 3}, {"threshold": 0.5}]


def wrap(family, **settings):
    base = build(family)
    return base, TPRLForConditionalGeneration.from_base_model(
        base, latent_dim=8, policy_training={"stage": "lfd"}, **settings
    ).eval()


def deviation(a, b):
    return (a.double() - b.double()).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keep_all_equals_base(family):
    base, model = wrap(family)
    inputs = collate(family, [sample(family, 1, 1), sample(family, 2, 2), sample(family, 0, 3)])
    attended = inputs["attention_mask"].bool()
    expected = base(**inputs).logits[attended]
    assert deviation(model(**inputs, keep_ratio=1.0).logits[attended], expected) <= TOLERANCE
    tokens = base.generate(**inputs, max_new_tokens=4)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, keep_ratio=1.0), tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("position_ids", ["original", "contiguous"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pruned_equals_deletion_by_hand(family, position_ids, attention):
    base, model = wrap(family, position_ids=position_ids)
    if attention == "eager":  # otherwise the base model's own choice, sdpa where it has it
        model.set_attn_implementation("eager")
    inputs = collate(family, [sample(family, 2, 4)])
    keep_mask = model.prune(**inputs, keep_ratio=0.4).keep_mask
    expected, tokens = delete_by_hand(base, inputs, keep_mask, position_ids, new_tokens=4)
    output = model(**inputs, keep_mask=keep_mask, compact=True)
    assert output.logits.shape == expected.shape
    assert deviation(output.logits, expected) <= TOLERANCE
    placed = model(**inputs, keep_mask=keep_mask).logits  # in the prompt's columns
    assert placed.shape[:2] == inputs["input_ids"].shape
    assert torch.equal(placed[:, output.columns[0]], output.logits)
    for use_cache in (True,) if FAMILIES[family].uncached_differs else (True, False):
        made = model.generate(**inputs, keep_mask=keep_mask, max_new_tokens=4, use_cache=use_cache)
        assert made[0, -4:].tolist() == tokens


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_unpruned_output_has_all_that_the_base_model_gives(family):
    base, model = wrap(family)
    inputs = collate(family, [sample(family, 2, 4)])
    expected, output = base(**inputs, return_dict=True), model(**inputs, prune=False)
    assert expected.keys() == output.keys()
    if "image_hidden_states" in expected:
        assert torch.equal(output.image_hidden_states, expected.image_hidden_states)


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: next(iter(b)))
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_batch_equals_singles(family, budget):
    _, model = wrap(family)
    samples = [sample(family, 1, 1, text=3), sample(family, 2, 2), sample(family, 0, 3, text=9)]
    batches = {side: collate(family, samples, side) for side in ("left", "right")}
    plan = model.prune(**batches["left"], **budget)
    assert torch.equal(model.prune(**batches["right"], **budget).keep_mask, plan.keep_mask)
    together = {side: model(**batch, **budget, compact=True).logits for side, batch in batches.items()}
    tokens = {side: model.generate(**batch, **budget, max_new_tokens=4) for side, batch in batches.items()}
    keep_masks = plan.keep_mask.split(plan.num_visual.tolist())
    for row, one in enumerate(samples):
        alone = collate(family, [one])
        assert torch.equal(model.prune(**alone, **budget).keep_mask, keep_masks[row])
        logits = model(**alone, **budget, compact=True).logits[0]
        made = model.generate(**alone, **budget, max_new_tokens=4)[0, -4:]
        for side in batches:
            assert deviation(together[side][row, -len(logits) :], logits) <= TOLERANCE
            assert torch.equal(tokens[side][row, -4:], made)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_equals_loaded(family, tmp_path):
    base, model = wrap(family)
    inputs = collate(family, [sample(family, 2, 5)])
    expected = model(**inputs, keep_ratio=0.5)
    base.save_pretrained(tmp_path / "base")
    model.config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "policy")
    model.save_pretrained(tmp_path / "merged", save_base_model=True)
    for name in ("policy", "merged"):
        loaded = TPRLForConditionalGeneration.from_pretrained(tmp_path / name)
        output = loaded(**inputs, keep_ratio=0.5)
        assert torch.equal(output.keep_mask, expected.keep_mask)
        assert deviation(output.logits, expected.logits) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_returned_sequences_begin_with_the_original_prompt(family):
    _, model = wrap(family)
    for side in ("left", "right"):
        inputs = collate(family, [sample(family, 1, 6), sample(family, 2, 7)], side)
        made = model.generate(**inputs, keep_ratio=0.3, max_new_tokens=3)
        length = inputs["input_ids"].shape[1]
        assert made.shape == (2, length + 3)
        assert torch.equal(made[:, :length], inputs["input_ids"])


@pytest.mark.parametrize("family", ["paligemma", "qwen3_vl"])
@torch.no_grad()
def test_a_direct_forward_counts_positions_as_the_base_does(family):
    """A shift of all positions would not be seen in the logits, but in a cache that another call goes on from."""
    base, model = wrap(family)
    inputs = collate(family, [sample(family, 2, 4)])
    expected = caught_by_decoder(base, inputs)["position_ids"]
    found = caught_by_decoder(base, {**inputs, "keep_ratio": 1.0}, call=model)["position_ids"]
    assert torch.equal(found[-expected.shape[0] :], expected)
