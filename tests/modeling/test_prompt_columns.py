"""Outputs belong to the columns of the prompt as the caller gave it, and inputs along the sequence work in all forms.

Keep-all equals the base model in every form that the base model takes; pruned equals the compact form, which other
tests compare with deletion by hand.
"""

import pytest
import torch
import torch.nn.functional as F

from tests.families.more import OTHERS
from tests.families.tiny_models import FAMILIES, PAD, Sample, build, collate, entry, sample
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.modeling.columns import source_columns, take_columns
from tprl_hf.modeling.packed_rows import PackedRows

TOLERANCE = 2e-5
ALL = [*FAMILIES, *OTHERS]
SETTINGS = {"latent_dim": 8, "policy_training": {"stage": "lfd"}}
ANSWERS = ([11, 12, 13, 14, 15], [21, 22])


def wrap(family, **settings):
    base = build(family)
    numbering = "contiguous" if entry(family).own_positions else "original"
    model = TPRLForConditionalGeneration.from_base_model(base, **SETTINGS, position_ids=numbering, **settings)
    return base, model.eval()


def far(a, b):
    return float((a.double() - b.double()).abs().max())


def answered(family):
    """Prompts padded on the left with answers padded on the right, and each of them alone."""
    prompts = [sample(family, 1, 1), sample(family, 2, 2, text=9)]
    if entry(family).batch_differs:
        prompts = prompts[:1]
    answers = ANSWERS[: len(prompts)]
    alone = [collate(family, [Sample(s.ids + a, s.images)]) for s, a in zip(prompts, answers, strict=True)]
    batch = collate(family, prompts)
    count = len(answers[0])
    ids = torch.cat([batch["input_ids"], torch.tensor([a + [PAD] * (count - len(a)) for a in answers])], 1)
    mask = torch.tensor([[1] * len(a) + [0] * (count - len(a)) for a in answers])
    mask = torch.cat([batch["attention_mask"], mask], 1)
    extras = entry(family).extras(ids)
    return {**batch, "input_ids": ids, "attention_mask": mask, **extras}, alone, answers


def answer_logprobs(model, inputs, count, **settings):
    """Of the last `count` columns, as RL and preference training compute them."""
    logits = model(**inputs, logits_to_keep=count + 1, **settings).logits[:, -count - 1 : -1]
    return logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, -count:, None])[..., 0]


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_answers_padded_on_the_right_have_their_own_logprobs(family):
    _, model = wrap(family)
    inputs, alone, answers = answered(family)
    visual = [int(model.adapter.find_visual(one["input_ids"]).sum()) for one in alone]
    kept = [torch.arange(n) % 3 > 0 for n in visual]
    count = len(answers[0])
    for masks in (kept, [torch.ones(n, dtype=torch.bool) for n in visual]):
        together = answer_logprobs(model, inputs, count, keep_mask=torch.cat(masks))
        for row, (one, answer, mask) in enumerate(zip(alone, answers, masks, strict=True)):
            expected = answer_logprobs(model, one, len(answer), keep_mask=mask)[0]
            assert far(together[row, : len(answer)], expected) <= TOLERANCE


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_outputs_lie_in_the_prompts_columns(family):
    """Logits and hidden states: a kept column has its own, a pruned one those of the last kept one before it."""
    _, model = wrap(family)
    inputs, _, _ = answered(family)
    total = int(model.adapter.find_visual(inputs["input_ids"]).sum())
    call = {"keep_mask": torch.arange(total) % 3 > 0, "output_hidden_states": True}
    compact, placed = model(**inputs, **call, compact=True), model(**inputs, **call)
    length = inputs["input_ids"].shape[1]
    pairs = [(compact.logits, placed.logits)]
    if placed.hidden_states is not None:
        pairs += list(zip(compact.hidden_states, placed.hidden_states, strict=True))
    for values, found in pairs:
        for row, columns in enumerate(compact.columns.tolist()):
            last = None
            of = {column: place for place, column in enumerate(columns) if column >= 0}
            for column in range(length):
                last = of.get(column, last)
                expected = torch.zeros_like(found[row, column]) if last is None else values[row, last]
                assert torch.equal(found[row, column], expected)
    for wanted in (1, 3, length, torch.tensor([length - 1, 2, 5])):
        found = model(**inputs, **call, logits_to_keep=wanted).logits
        assert far(found, placed.logits[:, wanted if torch.is_tensor(wanted) else slice(-wanted, None)]) <= TOLERANCE


@pytest.mark.parametrize("family", [name for name in FAMILIES if not FAMILIES[name].own_positions])
@torch.no_grad()
def test_keep_all_equals_the_base_in_all_forms(family):
    base, model = wrap(family)
    model.set_attn_implementation("eager")
    samples = [sample(family, 1, 1), sample(family, 2, 2)]
    inputs = collate(family, samples, "right")
    attended = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~attended | model.adapter.find_visual(inputs["input_ids"]), -100)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    settings = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    forms = [
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": 7},
        {"labels": labels, "shift_labels": shifted},
        {"logits_to_keep": 2},
        {"logits_to_keep": torch.tensor([0, 4, 7])},
        *({"position_ids": positions} for positions in position_forms(base, model, inputs)),
    ]
    for form in forms:
        expected, found = base(**inputs, **form, **settings), model(**inputs, **form, **settings, keep_ratio=1.0)
        keeps = form.get("logits_to_keep", 0)
        seen = attended[:, keeps] if torch.is_tensor(keeps) else attended[:, -keeps:]
        assert far(found.logits[seen], expected.logits[seen]) <= TOLERANCE, form.keys()
        if "labels" in form:
            assert far(found.loss, expected.loss) <= TOLERANCE, form.keys()
        for name in ("hidden_states", "attentions"):
            for one, other in zip(found[name] or (), expected[name] or (), strict=True):
                assert one.shape == other.shape
                rows = (slice(None), attended) if name == "attentions" else attended
                if name == "attentions":
                    one, other = one.transpose(0, 1), other.transpose(0, 1)
                    assert far(one[rows], other[rows]) <= TOLERANCE, form.keys()
                elif one is not found[name][-1] or name == "hidden_states":
                    assert far(one[rows], other[rows]) <= 10 * TOLERANCE, form.keys()


def position_forms(base, model, inputs):
    """Position ids in each form that the base model takes, of the values that it counts itself."""
    if not hasattr(base.base_model, "get_rope_index"):
        start = int(model.adapter.forward_position_offset)
        counted = torch.arange(inputs["input_ids"].shape[1])[None] + start
        return [counted, counted.expand(len(inputs["input_ids"]), -1)]
    positions = model.adapter.position_ids(inputs["input_ids"], inputs["attention_mask"], inputs)
    return [positions, positions[-3:]]


@pytest.mark.parametrize("family", ["llava", "internvl", "gemma3", "qwen2_5_vl", "mistral3"])
@torch.no_grad()
def test_samples_of_a_packed_row_are_alone(family):
    base, model = wrap(family)
    samples = [sample(family, 1, 1), sample(family, 2, 2, text=8), sample(family, 0, 3)]
    packed = collate(family, [Sample([i for s in samples for i in s.ids], [i for s in samples for i in s.images])])
    packed.pop("attention_mask")
    positions = torch.cat([torch.arange(len(s.ids)) for s in samples])[None]
    positions = positions + model.adapter.forward_position_offset
    alone = [collate(family, [one]) for one in samples]
    if hasattr(base.base_model, "get_rope_index"):
        parts = [model.adapter.position_ids(one["input_ids"], one["attention_mask"], one) for one in alone]
        positions = torch.cat(parts, -1)
    call = {**packed, "position_ids": positions, "use_cache": False}
    total = [int(model.adapter.find_visual(one["input_ids"]).sum()) for one in alone]
    masks = [torch.arange(n) % 3 > 0 for n in total]
    labels = torch.cat([F.pad(torch.tensor(s.ids[1:]), (1, 0), value=-100) for s in samples])[None]
    labels = labels.masked_fill(model.adapter.find_visual(packed["input_ids"]), -100)
    found = model(**call, keep_mask=torch.cat(masks), labels=labels, output_hidden_states=True)
    expected = [
        model(**one, keep_mask=mask, output_hidden_states=True) for one, mask in zip(alone, masks, strict=True)
    ]
    assert far(found.logits, torch.cat([one.logits for one in expected], 1)) <= TOLERANCE
    last = torch.cat([one.hidden_states[-1] for one in expected], 1)
    assert far(found.hidden_states[-1], last) <= TOLERANCE
    logits = torch.cat([one.logits[0, :-1] for one in expected])
    targets = torch.cat([part[1:] for part in labels[0].split([len(s.ids) for s in samples])])
    assert far(found.loss, F.cross_entropy(logits, targets)) <= TOLERANCE
    kept = model(**call, keep_ratio=1.0).logits
    assert far(kept, torch.cat([base(**one).logits for one in alone], 1)) <= TOLERANCE
    if family != "gemma3":  # whose own packed rows let images of other samples see each other
        assert far(kept, base(**call).logits) <= TOLERANCE
    # each sample has its own budget
    plan = model(**call, num_keep=2)
    assert plan.num_kept.tolist() == [min(2, n) for n in total]


@torch.no_grad()
def test_the_llm_sees_the_short_batch_alone():
    """`generate` and `forward` cost what the kept columns cost, and the compact form is no copy."""
    _, model = wrap("llava")
    inputs = collate("llava", [sample("llava", 1, 1), sample("llava", 2, 2)])
    widths = []
    hook = model.lvlm.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.generate(**inputs, num_keep=3, max_new_tokens=2)
    output = model(**inputs, num_keep=3)
    hook.remove()
    longest = max(len(columns[columns >= 0]) for columns in output.columns)
    assert widths == [longest, 1, longest] and output.logits.shape[1] == inputs["input_ids"].shape[1]
    assert model(**inputs, num_keep=3, compact=True).logits.shape[1] == longest


def test_labels_of_placeholders_never_count():
    _, model = wrap("llava")
    inputs = collate("llava", [sample("llava", 1, 1), sample("llava", 2, 2)])
    visual = model.adapter.find_visual(inputs["input_ids"])
    everywhere = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    text = everywhere.masked_fill(visual, -100)
    for ratio in (0.25, 0.5, 1.0):
        losses = [
            float(model(**inputs, labels=labels, keep_ratio=ratio, num_items_in_batch=(labels != -100).sum()).loss)
            for labels in (everywhere, text)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        assert float(model(**inputs, labels=everywhere, keep_ratio=ratio).loss) == pytest.approx(
            float(model(**inputs, labels=text, keep_ratio=ratio).loss), abs=1e-6
        )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cu_seq_lens_q", torch.tensor([0, 3, 8]), "cu_seq_lens_q cannot be pruned: .*position_ids that start again"),
        ("seq_idx", torch.zeros(1, 8), "seq_idx cannot be pruned"),
        ("labels", torch.zeros(1, 3, dtype=torch.long), r"labels must have the shape of input_ids.*got \(1, 3\)"),
        ("position_ids", torch.zeros(1, 3, dtype=torch.long), r"position_ids must have the shape.*got \(1, 3\)"),
        ("position_ids", torch.zeros(3, 1, 9, dtype=torch.long), r"position_ids must have the shape.*got \(3, 1, 9\)"),
        ("attention_mask", torch.ones(1, 1, 9, 9), "attention_mask must be two-dimensional"),
        ("inputs_embeds", torch.ones(1, 9, 32), "inputs_embeds of sample 0 has in column 0 an embedding that is not"),
    ],
)
def test_other_forms_are_refused_by_name(name, value, message):
    _, model = wrap("llava")
    inputs = {**collate("llava", [sample("llava", 1, 1)]), name: value}
    if name == "inputs_embeds":
        del inputs["input_ids"]
    with pytest.raises(ValueError, match=message):
        model(**inputs, keep_mask=torch.arange(16) % 2 == 0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_mask_in_second_place_is_told_from_pixels(family):
    """As many base models have it there; ours is LLaVA's order for all families."""
    _, model = wrap(family)
    inputs = collate(family, [sample(family, 0, 1)])
    for mask in (inputs["attention_mask"], inputs["attention_mask"].bool(), inputs["attention_mask"].float()):
        with pytest.raises(ValueError, match=r"pixel_values is torch.* as a mask is: pass attention_mask by its name"):
            model(inputs["input_ids"], mask)


# Also of all others whose base model takes embeddings: not of PaliGemma 2, Ovis 2, Gemma 4 and Qwen 2.5 Omni.
@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3", "qwen2_5_vl", "gemma4_unified"])
@torch.no_grad()
def test_embeddings_in_place_of_ids(family):
    base, model = wrap(family)
    inputs = collate(family, [sample(family, 1, 1)])
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    pruned, whole = ({**inputs, **budget} for budget in ({"keep_ratio": 0.5}, {"keep_ratio": 1.0}))
    assert far(model(inputs_embeds=embeds, **pruned).logits, model(input_ids=ids, **pruned).logits) < TOLERANCE
    assert far(model(inputs_embeds=embeds, **whole).logits, base(input_ids=ids, **inputs).logits) < TOLERANCE


def test_pure_functions():
    columns = torch.tensor([[-1, 1, 2, 5], [0, 1, 3, 4]])
    assert source_columns(columns, 7).tolist() == [[-1, 1, 2, 2, 2, 3, 3], [0, 1, 1, 2, 3, 3, 3]]
    values = torch.arange(8.0).view(2, 4, 1)
    assert take_columns(values, source_columns(columns, 7))[..., 0].tolist() == [
        [0, 1, 2, 2, 2, 3, 3],
        [4, 5, 5, 6, 7, 7, 7],
    ]
    whole = torch.arange(4).expand(2, -1)
    assert take_columns(values, source_columns(whole, 4)) is values  # nothing is copied where nothing moved
    nothing = source_columns(columns[:, :0], 7)
    assert nothing.tolist() == [[-1] * 7] * 2 and take_columns(values[:, :0], nothing).tolist() == [[[0.0]] * 7] * 2
    packed = PackedRows.of(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]), (2, 5))
    assert packed.valid.sum(1).tolist() == [3, 2, 5]
    numbers = torch.arange(10).view(2, 5)
    assert packed.unpack(numbers, -1).tolist() == [[-1, -1, 0, 1, 2], [-1, -1, -1, 3, 4], [5, 6, 7, 8, 9]]
    assert torch.equal(packed.pack(packed.unpack(numbers)), numbers)
    assert PackedRows.of(torch.arange(5)[None], (1, 5)) is None
