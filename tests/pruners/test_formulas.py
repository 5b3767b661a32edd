"""Each pruner against its paper's formula, written out in the slowest way."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.families.tiny_models import build, collate, sample
from tprl_hf.modeling import Budget, TPRLForConditionalGeneration
from tprl_hf.modeling.token_layout import Block, TokenLayout
from tprl_hf.modeling.token_pruner import SampleTokens
from tprl_hf.pruners import (
    CDPruner,
    FastVPruner,
    FeatureNormPruner,
    OraclePruner,
    PoolPruner,
    PruMerge,
    PruningInputs,
    QuerySimilarityPruner,
    SparseVLMPruner,
    ToMePruner,
    UniformPruner,
    VisionZip,
)
from tprl_hf.pruners.cdpruner import most_probable_set
from tprl_hf.pruners.divprune import farthest_points
from tprl_hf.pruners.pool import cells_of
from tprl_hf.pruners.sparsevlm import text_raters
from tprl_hf.pruners.tome import merge_pairs


def make_inputs(num_samples=2, height=3, width=4, dim=6, words=3, seed=0) -> PruningInputs:
    """Random tokens on a grid; the last sample lacks its last two tokens and its first word."""
    generator = torch.Generator().manual_seed(seed)
    layout = TokenLayout.from_blocks([[Block(height, width)]])
    fields = {name: value.expand(num_samples, -1).clone() for name, value in vars(layout).items()}
    valid = torch.ones(num_samples, height * width, dtype=torch.bool)
    query_valid = torch.ones(num_samples, words, dtype=torch.bool)
    valid[-1, -2:] = False
    query_valid[-1, 0] = False
    return PruningInputs(
        tokens=torch.randn(num_samples, height * width, dim, generator=generator),
        valid=valid,
        num_visual=valid.sum(1),
        layout=TokenLayout(**fields),
        protected=None,
        query=torch.randn(num_samples, words, dim, generator=generator),
        query_valid=query_valid,
        sample_keys=list(range(num_samples)),
        attention=torch.rand(num_samples, height * width, generator=generator) ** 4,
    )


def cosine(a, b) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def select(pruner, inputs, count):
    return pruner.choose(inputs, Budget(num_keep=count))[0]


def test_feature_norm_is_the_euclidean_norm():
    inputs = make_inputs()
    expected = inputs.tokens.square().sum(-1).sqrt()
    assert torch.allclose(FeatureNormPruner().score(inputs), expected)
    assert torch.allclose(FeatureNormPruner(largest=False).score(inputs), -expected)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_query_similarity_is_a_cosine_to_the_words_that_are_there(reduce):
    inputs = make_inputs()
    scores = QuerySimilarityPruner(reduce).score(inputs)
    for b, n in itertools.product(range(2), range(12)):
        cosines = [cosine(inputs.tokens[b, n], q) for q in inputs.query[b][inputs.query_valid[b]]]
        expected = max(cosines) if reduce == "max" else sum(cosines) / len(cosines)
        assert scores[b, n] == pytest.approx(expected, abs=1e-6)
    inputs.query_valid[0] = False
    assert (QuerySimilarityPruner(reduce).score(inputs)[0] == 0).all()
    inputs.query, inputs.query_valid = inputs.query[:, :0], inputs.query_valid[:, :0]
    assert (QuerySimilarityPruner(reduce).score(inputs) == 0).all()


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="'mean' or 'max'; got 'sum'"):
        QuerySimilarityPruner("sum")


def test_divprune_follows_the_greedy_of_the_max_min_problem():
    tokens = make_inputs().tokens[0]
    distance = [[1 - cosine(a, b) for b in tokens] for a in tokens]
    n = len(tokens)
    chosen = [max(range(n), key=lambda i: min(distance[i][j] for j in range(n) if j != i))]
    while len(chosen) < 7:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance[i][j] for j in chosen)))
    assert farthest_points(tokens, 7).tolist() == chosen
    assert sorted(farthest_points(tokens, n).tolist()) == list(range(n))
    assert farthest_points(tokens, 0).tolist() == []


def test_divprune_takes_no_token_twice_among_equal_ones():
    tokens = torch.eye(3)[[0, 0, 1, 1, 2, 2]]
    assert set(tokens[farthest_points(tokens, 3)].argmax(1).tolist()) == {0, 1, 2}
    assert sorted(farthest_points(tokens, 5).tolist()) == sorted(set(farthest_points(tokens, 5).tolist()))


def test_cdpruner_is_the_greedy_maximum_of_the_determinant():
    inputs = make_inputs(dim=16)
    tokens, words = inputs.tokens[0].double(), inputs.query[0].double()
    similarity = torch.tensor([sum(cosine(v, q) for q in words) / len(words) for v in tokens])
    relevance = ((similarity - similarity.min()) / (similarity.max() - similarity.min())).double()
    directions = F.normalize(tokens, dim=-1)
    kernel = relevance[:, None] * (directions @ directions.T) * relevance
    chosen: list[int] = []
    for _ in range(6):
        rest = [i for i in range(len(tokens)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
    assert most_probable_set(kernel, 6).tolist() == chosen
    assert set(select(CDPruner(), inputs, 6)[0].nonzero()[:, 0].tolist()) == set(chosen)


def test_cdpruner_without_a_question_and_beyond_the_rank_of_the_kernel():
    inputs = make_inputs(dim=3)
    inputs.query, inputs.query_valid = inputs.query[:, :0], inputs.query_valid[:, :0]
    assert select(CDPruner(), inputs, 9).sum(1).tolist() == [9, 9]


def test_visionzip_keeps_the_attended_and_averages_the_rest():
    inputs, pruner = make_inputs(), VisionZip(dominant_ratio=0.5)
    keep_mask = select(pruner, inputs, 6)
    merged = pruner.merge(inputs, keep_mask)
    for b in range(2):
        index = inputs.valid[b].nonzero()[:, 0].tolist()
        dominant = sorted(index, key=lambda i: -float(inputs.attention[b, i]))[:3]
        rest = [i for i in index if i not in dominant]
        targets = [rest[k * len(rest) // 3] for k in range(3)]
        assert set(keep_mask[b].nonzero()[:, 0].tolist()) == {*dominant, *targets}
        groups = {target: [inputs.tokens[b, target]] for target in targets}
        for i in rest:
            if i not in targets:
                groups[max(targets, key=lambda t: cosine(inputs.tokens[b, i], inputs.tokens[b, t]))].append(
                    inputs.tokens[b, i]
                )
        for target, group in groups.items():
            assert torch.allclose(merged[b, target], torch.stack(group).mean(0), atol=1e-6)
        assert torch.equal(merged[b, dominant], inputs.tokens[b, dominant])
    assert VisionZip(merge=False).merge(inputs, keep_mask) is None


def test_visionzip_splits_the_budget_as_the_paper():
    for budget, dominant in ((64, 54), (128, 108), (192, 162)):
        assert round(budget * VisionZip().dominant_ratio) == dominant


def test_prumerge_keeps_outliers_and_a_grid_and_adds_the_neighbours():
    inputs = make_inputs()
    inputs.attention = torch.full((2, 12), 0.1)
    inputs.attention[:, 5], inputs.attention[:, 6] = 0.9, 0.8
    pruner = PruMerge(num_neighbors=2)
    keep_mask = select(pruner, inputs, 5)
    even = [i for i in (-UniformPruner().score(inputs)[0]).argsort(stable=True).tolist() if i not in (5, 6)][:3]
    assert set(keep_mask[0].nonzero()[:, 0].tolist()) == {5, 6, *even}
    assert set(select(pruner, inputs, 1)[0].nonzero()[:, 0].tolist()) == {5}
    merged = pruner.merge(inputs, keep_mask)
    for b in range(2):
        kept = keep_mask[b].nonzero()[:, 0].tolist()
        removed = [i for i in inputs.valid[b].nonzero()[:, 0].tolist() if i not in kept]
        for i in kept:
            near = sorted(removed, key=lambda j: -cosine(inputs.tokens[b, i], inputs.tokens[b, j]))[:2]
            expected = inputs.tokens[b, i] + sum(inputs.attention[b, j] * inputs.tokens[b, j] for j in near)
            assert torch.allclose(merged[b, i], expected, atol=1e-6)


def test_tome_merges_the_best_pairs_into_means():
    tokens = make_inputs().tokens[0]
    sources, targets = range(0, 12, 2), range(1, 12, 2)
    best = {s: max(targets, key=lambda t: cosine(tokens[s], tokens[t])) for s in sources}
    gone = sorted(sources, key=lambda s: -cosine(tokens[s], tokens[best[s]]))[:4]
    left, means = merge_pairs(tokens, 8)
    assert left.tolist() == [i for i in range(12) if i not in gone]
    for i, mean in zip(left.tolist(), means, strict=True):
        expected = torch.stack([tokens[i], *(tokens[s] for s in gone if best[s] == i)]).mean(0)
        assert torch.allclose(mean, expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11, 12])
def test_tome_loses_nothing_of_the_sum(count):
    tokens = torch.ones(12, 4) * torch.arange(12)[:, None]
    left, means = merge_pairs(tokens, count)
    assert len(left) == count and means.shape == (count, 4)
    if count == 1:
        assert torch.allclose(means[0], tokens.mean(0))
    equal = torch.ones(12, 4)
    assert torch.allclose(merge_pairs(equal, count)[1], equal[:count])


def test_the_oracle_keeps_what_lies_on_the_boxes():
    inputs = make_inputs()  # 3 x 4 tokens over an image of 80 x 60 pixels: cells of 20 x 20
    oracle = OraclePruner([[(20, 20, 50, 40)], []], [(80, 60), (80, 60)])
    scores = oracle.score(inputs)
    order = scores[0].argsort(descending=True, stable=True).tolist()
    assert order[:2] == [5, 6]  # covered wholly, then by half
    assert scores[0, 5] == pytest.approx(2.0, abs=1.0) and scores[0, 5] > scores[0, 6] > 0 > scores[0, 7] - 1e-9
    assert torch.equal(scores[1].argsort(descending=True), UniformPruner().score(inputs)[1].argsort(descending=True))


def test_the_oracle_refuses_what_it_cannot_know():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="boxes of 1 samples, not of 2"):
        OraclePruner([[]], [(80, 60)]).score(inputs)
    inputs.layout.block[0, 3] = 1
    with pytest.raises(ValueError, match="cut into tiles"):
        OraclePruner([[], []], [(80, 60)] * 2).score(inputs)
    with pytest.raises(ValueError, match="boxes of 0 samples and the sizes of 1"):
        OraclePruner([], [(80, 60)])


def llm_attention(base, tokens, words, layer) -> torch.Tensor:
    """Attention of a layer over tokens and words of one sample, mean over heads, as transformers returns it."""
    base.set_attn_implementation("eager")
    embeddings = torch.cat([tokens, words])[None]
    maps = base.get_decoder()(inputs_embeds=embeddings, output_attentions=True, use_cache=False).attentions
    return maps[layer - 1][0].mean(0)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
@torch.no_grad()
def test_fastv_is_the_attention_of_the_last_token(family):
    base, inputs = build(family), make_inputs(dim=32)
    scores = FastVPruner(base, layer=2).score(inputs)
    assert not base.get_decoder().layers[1].self_attn._forward_hooks
    assert base.config.text_config._attn_implementation == "sdpa"
    for b in range(2):
        tokens, words = inputs.tokens[b][inputs.valid[b]], inputs.query[b][inputs.query_valid[b]]
        expected = llm_attention(base, tokens, words, layer=2)[-1, : len(tokens)]
        assert torch.allclose(scores[b][inputs.valid[b]], expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
@torch.no_grad()
def test_sparsevlm_lets_the_relevant_words_rate(family):
    base, inputs = build(family), make_inputs(dim=32, words=5)
    scores = SparseVLMPruner(base, layer=1).score(inputs)
    numbers = []
    for b in range(2):
        tokens, words = inputs.tokens[b][inputs.valid[b]], inputs.query[b][inputs.query_valid[b]]
        relevance = [0.0] * len(words)
        for v in tokens:
            exponents = [math.exp(float(v @ q)) for q in words]
            for j, exponent in enumerate(exponents):
                relevance[j] += exponent / sum(exponents) / len(tokens)
        raters = [j for j, one in enumerate(relevance) if one >= sum(relevance) / len(words)]
        numbers.append(len(raters))
        maps = llm_attention(base, tokens, words, layer=1)
        expected = sum(maps[len(tokens) + j, : len(tokens)] for j in raters) / len(raters)
        assert torch.allclose(scores[b][inputs.valid[b]], expected, atol=1e-5)
    assert 0 < numbers[0] < 5  # some words rate, some do not


@torch.no_grad()
def test_sparsevlm_without_a_question_is_fastv():
    base, inputs = build("llava"), make_inputs(dim=32)
    inputs.query_valid[0] = False
    assert torch.equal(*(pruner(base).score(inputs)[0] for pruner in (SparseVLMPruner, FastVPruner)))
    inputs.query, inputs.query_valid = inputs.query[:, :0], inputs.query_valid[:, :0]
    assert torch.equal(*(pruner(base).score(inputs) for pruner in (SparseVLMPruner, FastVPruner)))


def test_equal_words_all_rate():
    inputs = make_inputs(words=3)
    inputs.query[:] = 1.0
    assert torch.equal(text_raters(inputs), inputs.query_valid)


def test_a_layer_that_the_llm_does_not_have_is_refused():
    base = build("llava")
    with pytest.raises(ValueError, match="layer=3, but the LLM has layers 1 to 2"):
        SparseVLMPruner(base, layer=3)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("nemotron_h_omni", "layer 2 of this LLM has none; nor has any other"),
        ("gemma4", "every layer of 'gemma4' also reads the prompt's ids"),
    ],
)
def test_an_llm_without_the_parts_is_refused(family, message):
    with pytest.raises(ValueError, match=message):
        FastVPruner(build(family))


@pytest.mark.parametrize("family", ["llama4", "chameleon", "gemma3"])
@torch.no_grad()
def test_fastv_finds_the_layers_of_other_families(family):
    model = TPRLForConditionalGeneration.from_base_model(
        build(family), latent_dim=8, policy_training={"stage": "lfd"}
    ).eval()
    batch = collate(family, [sample(family, 1, 1), sample(family, 2, 2)])
    before = model.lvlm.config.get_text_config()._attn_implementation
    with model.using(FastVPruner(model.lvlm)):
        plan = model.prune(**batch, keep_ratio=0.5)
    assert plan.num_kept.tolist() == [round(0.5 * n) for n in plan.num_visual.tolist()]
    assert plan.scores.std() > 0 and model.lvlm.config.get_text_config()._attn_implementation == before != "eager"


@pytest.mark.parametrize("pruner", [VisionZip(), PruMerge(), ToMePruner()])
@torch.no_grad()
def test_merged_tokens_reach_the_llm_and_leave_the_features_alone(pruner):
    model = TPRLForConditionalGeneration.from_base_model(
        build("llava"), latent_dim=8, policy_training={"stage": "lfd"}
    ).eval()
    samples = [sample("llava", 1, 1), sample("llava", 2, 2), sample("llava", 0, 3)]
    batch = collate("llava", samples)
    with model.using(pruner):
        features = model.encode_images(**batch)
        before = features.modalities["image"].rows.clone()
        merged = model(**batch, keep_ratio=0.25, visual_features=features)
        singles = [model(**collate("llava", [one]), keep_ratio=0.25).logits[0, -1] for one in samples]
    assert torch.equal(features.modalities["image"].rows, before)
    removed = model(**batch, keep_mask=merged.keep_mask)
    changed = (merged.logits - removed.logits)[:, -1].abs().amax(1)
    assert changed[0] > 1e-4 and changed[1] > 1e-4 and changed[2] < 1e-6  # the last has no image
    assert torch.allclose(merged.logits[:, -1], torch.stack(singles), atol=1e-4)
    with model.using(pruner):
        whole = model(**batch, keep_ratio=1.0)
    assert torch.allclose(whole.logits, model(**batch, prune=False).logits, atol=1e-4)
    assert math.isfinite(float(whole.logits.sum()))


def test_the_mean_over_words_is_the_cosine_to_their_mean_direction():
    """TRIM's formula, with that direction in place of its pooled text: the same order of the tokens."""
    inputs = make_inputs(num_samples=1)
    words = F.normalize(inputs.query[0][inputs.query_valid[0]], dim=-1).mean(0)
    cosines = F.cosine_similarity(inputs.tokens[0], words[None])
    assert QuerySimilarityPruner().score(inputs)[0].argsort().tolist() == cosines.argsort().tolist()


def test_pool_is_average_pooling_where_the_budget_divides():
    inputs = make_inputs(height=6, width=4)
    kept, _ = PoolPruner().choose(inputs, Budget(num_keep=6))
    merged = PoolPruner().merge(inputs, kept)
    grid = inputs.tokens[0].T.view(1, -1, 6, 4)
    expected = torch.nn.functional.avg_pool2d(grid, 2).flatten(2)[0].T
    assert torch.allclose(merged[0, kept[0]], expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 5, 7, 11, 23, 24])
def test_every_token_is_in_one_cell_of_pool(count):
    inputs = make_inputs(height=6, width=4)
    sample = SampleTokens.of(inputs, 0, torch.arange(24))
    cells = cells_of(sample, count)
    assert cells.unique().tolist() == list(range(count))
    kept = PoolPruner().select(sample, count)
    assert cells[kept].tolist() == list(range(count))  # a mean has the place of one of its own
    sizes = cells.bincount()
    assert sizes.max() <= 2.5 * 24 / count  # as even as the grid allows
