"""Each pruner is one row; what must hold for all of them is tested on all of them."""

import pytest
import torch

from tests.families.tiny_models import build, collate, sample
from tprl_hf.modeling import Budget, TPRLForConditionalGeneration
from tprl_hf.modeling.budget import keep_counts
from tprl_hf.pruners import (
    PRUNERS,
    CDPruner,
    DivPrune,
    FastVPruner,
    LearnedPruner,
    NoPruner,
    RandomPruner,
    SetPruner,
    SparseVLMPruner,
    ToMePruner,
    UniformPruner,
    VisPruner,
)
from tprl_hf.pruners.uniform import dither_order
from tprl_hf.pruners.vispruner import remove_duplicates

pytestmark = pytest.mark.short

NAMES = [*PRUNERS, "learned", "learned-3-steps"]
FAMILY = "llava"


@pytest.fixture(scope="module")
def model():
    model = TPRLForConditionalGeneration.from_base_model(
        build(FAMILY), latent_dim=8, policy_training={"stage": "lfd"}, num_steps=1
    )
    torch.manual_seed(0)
    for weight in (*model.policy.parameters(), *model.autoencoder.parameters()):
        torch.nn.init.normal_(weight, std=0.5)
    return model.eval()


def make(name, model):
    if name in PRUNERS:
        return PRUNERS[name]()
    return LearnedPruner(model.policy, model.autoencoder, num_steps=3 if "3" in name else 1)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_budgets_are_exact_per_sample(model, name):
    samples = [sample(FAMILY, 1, 1), sample(FAMILY, 2, 2), sample(FAMILY, 0, 3)]
    batch = collate(FAMILY, samples)
    with model.using(make(name, model)):
        for budget in ({"keep_ratio": 1 / 3}, {"keep_ratio": 0.01}, {"num_keep": 7}, {"keep_ratio": 1.0}):
            plan = model.prune(**batch, **budget)
            assert plan.num_kept.tolist() == keep_counts(plan.num_visual, Budget(**budget)).tolist()
            assert plan.keep_mask.dtype == torch.bool
            assert plan.keep_mask.sum() == plan.num_kept.sum()
            for bits, scores in zip(
                plan.keep_mask.split(plan.num_visual.tolist()),
                plan.scores.split(plan.num_visual.tolist()),
                strict=True,
            ):
                if 0 < bits.sum() < len(bits):
                    assert scores[bits].min() >= scores[~bits].max()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_no_batch_mate_matters(model, name):
    samples = [sample(FAMILY, 1, 1, text=3), sample(FAMILY, 2, 2), sample(FAMILY, 1, 5, text=9)]
    with model.using(make(name, model)):
        for side in ("left", "right"):
            plan = model.prune(**collate(FAMILY, samples, side), keep_ratio=0.4)
            parts = plan.keep_mask.split(plan.num_visual.tolist())
            for one, part in zip(samples, parts, strict=True):
                assert torch.equal(model.prune(**collate(FAMILY, [one]), keep_ratio=0.4).keep_mask, part)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_is_switched_on_is_switched_off(model, name):
    batch = collate(FAMILY, [sample(FAMILY, 1, 1)])
    before = model.prune(**batch, num_keep=5)
    pruner = make(name, model)
    with model.using(pruner) as same:
        assert same is model
        assert model.pruner is pruner
        with model.using(NoPruner()):
            assert model.prune(**batch).keep_mask.all()
        assert model.pruner is pruner
    assert torch.equal(model.prune(**batch, num_keep=5).keep_mask, before.keep_mask)
    with pytest.raises(RuntimeError), model.using(pruner):
        raise RuntimeError
    assert type(model.pruner) is LearnedPruner
    assert model.lvlm.config.vision_config._attn_implementation == "sdpa"


@torch.no_grad()
def test_random_differs_by_seed_and_by_sample(model):
    batch = collate(FAMILY, [sample(FAMILY, 1, 1), sample(FAMILY, 1, 2)])
    masks = []
    for seed in (0, 1):
        with model.using(RandomPruner(seed=seed, keep_ratio=0.5)):
            masks += model.prune(**batch).keep_mask.split(16)
    assert len({tuple(mask.tolist()) for mask in masks}) == 4


def test_uniform_is_a_grid():
    row, column = torch.arange(12).repeat_interleave(12), torch.arange(12).repeat(12)
    order = dither_order(row, column)
    quarter = order.argsort()[:36]
    assert {(r % 2, c % 2) for r, c in zip(row[quarter].tolist(), column[quarter].tolist(), strict=True)} == {(0, 0)}
    half = torch.zeros(144, dtype=torch.bool)
    half[order.argsort()[:72]] = True
    assert torch.equal(half, (row + column) % 2 == 0)
    third = torch.zeros(144)
    third[order.argsort()[:48]] = 1
    blocks = third.view(3, 4, 3, 4).sum((1, 3))
    assert blocks.min() >= 4
    assert blocks.max() <= 8


def test_vispruner_takes_the_attended_and_the_different(model):
    tokens = torch.eye(6)[[0, 0, 0, 1, 2, 0]]
    assert set(tokens[remove_duplicates(tokens, 3, 8)].argmax(1).tolist()) == {0, 1, 2}
    assert len(remove_duplicates(tokens, 6, 8)) == 6
    assert len(remove_duplicates(tokens, 0, 2)) == 0
    pruner = VisPruner(important_ratio=1.0, num_keep=4)
    batch = collate(FAMILY, [sample(FAMILY, 1, 1)])
    with model.using(pruner):
        features = model.encode_images(**batch)
        kept = model.prune(**batch).keep_mask
    attention = features.modalities["image"].attention
    assert attention.shape == (16,)
    assert set(attention.topk(4).indices.tolist()) == set(kept.nonzero()[:, 0].tolist())
    assert issubclass(VisPruner, SetPruner)


@torch.no_grad()
def test_attention_is_that_of_the_layer_the_llm_gets(model):
    batch = collate(FAMILY, [sample(FAMILY, 1, 1)])
    tower = model.lvlm.model.vision_tower
    tower.set_attn_implementation("eager")
    maps = tower(batch["pixel_values"], output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    with model.using(VisPruner(num_keep=2)):
        attention = model.encode_images(**batch).modalities["image"].attention
    assert torch.allclose(attention, maps[-1][0].mean(0)[0, 1:], atol=1e-6)  # vision_feature_layer is -1, [CLS] first


@pytest.mark.parametrize("family", ["llava", "internvl", "gemma3", "aya_vision", "paligemma", "idefics3"])
@torch.no_grad()
def test_attention_lies_over_the_tokens_of_other_towers(family):
    model = TPRLForConditionalGeneration.from_base_model(
        build(family), latent_dim=8, policy_training={"stage": "lfd"}
    ).eval()
    batch = collate(family, [sample(family, 2, 2)])
    with model.using(VisPruner(keep_ratio=0.5)):
        plan = model.prune(**batch)
    assert plan.num_kept == round(0.5 * int(plan.num_visual))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@torch.no_grad()
def test_separators_are_kept_by_all(family):
    model = TPRLForConditionalGeneration.from_base_model(
        build(family), latent_dim=8, policy_training={"stage": "lfd"}
    ).eval()
    batch = collate(family, [sample(family, 1, 1), sample(family, 2, 2)])
    methods = (
        RandomPruner(),
        UniformPruner(),
        DivPrune(),
        CDPruner(),
        ToMePruner(),
        *(pruner(model.lvlm) for pruner in (FastVPruner, SparseVLMPruner)),
    )
    for pruner in (*methods, model.pruner):
        with model.using(pruner):
            plan = model.prune(**batch, keep_ratio=0.5)
            assert plan.keep_mask[plan.layout.protected].all()
            assert plan.num_kept.tolist() == [round(0.5 * n) for n in plan.num_visual.tolist()]
            assert model(**batch, keep_ratio=0.5).logits.isfinite().all()
            few = model.prune(**batch, keep_ratio=0.01)
            assert few.keep_mask[few.layout.protected].all()
            assert few.num_kept.sum() == few.layout.protected.sum() + 2  # each sample keeps one token of content
