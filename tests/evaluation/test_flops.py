"""The published numbers come out, and the analytic total is what torch counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.families.tiny_models import build, collate, sample
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.evaluation.flops import cost_of, flops_by_convention, shape_of
from tprl_hf.evaluation.presets import PRESETS, preset_config, preset_shape
from tprl_hf.pruners import FastVPruner

TERA = 1e12
# families whose tower takes any size, and the side of the tiny image
QWEN = {"qwen2_vl": 32, "qwen2_5_vl": 32, "qwen3_vl": 32}
# torch's counter does not know the fused attention of CPUs
COUNTED = SDPBackend.MATH


def test_the_papers_table_4():
    """9.6 -> 4.4 TFLOPs, -54.2 %, of LLaVA-1.5-7B with 133 text tokens; 302 and 101 MB of KV cache."""
    shape = preset_shape("llava-1.5-7b")
    unpruned, pruned = (flops_by_convention(shape, kept, text_tokens=133)["paper"] for kept in (576, 192))
    assert (round(unpruned / TERA, 1), round(pruned / TERA, 1)) == (9.6, 4.4)
    assert round(100 * (pruned / unpruned - 1), 1) == -54.2
    megabytes = [cost_of(shape, kept, 133).visual_kv_bytes / 1e6 for kept in (576, 192)]
    assert megabytes == pytest.approx([302.4, 100.9], rel=0.003)


@pytest.mark.parametrize(("kept", "published"), [(576, 3.817), (192, 1.253), (128, 0.833), (64, 0.416)])
def test_the_peers_multiply_accumulates(kept, published):
    found = flops_by_convention(preset_shape("llava-1.5-7b"), kept, text_tokens=0)["visual-macs"]
    # the peers' tables cut off the last digit, or round it
    assert found / TERA == pytest.approx(published, abs=0.001)


def test_fastv_counts_two_matrices_and_all_tokens():
    shape = preset_shape("llava-1.5-7b")
    found = flops_by_convention(shape, 576, text_tokens=64)["two-matrix-macs"]
    n, d, m = 640, 4096, 11008
    assert found == 32 * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)


# billions of parameters of the LLM with its embeddings, tower and projector not counted
PARAMETERS = {
    "llava-1.5-7b": 6.74,
    "llava-1.5-13b": 13.0,
    "llava-next-7b": 6.74,
    "llava-next-13b": 13.0,
    "llava-0.5b": 0.49,
    "qwen2-vl-2b": 1.54,
    "qwen2-vl-7b": 7.62,
    "qwen2.5-vl-3b": 3.09,
    "qwen2.5-vl-7b": 7.62,
    "qwen3-vl-4b": 4.02,
    "qwen3-vl-8b": 8.19,
    "internvl3-2b": 1.78,
    "internvl3-8b": 7.61,
    "gemma-3-4b": 3.88,
    "gemma-3-12b": 11.77,
    "smolvlm2-0.5b": 0.41,
    "smolvlm2-2.2b": 1.81,
}
NUM_VISUAL = {"llava-next": 2880, "internvl3": 3328, "qwen3-vl": 441, "gemma-3": 256}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_sizes_of_their_names(name):
    shape = preset_shape(name)
    assert shape.llm.num_parameters / 1e9 == pytest.approx(PARAMETERS[name], abs=0.02)
    expected = {"smolvlm2-0.5b": 17 * 64, "smolvlm2-2.2b": 17 * 81}.get(name)
    assert shape.num_visual == (expected or NUM_VISUAL.get(name.rsplit("-", 1)[0], 576))
    cost = cost_of(shape, shape.num_visual // 3, 60, new_tokens=16)
    unpruned = cost_of(shape, shape.num_visual, 60)
    assert 0 < cost.pruner < 0.02 * unpruned.prefill
    # what FastV pays: about one layer and a quarter of all
    assert 1 / shape.llm.num_layers < cost.early_layers / unpruned.prefill < 1.6 / shape.llm.num_layers
    assert unpruned.pruner == unpruned.early_layers == 0
    assert cost.total == cost.vision + cost.pruner + cost.prefill + cost.decode


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "qwen3_vl"])
@torch.no_grad()
def test_torch_counts_the_same_early_layers(family):
    model = TPRLForConditionalGeneration.from_base_model(
        build(family), latent_dim=8, policy_training={"stage": "lfd"}
    ).eval()
    llm = shape_of(model.config, image_size=32).llm
    tokens, query = torch.randn(1, 12, llm.width), torch.randn(1, 5, llm.width)
    for layer in (1, 2):
        pruner = FastVPruner(model.lvlm, layer=layer)
        with FlopCounterMode(display=False) as counter:
            pruner.attention(torch.cat([tokens, query], 1), torch.ones(1, 17, dtype=torch.bool))
        assert llm.early_attention(17, layer) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("family", ["llava", "paligemma", "internvl", "gemma3", "idefics3", "smolvlm", *QWEN])
@torch.no_grad()
def test_torch_counts_the_same(family):
    model = TPRLForConditionalGeneration.from_base_model(
        build(family), latent_dim=8, policy_training={"stage": "lfd"}
    ).eval()
    one = next(s for s in (sample(family, 1, seed) for seed in range(9)) if is_square(s))
    inputs = collate(family, [one])
    plan = model.prune(**inputs, prune=False)
    num_visual, length = int(plan.num_visual), inputs["input_ids"].shape[1]
    side = {"image_size": QWEN[family]} if family in QWEN else {}
    shape = shape_of(model.config, num_tiles=1, **side)
    assert shape.num_visual == num_visual
    text = length - num_visual
    for kept in (num_visual, num_visual // 2):
        with sdpa_kernel(COUNTED), FlopCounterMode(display=False) as counter:
            model(**inputs, num_keep=kept, logits_to_keep=1)
        cost = cost_of(shape, kept, text)
        counted = counter.get_total_flops()
        # keeping all by a budget still asks the policy
        pruner = cost.pruner or shape.policy.flops(num_visual, text)
        assert cost.vision + pruner + cost.prefill == pytest.approx(counted, rel=0.02)


def is_square(one) -> bool:
    grid = one.images[0].get("image_grid_thw")
    return (grid is None or grid.tolist() == [[1, 8, 8]]) and len(one.images[0]["pixel_values"]) in (1, 64)


@torch.no_grad()
def test_torch_counts_the_same_while_decoding():
    model = TPRLForConditionalGeneration.from_base_model(
        build("llava"), latent_dim=8, policy_training={"stage": "lfd"}
    ).eval()
    inputs = collate("llava", [sample("llava", 1, 1)])
    shape = shape_of(model.config)
    text = inputs["input_ids"].shape[1] - 16
    with sdpa_kernel(COUNTED), FlopCounterMode(display=False) as counter:
        model.generate(**inputs, num_keep=5, max_new_tokens=6, do_sample=False)
    assert cost_of(shape, 5, text, new_tokens=6).total == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_what_cannot_be_counted_is_refused():
    shape = preset_shape("llava-1.5-7b")
    with pytest.raises(ValueError, match="Cannot keep 577 of 576 visual tokens"):
        cost_of(shape, 577, 0)
    with pytest.raises(ValueError, match=r"no preset 'gpt'; there are llava-1\.5-7b"):
        preset_config("gpt")
    with pytest.raises(ValueError, match="cost of 'aya_vision' is not counted"):
        shape_of(build("aya_vision").config)
