"""`attn_implementation="flash_attention_2"`: its kernels are plain torch here, see `tests.stand_ins.flash`."""

import functools

import pytest
import torch

from tests.families.more import OTHERS
from tests.families.tiny_models import FAMILIES, before_second_image, build, collate, entry, sample
from tests.families.ways_to_generate import CANNOT
from tests.reference import delete_by_hand
from tests.stand_ins import flash as pretend_flash
from tests.stand_ins.flash import BASE_DIFFERS, BASE_FAILS, BEAR_NO_PADDING, flash_attention
from tprl_hf.modeling import TPRLForConditionalGeneration
from tprl_hf.pruners import FastVPruner, VisPruner

SAME = [family for family in (*FAMILIES, *OTHERS) if family not in BASE_FAILS + BASE_DIFFERS]


def wrap(family, **settings):
    numbering = "contiguous" if entry(family).own_positions else "original"
    settings = {"position_ids": numbering, "keep_ratio": 0.4, **settings}
    base = build(family)
    return base, TPRLForConditionalGeneration.from_base_model(
        base, latent_dim=8, policy_training={"stage": "lfd"}, **settings
    ).eval()


@pytest.mark.parametrize("family", SAME)
@torch.no_grad()
def test_answers_are_those_of_sdpa(family):
    _, model = wrap(family)
    samples = [sample(family, 1, 1, text=3), sample(family, 2, 2), sample(family, 0, 3, text=9)]
    batches = [collate(family, samples[1:2]), collate(family, samples)]

    def answers():
        return [model(**batch).logits[:, -5:] for batch in batches], [
            model.generate(**batch, max_new_tokens=3) for batch in batches
        ]

    logits, tokens = answers()
    with flash_attention(model):
        flash_logits, flash_tokens = answers()
    for one, other in zip(logits, flash_logits, strict=True):
        assert (one - other).abs().max() <= 2e-5
    assert all(map(torch.equal, tokens, flash_tokens))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pruned_equals_deletion_by_hand(family):
    base, model = wrap(family)
    inputs = collate(family, [sample(family, 2, 4)])
    with flash_attention(model):
        keep_mask = model.prune(**inputs).keep_mask
        expected, _ = delete_by_hand(base, inputs, keep_mask, "original", new_tokens=1)
        assert (model(**inputs, keep_mask=keep_mask, compact=True).logits - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("family", [family for family in SAME if "new image" not in CANNOT.get(family, {})])
@torch.no_grad()
def test_new_image_in_the_second_turn(family):
    """A mask of ones is dropped; gaps in positions would then be read as packed prompts over the wrong keys."""
    _, model = wrap(family)
    both, start, rest = before_second_image(family)
    one = collate(family, [start])
    settings = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    with flash_attention(model):
        first = model.generate(**one, max_new_tokens=3, return_dict_in_generate=True)
        more = collate(family, [type(both)(first.sequences[0].tolist() + rest, both.images)])
        if family in BEAR_NO_PADDING:
            with pytest.raises(ValueError, match="carry a state"):
                model.generate(**more, past_key_values=first.past_key_values, **settings)
            return
        second = model.generate(**more, past_key_values=first.past_key_values, **settings)
        afresh = model.generate(**more, keep_mask=second.keep_mask, **settings)
    # the column of padding counts in the window of idefics2's layers, 64 tokens here
    tolerance = 2e-5 if family != "idefics2" else 1e-2
    assert (torch.stack(second.logits) - torch.stack(afresh.logits)).abs().max() <= tolerance


# In PaliGemma the tokens of a prompt see those behind them, which parts change, unpruned too.
@pytest.mark.parametrize("family", [one for one in FAMILIES if one in SAME and not one.startswith("paligemma")])
@torch.no_grad()
def test_a_prompt_in_parts(family):
    """Those after the first stand behind a cache, with gaps in their positions."""
    _, model = wrap(family)
    one = collate(family, [sample(family, 2, 2)])
    settings = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}

    def answers():
        return [model.generate(**one, **settings, prefill_chunk_size=size) for size in (1, 2, 5, 100)]

    expected = answers()
    with flash_attention(model):
        found = answers()
    for one_size, of_sdpa in zip(found, expected, strict=True):
        assert (torch.stack(one_size.logits) - torch.stack(of_sdpa.logits)).abs().max() <= 2e-5
        assert torch.equal(one_size.sequences, of_sdpa.sequences)


@pytest.mark.parametrize("num_samples", [1, 2])
@torch.no_grad()
def test_forward_behind_a_prefix(num_samples):
    """One that no call of the model filled, as of PEFT's prefix tuning."""
    base, model = wrap("llava")
    batch = collate("llava", [sample("llava", 2, 2)] * num_samples)
    start = torch.tensor([[4, 5, 6, 7]] * num_samples)
    batch["attention_mask"] = torch.cat([torch.ones_like(start), batch["attention_mask"]], 1)

    def outputs():
        return [
            model(**batch, past_key_values=base(input_ids=start, use_cache=True).past_key_values, compact=compact)
            for compact in (False, True)
        ]

    expected = outputs()
    with flash_attention(model):
        found = outputs()
    assert (found[0].logits - expected[0].logits).abs().max() <= 2e-5
    width = expected[1].logits.shape[1]
    assert (found[1].logits[:, -width:] - expected[1].logits).abs().max() <= 2e-5


@torch.no_grad()
def test_pruners_that_read_attention(monkeypatch):
    """They read it eagerly, and leave Flash Attention as it was."""
    base, model = wrap("llava")
    batch = collate("llava", [sample("llava", 1, 1), sample("llava", 2, 2)])
    calls = []
    flash = pretend_flash.flash_attn_varlen_func

    @functools.wraps(flash)
    def counted(*args, **kwargs):
        calls.append(args)
        return flash(*args, **kwargs)

    monkeypatch.setattr(pretend_flash, "flash_attn_varlen_func", counted)
    for pruner in (VisPruner(), FastVPruner(base)):
        with model.using(pruner):
            expected = model.prune(**batch)
            with flash_attention(model):
                assert torch.equal(model.prune(**batch).keep_mask, expected.keep_mask)
                assert base.config.text_config._attn_implementation == "flash_attention_2"
                calls.clear()
                model(**batch)
                assert len(calls) >= base.config.text_config.num_hidden_layers
            model.set_attn_implementation("sdpa")
