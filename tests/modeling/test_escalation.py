"""A second look with more tokens, where the first token of an answer is unsure."""

import pytest
import torch
from transformers import DynamicCache, TextStreamer

from tests.families.tiny_models import build, collate, sample
from tprl_hf import Escalation
from tprl_hf.modeling import TPRLForConditionalGeneration

NEW = 4
FIRST, SECOND = 0.3, 0.8
VARIED = ("llava", "qwen3_vl", "internvl", "idefics3", "paligemma", "gemma3")


def wrap(family="llava", **settings):
    base = build(family)
    settings = {"latent_dim": 8, "policy_training": {"stage": "lfd"}, "keep_ratio": 0.4, **settings}
    return TPRLForConditionalGeneration.from_base_model(base, **settings).eval()


def batch_of(family="llava"):
    samples = [sample(family, 1, 1), sample(family, 2, 2, text=8), sample(family, 0, 3), sample(family, 1, 4, text=3)]
    return samples, collate(family, samples)


def first_probabilities(model, batch, keep_ratio=FIRST):
    output = model.generate(
        **batch, keep_ratio=keep_ratio, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
    )
    return output.logits[0].softmax(-1).amax(-1)


def ask(model, batch, **more):
    return model.generate(**batch, max_new_tokens=NEW, return_dict_in_generate=True, **more)


@pytest.mark.short
@pytest.mark.parametrize("family", VARIED)
@torch.no_grad()
def test_each_sample_has_the_answer_of_its_last_look(family):
    model = wrap(family)
    samples, batch = batch_of(family)
    probability = first_probabilities(model, batch)
    with_images = probability[[0, 1, 3]].sort().values
    below = float(with_images[:2].mean())  # one of those with images is unsure
    once, again = (ask(model, batch, keep_ratio=ratio) for ratio in (FIRST, SECOND))

    found = ask(model, batch, keep_ratio=FIRST, escalate=Escalation(SECOND, below))
    expected = (probability < below) & (once.num_visual > 0)
    assert expected.sum() == 1 and torch.equal(found.is_escalated, expected)
    assert torch.equal(found.sequences, torch.where(expected[:, None], again.sequences, once.sequences))
    assert torch.equal(found.num_kept, torch.where(expected, again.num_kept, once.num_kept))
    assert torch.equal(found.num_read, once.num_kept + expected * again.num_kept)
    masks = zip(*(one.keep_mask.split(one.num_visual.tolist()) for one in (once, again)), strict=True)
    chosen = [late if asked else early for asked, (early, late) in zip(expected, masks, strict=True)]
    assert torch.equal(found.keep_mask, torch.cat(chosen))

    for row, one in enumerate(samples):
        alone = ask(model, collate(family, [one]), keep_ratio=FIRST, escalate=Escalation(SECOND, below))
        assert torch.equal(alone.sequences[0, -NEW:], found.sequences[row, -NEW:])
        assert alone.num_read[0] == found.num_read[row]
    tokens = model.generate(**batch, max_new_tokens=NEW, keep_ratio=FIRST, escalate=Escalation(SECOND, below))
    assert torch.equal(tokens, found.sequences)


@torch.no_grad()
def test_nobody_and_everybody_looks_again():
    model = wrap()
    _, batch = batch_of()
    sure = ask(model, batch, num_keep=5, escalate=Escalation(SECOND, 1e-6))
    once = ask(model, batch, num_keep=5)
    assert torch.equal(sure.sequences, once.sequences) and torch.equal(sure.num_read, once.num_kept)
    assert not sure.is_escalated.any()
    unsure = ask(model, batch, num_keep=5, escalate=Escalation(1.0, 1.0))
    assert torch.equal(unsure.sequences, ask(model, batch, prune=False).sequences)
    assert torch.equal(unsure.is_escalated, once.num_visual > 0)


@torch.no_grad()
def test_where_the_second_look_has_no_more_tokens_there_is_none():
    model = wrap()
    _, batch = batch_of()
    found = ask(model, batch, num_keep=20, escalate=Escalation(0.5, 1.0))  # an image has 16 tokens, two have 32
    assert not found.is_escalated.any() and torch.equal(found.num_read, ask(model, batch, num_keep=20).num_kept)


@torch.no_grad()
def test_the_tower_runs_once_and_an_unsure_answer_stops_after_a_token(monkeypatch):
    model = wrap()
    _, batch = batch_of()
    calls, steps = [], []
    encode, run = type(model.adapter).encode, model.lvlm.forward
    monkeypatch.setattr(type(model.adapter), "encode", lambda *a, **k: calls.append(1) or encode(*a, **k))
    monkeypatch.setattr(model.lvlm, "forward", lambda *a, **k: steps.append(1) or run(*a, **k))
    only_images = {name: value[:2] if name != "pixel_values" else value[:3] for name, value in batch.items()}
    ask(model, only_images, keep_ratio=FIRST, escalate=Escalation(SECOND, 1.0))
    assert len(calls) == 1 and len(steps) == 1 + NEW


@pytest.mark.parametrize(
    "ways",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 0.7},
    ],
    ids=lambda ways: "-".join(ways),
)
@torch.no_grad()
def test_beams_and_several_sequences(ways):
    model = wrap()
    samples, batch = batch_of()
    below = float(first_probabilities(model, batch)[[0, 1, 3]].sort().values[:2].mean())
    torch.manual_seed(0)
    found = ask(model, batch, keep_ratio=FIRST, escalate=Escalation(SECOND, below), **ways)
    assert found.is_escalated.sum() == 1
    if "do_sample" not in ways:
        once, again = (ask(model, batch, keep_ratio=ratio, **ways).sequences for ratio in (FIRST, SECOND))
        copies = len(once) // len(samples)
        expected = torch.where(found.is_escalated.repeat_interleave(copies)[:, None], again, once)
        assert torch.equal(found.sequences, expected)
    assert len(found.sequences) == len(samples) * ways.get("num_return_sequences", 1)


def test_answers_of_different_length_are_filled_up():
    model = wrap()
    _, batch = batch_of()
    once = ask(model, batch, keep_ratio=FIRST)
    length = batch["input_ids"].shape[1]
    model.generation_config.pad_token_id = 0
    end = int(once.sequences[1, length])  # with it this answer ends after one token
    again = ask(model, batch, keep_ratio=SECOND, eos_token_id=end)
    found = ask(model, batch, keep_ratio=FIRST, eos_token_id=end, escalate=Escalation(SECOND, 1.0))
    rows = found.is_escalated
    width = min(found.sequences.shape[1], again.sequences.shape[1])
    assert torch.equal(found.sequences[rows, :width], again.sequences[rows, :width])
    assert not found.sequences[:, width:][rows].any()


REFUSED = {
    "an Escalation": {"escalate": 0.5},
    "neither threshold": {"threshold": 0.5},
    "keep_mask nor": {"keep_mask": torch.ones(64, dtype=torch.bool)},
    "nor prune=False": {"prune": False},
    "keeps more than the first": {"keep_ratio": 0.9},
    "past_key_values": {"past_key_values": DynamicCache()},
    "streamer": {"streamer": TextStreamer(None)},
    "assistant_model": {"assistant_model": object()},
    "prompt_lookup": {"prompt_lookup_num_tokens": 2},
    "output_scores": {"output_scores": True},
    "output_hidden_states": {"output_hidden_states": True},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_one_look_only_is_refused(what):
    model = wrap()
    _, batch = batch_of()
    call = {"escalate": Escalation(SECOND, 0.5), **REFUSED[what]}
    with pytest.raises(ValueError, match=what):
        model.generate(**batch, max_new_tokens=NEW, **call)


@pytest.mark.parametrize(
    ("keep_ratio", "below"), [(0, 0.5), (1.5, 0.5), ("1/3", 0.5), (0.5, 0), (0.5, 1.1), (0.5, None)]
)
def test_values_are_checked(keep_ratio, below):
    with pytest.raises(ValueError, match="must be"):
        Escalation(keep_ratio, below)


@torch.no_grad()
def test_allowed_tokens_are_those_of_the_row_of_the_batch():
    model, (_, batch) = wrap(), batch_of()
    allowed = {"prefix_allowed_tokens_fn": lambda row, ids: [10 + row, 50 + row]}
    found = ask(model, batch, **allowed, escalate=Escalation(1.0, 1.0))
    assert found.is_escalated.sum() > 1
    answers = found.sequences[:, batch["input_ids"].shape[1] :]
    for row, answer in enumerate(answers.tolist()):
        assert {*answer} <= {10 + row, 50 + row, 0}
