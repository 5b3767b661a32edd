"""Every way to generate: pruned prompts behave as the base model's own, and the user sees the original prompt."""

import copy
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    CONFIG_MAPPING,
    DynamicCache,
    EosTokenCriteria,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from tests.families.tiny_models import BOS, EOS, FAMILIES, PAD, before_second_image, build, collate, sample
from tests.families.ways_to_generate import CANNOT
from tprl_hf.modeling import TPRLForConditionalGeneration
from tprl_hf.modeling.cached_prompt import CACHE_NAME
from tprl_hf.modeling.escalation import Escalation
from tprl_hf.pruners import RandomPruner, TokenPruner

pytestmark = pytest.mark.short

NEW = 4
BEAMS = [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}]
# One for each container of features, and those with masks or positions of their own.
VARIED = ("llava", "qwen3_vl", "internvl", "idefics3", "paligemma", "gemma3")
SAME_TOKENS = {
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


def wrap(family, **settings):
    base = build(family)
    model = TPRLForConditionalGeneration.from_base_model(
        base, latent_dim=8, policy_training={"stage": "lfd"}, keep_ratio=0.4, **settings
    )
    return base, model.eval()


def batch_of(family, side="left"):
    samples = [sample(family, 1, 1), sample(family, 2, 2, text=8), sample(family, 0, 3)]
    return samples, collate(family, samples, side)


@pytest.mark.parametrize("ways", BEAMS, ids=lambda w: "-".join(w))
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_beams_and_return_sequences(family, ways):
    base, model = wrap(family)
    samples, batch = batch_of(family)

    def run(model, inputs, **more):
        torch.manual_seed(0)
        return model.generate(**inputs, **ways, max_new_tokens=NEW, **more)

    assert torch.equal(run(model, batch, keep_ratio=1.0), run(base, batch))
    if "do_sample" not in ways:
        made = run(model, batch).view(len(samples), -1, batch["input_ids"].shape[1] + NEW)
        for row, one in enumerate(samples):
            assert torch.equal(run(model, collate(family, [one]))[:, -NEW:], made[row, :, -NEW:])


@pytest.mark.parametrize("way", SAME_TOKENS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ways_that_give_the_greedy_tokens(family, way):
    base, model = wrap(family)
    samples, batch = batch_of(family)
    if way in CANNOT.get(family, {}):  # fails when the library has learned it
        with pytest.raises(AttributeError, match="ndim"):
            base.generate(**batch, **SAME_TOKENS[way], max_new_tokens=NEW)
        return
    if way == "chunked prefill" and Version(transformers.__version__) < Version("5.23"):  # wrong in the base model
        settings = {**SAME_TOKENS[way], "max_new_tokens": NEW}
        assert torch.equal(model.generate(**batch, **settings, keep_ratio=1.0), base.generate(**batch, **settings))
        return
    if way == "prompt lookup":  # takes one sample
        batch = collate(family, samples[1:2])
    expected = model.generate(**batch, max_new_tokens=NEW)
    assert torch.equal(model.generate(**batch, **SAME_TOKENS[way], max_new_tokens=NEW), expected)


@pytest.mark.parametrize("settings", [{}, {"prune": False}])
def test_a_paged_cache_is_refused_where_it_would_answer_without_the_picture(settings):
    _, model = wrap("llava")
    batch = collate("llava", [sample("llava", 1, 1)])
    with pytest.raises(ValueError, match=r'cache_implementation="paged"` hands no pixels to the model'):
        model.generate(**batch, cache_implementation="paged", max_new_tokens=NEW, **settings)


@pytest.mark.parametrize("family", VARIED)
@torch.no_grad()
def test_assisted_decoding(family):
    _, model = wrap(family)
    batch = collate(family, [sample(family, 2, 2)])
    assistant = build(family, seed=1)
    expected = model.generate(**batch, max_new_tokens=NEW)
    assert torch.equal(model.generate(**batch, assistant_model=assistant, max_new_tokens=NEW), expected)


@pytest.mark.parametrize("family", VARIED)
@torch.no_grad()
def test_returned_scores_follow_the_tokens(family):
    _, model = wrap(family)
    _, batch = batch_of(family)
    output = model.generate(
        **batch,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    length = batch["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, :length], batch["input_ids"])
    assert torch.equal(torch.stack(output.scores, 1).argmax(-1), output.sequences[:, length:])
    longest = int((batch["attention_mask"].sum(1) - output.num_visual + output.num_kept).max())
    assert output.hidden_states[0][-1].shape[1] == longest
    assert output.keep_mask.sum() == output.num_kept.sum()


@pytest.mark.parametrize("ways", [{}, {"num_beams": 2}])
@pytest.mark.parametrize("settings", [{}, {"prune": False}, {"keep_ratio": 1.0}])
@torch.no_grad()
def test_a_returned_dict_says_what_was_kept(settings, ways):
    """Also where nothing is pruned: of prompts without an image, and with `prune=False`."""
    _, model = wrap("llava")
    samples, batch = batch_of("llava")
    for inputs in (batch, collate("llava", samples[:1]), collate("llava", samples[2:])):
        made = model.generate(**inputs, **settings, **ways, max_new_tokens=1, return_dict_in_generate=True)
        plan = model.prune(**inputs, **(settings or {"keep_ratio": 0.4}))
        for name in ("keep_mask", "num_kept", "num_visual"):
            assert torch.equal(made[name], getattr(plan, name))


@pytest.mark.parametrize("ways", [{}, {"num_beams": 2}])
@pytest.mark.parametrize("family", ["llava", "internvl"])
@torch.no_grad()
def test_embeddings_beside_ids_are_pruned_like_them(family, ways):
    base, model = wrap(family)
    samples, batch = batch_of(family)
    settings = {**batch, **ways, "max_new_tokens": NEW}
    embeds = base.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(model.generate(**settings, inputs_embeds=embeds), model.generate(**settings))
    other = embeds.clone()
    other[:, -3:] += 1.0
    made = model.generate(**settings, inputs_embeds=other)
    assert not torch.equal(made, model.generate(**settings))
    # without padding, some of which the tiny base model takes for placeholders
    settings = {**collate(family, samples[1:2]), **ways, "max_new_tokens": NEW}
    other = base.get_input_embeddings()(settings["input_ids"])
    other[:, -3:] += 1.0
    everything = model.generate(**settings, inputs_embeds=other, keep_ratio=1.0)
    assert torch.equal(everything, base.generate(**settings, inputs_embeds=other))


@torch.no_grad()
def test_attentions_are_over_the_pruned_prompt():
    _, model = wrap("llava")
    model.set_attn_implementation("eager")
    _, batch = batch_of("llava")
    output = model.generate(**batch, max_new_tokens=2, return_dict_in_generate=True, output_attentions=True)
    longest = int((batch["attention_mask"].sum(1) - output.num_visual + output.num_kept).max())
    assert output.attentions[0][0].shape[-2:] == (longest, longest)


@torch.no_grad()
def test_lengths_count_the_original_prompt():
    _, model = wrap("llava")
    _, batch = batch_of("llava")
    length = batch["input_ids"].shape[1]
    assert model.generate(**batch, max_length=length + 3).shape[1] == length + 3
    config = copy.deepcopy(model.generation_config)
    config.max_length = length + 2
    assert model.generate(**batch, generation_config=config).shape[1] == length + 2
    assert config.max_length == length + 2
    with pytest.raises(ValueError, match=f"{length} tokens, but max_length={length}"):
        model.generate(**batch, max_length=length)
    made = model.generate(
        **batch,
        eos_token_id=7,
        min_length=length + 2,
        max_new_tokens=4,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert [bool(step[0, 7].isinf()) for step in made.scores] == [True, True, False, False]


class Watch(LogitsProcessor):
    """Remembers what a user's logits processor is shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores


class StopAfter(StoppingCriteria):
    """Stops when the prompt it is shown has grown by two tokens."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length + 2)


@pytest.mark.parametrize("copies", [{}, {"num_beams": 2}])
@torch.no_grad()
def test_processors_and_criteria_see_the_original_prompt(copies):
    _, model = wrap("llava")
    _, batch = batch_of("llava")
    length, watch, allowed = batch["input_ids"].shape[1], Watch(), []

    def allow(batch_id, ids):
        allowed.append((batch_id, ids[:length]))
        return list(range(3, 50))

    made = model.generate(
        **batch,
        **copies,
        max_new_tokens=6,
        logits_processor=[watch],
        stopping_criteria=[StopAfter(length)],
        prefix_allowed_tokens_fn=allow,
    )
    prompts = batch["input_ids"].repeat_interleave(copies.get("num_beams", 1), 0)
    assert made.shape[1] == length + 2
    for step, ids in enumerate(watch.seen):
        assert ids.shape[1] == length + step
        assert torch.equal(ids[:, :length], prompts)
    assert all(torch.equal(ids, batch["input_ids"][row]) for row, ids in allowed)


OF_ITS_OWN_TYPES = {
    "penalty": lambda length: {
        "repetition_penalty": 3.0,
        "logits_processor": [RepetitionPenaltyLogitsProcessor(1.0001)],
    },
    "forced end": lambda length: {"logits_processor": [ForcedEOSTokenLogitsProcessor(length + 2, 9, "cpu")]},
    "length": lambda length: {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(length + 9)])},
    "end": lambda length: {"stopping_criteria": StoppingCriteriaList([EosTokenCriteria(50)])},
}


@pytest.mark.parametrize("case", OF_ITS_OWN_TYPES)
@torch.no_grad()
def test_processors_and_criteria_of_generates_own_types_replace_its_own(case):
    base, model = wrap("llava")
    _, batch = batch_of("llava")
    given = OF_ITS_OWN_TYPES[case]
    settings = {**batch, **given(batch["input_ids"].shape[1]), "max_new_tokens": 6}
    made = model.generate(**settings, keep_ratio=1.0)
    assert torch.equal(made, base.generate(**settings))
    assert not torch.equal(made, base.generate(**batch, max_new_tokens=6, repetition_penalty=3.0))
    assert model.generate(**settings).shape == made.shape


class EndsAs(StoppingCriteria):
    """A user's own criterion with the attribute by which `generate` knows that answers end one by one."""

    eos_token_id = torch.tensor([50])

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.eos_token_id


@torch.no_grad()
def test_an_own_criterion_that_ends_answers_pads_them():
    base, model = wrap("llava")
    _, batch = batch_of("llava")
    settings = {**batch, "stopping_criteria": StoppingCriteriaList([EndsAs()]), "max_new_tokens": 6}
    expected = base.generate(**settings)
    assert expected[0, -1] == PAD
    assert torch.equal(model.generate(**settings, keep_ratio=1.0), expected)


@torch.no_grad()
def test_streamer_gets_the_original_prompt_first():
    class Words:
        def decode(self, ids, **kwargs):
            ids = ids.tolist() if torch.is_tensor(ids) else ids
            return " ".join(map(str, [ids] if isinstance(ids, int) else ids)) + "\n"  # one id since transformers 5.24

    class Keep(TextStreamer):
        pieces = ()

        def on_finalized_text(self, text, stream_end=False):
            self.pieces = (*self.pieces, text)

    _, model = wrap("llava")
    batch = collate("llava", [sample("llava", 1, 1)])
    streamer = Keep(Words())
    made = model.generate(**batch, max_new_tokens=3, streamer=streamer)
    assert "".join(streamer.pieces).split() == [str(i) for i in made[0].tolist()]


# ---- conversations ----


def second_turn(first, words, batch):
    """The prompt of the second turn: what was returned, and new words."""
    new = torch.tensor(words)
    ids = torch.cat([first.sequences, new], 1)
    mask = torch.cat(
        [batch["attention_mask"], torch.ones(len(ids), ids.shape[1] - batch["attention_mask"].shape[1])], 1
    )
    return {**batch, "input_ids": ids, "attention_mask": mask.long(), **longer_types(batch, ids)}


def longer_types(batch, ids):
    names = [name for name in batch if name.endswith("token_type_ids")]
    return {name: torch.nn.functional.pad(batch[name], (0, ids.shape[1] - batch[name].shape[1])) for name in names}


@pytest.mark.parametrize("position_ids", ["original", "contiguous"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if not FAMILIES[f].uncached_differs])
@torch.no_grad()
def test_conversation_goes_on_from_a_returned_cache(family, position_ids):
    _, model = wrap(family, position_ids=position_ids)
    batch = collate(family, [sample(family, 1, 1), sample(family, 2, 2)])
    first = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    inputs = second_turn(first, [[7, 8, 9], [9, 8, 7]], batch)
    afresh = model.generate(**inputs, keep_mask=first.keep_mask, max_new_tokens=NEW)
    again = copy.deepcopy(first.past_key_values)
    assert torch.equal(model.generate(**inputs, past_key_values=first.past_key_values, max_new_tokens=NEW), afresh)
    # the pixels are not needed again
    bare = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
    assert torch.equal(model.generate(**bare, past_key_values=again, max_new_tokens=NEW), afresh)


def of_different_length(model, family):
    """The second turns of two samples, of which one says more, and the cache of their first."""
    batch = collate(family, [sample(family, 1, 1), sample(family, 2, 2)])
    first = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    inputs = second_turn(first, [[0, 0, 7, 8], [9, 8, 7, 6]], batch)
    inputs["attention_mask"][0, -4:-2] = 0
    order = inputs["attention_mask"].argsort(dim=1, stable=True)  # padding goes to the left
    along = {name: value.gather(1, order) for name, value in inputs.items() if value.shape == order.shape}
    return {**inputs, **along}, first


@pytest.mark.parametrize("family", [f for f in FAMILIES if not FAMILIES[f].uncached_differs])
@torch.no_grad()
def test_second_turns_of_different_length(family):
    _, model = wrap(family)
    inputs, first = of_different_length(model, family)
    settings = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    made = model.generate(**inputs, past_key_values=first.past_key_values, **settings)
    afresh = model.generate(**inputs, keep_mask=first.keep_mask, **settings)
    assert (torch.stack(made.logits) - torch.stack(afresh.logits)).abs().max() <= 2e-5


@pytest.mark.parametrize("family", ["lfm3_vl", "nemotron_h_omni", "qwen3_5"])
@torch.no_grad()
def test_padding_behind_a_state_is_refused(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    _, model = wrap(family)
    inputs, first = of_different_length(model, family)
    with pytest.raises(ValueError, match="carry a state"):
        model.generate(**inputs, past_key_values=first.past_key_values, max_new_tokens=NEW)
    output = model(**collate(family, [sample(family, 1, 1), sample(family, 2, 2)]), use_cache=True)
    mask = torch.cat([output.columns >= 0, torch.tensor([[False, True], [True, True]])], 1).long()
    with pytest.raises(ValueError, match="carry a state"):
        model(input_ids=torch.tensor([[0, 7], [8, 9]]), attention_mask=mask, past_key_values=output.past_key_values)


@pytest.mark.parametrize("penalty", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 1}])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_a_second_turn_is_scored_as_afresh(family, penalty):
    """Also where the padding token is one that an answer may have: nobody wrote it."""
    base, model = wrap(family)
    base.generation_config.pad_token_id = EOS
    batch = collate(family, [sample(family, 1, 1, text=8)])
    first = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    inputs = second_turn(first, [[11, 12, 13]], batch)
    settings = {**inputs, **penalty, "max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    again = model.generate(**settings, past_key_values=first.past_key_values)
    afresh = model.generate(**settings, keep_mask=first.keep_mask)
    assert torch.allclose(again.scores[0], afresh.scores[0], atol=2e-5)


@torch.no_grad()
def test_padding_of_pruned_prompts_is_not_penalised():
    """One column of it without a cache; in a batch where samples keep different numbers."""
    base, model = wrap("llava")
    base.generation_config.pad_token_id = EOS
    alone = collate("llava", [sample("llava", 2, 2, text=8)])
    settings = {
        "no_repeat_ngram_size": 1,
        "max_new_tokens": 1,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    made = model.generate(**alone, **settings, keep_ratio=1.0, use_cache=False).scores[0]
    assert torch.allclose(made, base.generate(**alone, **settings, use_cache=False).scores[0], atol=2e-5)
    batch = {name: value.repeat_interleave(2, 0) for name, value in alone.items()}
    keep_mask = torch.arange(int(model.prune(**batch).num_visual.sum())) > 9
    assert model.generate(**batch, **settings, keep_mask=keep_mask).scores[0][:, EOS].isfinite().all()


@pytest.mark.parametrize("family", [f for f in FAMILIES if not FAMILIES[f].uncached_differs])
@torch.no_grad()
def test_new_image_in_the_second_turn(family):
    _, model = wrap(family)
    both, start, rest = before_second_image(family)
    batch = collate(family, [start])
    first = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    more = type(both)(first.sequences[0].tolist() + rest, both.images)
    inputs = collate(family, [more])
    output = model.generate(
        **inputs, past_key_values=first.past_key_values, max_new_tokens=NEW, return_dict_in_generate=True
    )
    num_first = int(first.num_visual)
    assert torch.equal(output.keep_mask[:num_first], first.keep_mask)
    assert output.num_kept == first.num_kept + round(0.4 * (len(output.keep_mask) - num_first))
    afresh = model.generate(**inputs, keep_mask=output.keep_mask, max_new_tokens=NEW)
    assert torch.equal(output.sequences, afresh)


class NearestToQuestion(TokenPruner):
    """Keeps what is most similar to the question's words."""

    def score(self, inputs):
        question = (inputs.query * inputs.query_valid[..., None]).sum(1, keepdim=True)
        return torch.cosine_similarity(inputs.tokens, question, dim=-1)


@pytest.mark.parametrize("family", VARIED)
@torch.no_grad()
def test_second_question_gets_other_tokens_from_the_same_features(family):
    _, model = wrap(family)
    batch = collate(family, [sample(family, 2, 2)])
    features = model.encode_images(**batch)
    pixels = ("pixel_values", "pixel_attention_mask", "image_sizes")
    bare = {name: value for name, value in batch.items() if name not in pixels}
    second = {**bare, "input_ids": torch.cat([batch["input_ids"][:, :-5], torch.tensor([[11, 22, 33, 44, 55]])], 1)}
    assert torch.equal(model(**bare, visual_features=features).logits, model(**batch).logits)
    for pruner in (model.pruner, NearestToQuestion()):
        with model.using(pruner):
            plans = [model.prune(**prompt, visual_features=features, num_keep=3) for prompt in (batch, second)]
        assert not torch.equal(plans[0].scores, plans[1].scores)
    assert not torch.equal(plans[0].keep_mask, plans[1].keep_mask)
    model.config.query_agnostic = True
    plans = [model.prune(**prompt, visual_features=features) for prompt in (batch, second)]
    assert torch.equal(plans[0].scores, plans[1].scores)


@pytest.mark.parametrize("family", VARIED)
@torch.no_grad()
def test_many_masks_of_one_image_in_one_batch(family):
    _, model = wrap(family)
    batch = collate(family, [sample(family, 1, 1), sample(family, 2, 2)])
    features = model.encode_images(**batch).take([1, 0, 1])
    rows = {k: v[[1, 0, 1]] for k, v in batch.items() if k.endswith("_ids") or k == "attention_mask"}
    plans = [model.prune(**rows, visual_features=features, keep_ratio=ratio) for ratio in (0.2, 0.5)]
    logits = model(**rows, visual_features=features, keep_mask=plans[1].keep_mask, compact=True).logits
    bits = plans[1].keep_mask.split(plans[1].num_visual.tolist())
    for row, index in enumerate((1, 0, 1)):
        alone = collate(family, [[sample(family, 1, 1), sample(family, 2, 2)][index]])
        expected = model(**alone, keep_mask=bits[row], compact=True).logits[0]
        assert (logits[row, -len(expected) :] - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_all_tokens_of_one_image_dropped(family):
    _, model = wrap(family)
    batch = collate(family, [sample(family, 2, 2), sample(family, 1, 1)])
    plan = model.prune(**batch)
    keep_mask = plan.layout.image != 0
    made = model.generate(**batch, keep_mask=keep_mask, max_new_tokens=NEW, return_dict_in_generate=True)
    assert made.num_kept[0] < made.num_visual[0]
    none = torch.zeros_like(keep_mask)
    assert model.generate(**batch, keep_mask=none, max_new_tokens=NEW).shape == made.sequences.shape


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward_step_by_step_equals_generate(family):
    _, model = wrap(family)
    _, batch = batch_of(family)
    length = batch["input_ids"].shape[1]
    expected = model.generate(**batch, max_new_tokens=NEW)[:, length:]
    output = model(**batch, use_cache=True)
    tokens = []
    for _ in range(NEW):
        tokens.append(output.logits[:, -1].argmax(-1))
        output = model(input_ids=tokens[-1][:, None], past_key_values=output.past_key_values, use_cache=True)
    assert torch.equal(torch.stack(tokens, 1), expected)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@torch.no_grad()
def test_a_conversation_with_the_base_model_is_not_disturbed(family):
    """M-RoPE models keep an offset between calls of `forward`; a pruned call in between does not replace it."""
    _, model = wrap(family)
    batch = collate(family, [sample(family, 2, 2)])
    outputs = [model.lvlm(**batch, use_cache=True) for _ in range(2)]
    word = outputs[0].logits[:, -1:].argmax(-1)
    expected = model.lvlm(input_ids=word, past_key_values=outputs[0].past_key_values).logits
    other = model(**collate(family, [sample(family, 1, 1)]), use_cache=True)
    model(input_ids=word, past_key_values=other.past_key_values)
    model.generate(**collate(family, [sample(family, 1, 3)]), max_new_tokens=NEW)
    found = model.lvlm(input_ids=word, past_key_values=outputs[1].past_key_values).logits
    assert torch.equal(found, expected)


@torch.no_grad()
def test_positions_behind_a_cache_are_taken_as_given():
    """PaliGemma counts from 1 in a direct forward; each step is compared with the base model's."""
    base, model = wrap("paligemma")
    batch = collate("paligemma", [sample("paligemma", 1, 1)])
    length = batch["input_ids"].shape[1]

    def steps(of, given, **settings):
        positions = {"position_ids": torch.arange(1, length + 1)[None]} if given[0] else {}
        output = of(**batch, **positions, **settings, use_cache=True)
        logits = []
        for step, is_given in enumerate(given[1:], start=1):
            positions = {"position_ids": torch.tensor([[length + step]])} if is_given else {}
            output = of(
                input_ids=torch.tensor([[6 + step]]),
                attention_mask=torch.ones(1, length + step, dtype=torch.long),
                token_type_ids=torch.ones(1, 1, dtype=torch.long),
                **{CACHE_NAME: output[CACHE_NAME]},
                **positions,
            )
            logits.append(output.logits[:, -1])
        return torch.stack(logits)

    expected = steps(base, (False, False, False))
    for given in ((False, True, False), (True, False, True), (True, True, True)):
        for keep in ({"keep_ratio": 1.0}, {"prune": False}):
            assert (steps(model, given, **keep) - expected).abs().max() <= 2e-5


@torch.no_grad()
def test_own_caches_are_filled():
    _, model = wrap("llava")
    batch = collate("llava", [sample("llava", 1, 1)])
    cache = DynamicCache(config=model.config.get_text_config())
    expected = model.generate(**batch, max_new_tokens=NEW)
    assert torch.equal(model.generate(**batch, past_key_values=cache, max_new_tokens=NEW), expected)
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
    assert torch.equal(model.generate(**batch, past_key_values=static, max_new_tokens=NEW), expected)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("prune", [None, False])
@torch.no_grad()
def test_a_cache_has_two_names_and_none_that_transformers_deprecates(name, prune):
    """`past_key_values` until transformers 5.24, `cache` since; ours take both with every release."""
    _, model = wrap("llava")
    batch = collate("llava", [sample("llava", 1, 1)])
    expected = model.generate(**batch, prune=prune, max_new_tokens=NEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        cache = DynamicCache(config=model.config.get_text_config())
        assert torch.equal(model.generate(**batch, **{name: cache}, prune=prune, max_new_tokens=NEW), expected)
        output = model(**batch, **{name: DynamicCache(config=model.config.get_text_config())}, prune=prune)
        again = model(input_ids=expected[:, -NEW:], **{name: output[CACHE_NAME]}, prune=prune)
    assert output.past_key_values is output[CACHE_NAME] is again[CACHE_NAME]
    assert CACHE_NAME in output and output.to_tuple()[1] is output[CACHE_NAME]


@torch.no_grad()
def test_a_cache_by_both_names_is_refused():
    _, model = wrap("llava")
    batch = collate("llava", [sample("llava", 1, 1)])
    both = {"past_key_values": DynamicCache(), "cache": DynamicCache()}
    for call in (model.forward, model.generate):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(**batch, **both)


@torch.no_grad()
def test_foreign_and_mismatched_caches_are_refused():
    base, model = wrap("llava")
    batch = collate("llava", [sample("llava", 1, 1)])
    foreign = base.generate(**batch, max_new_tokens=2, return_dict_in_generate=True)
    longer = torch.cat([foreign.sequences, torch.tensor([[5]])], 1)
    inputs = {**batch, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
    for place in (1, batch["input_ids"].shape[1] - 1):
        other = {**inputs, "input_ids": longer.clone()}
        other["input_ids"][0, place] += 1
        with pytest.raises(ValueError, match="did not prune"):
            model.generate(**other, past_key_values=copy.deepcopy(foreign.past_key_values))
    cut = copy.deepcopy(foreign.past_key_values)
    for layer in cut.layers:  # a column in the middle is not there
        layer.keys, layer.values = (torch.cat([x[:, :, :9], x[:, :, 10:]], 2) for x in (layer.keys, layer.values))
    with pytest.raises(ValueError, match="did not prune"):
        model.generate(**inputs, past_key_values=cut)
    made = model.generate(**inputs, past_key_values=foreign.past_key_values, max_new_tokens=NEW)
    assert torch.equal(made, base.generate(**inputs, max_new_tokens=NEW))
    first = model.generate(**batch, max_new_tokens=2, return_dict_in_generate=True)
    inputs["input_ids"][0, 1] += 1
    with pytest.raises(ValueError, match="differs from the cached conversation at pruned token 1"):
        model.generate(**inputs, past_key_values=first.past_key_values)
    with pytest.raises(ValueError, match="at least one new token"):
        model.generate(**batch, past_key_values=first.past_key_values)


@pytest.mark.parametrize("keep", [{}, {"prune": False}])
@torch.no_grad()
def test_a_custom_generate_may_return_anything(keep):
    _, model = wrap("llava")
    _, batch = batch_of("llava")

    def greedy(base, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
        more = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
        return base._sample(input_ids, generation_config=generation_config, **more, **inputs)

    expected = model.generate(**batch, **keep, max_new_tokens=NEW)
    made = model.generate(**batch, **keep, max_new_tokens=NEW, custom_generate=greedy)
    assert torch.equal(made, expected)
    answer = {"custom_generate": lambda *args, **inputs: ("answer", 0.5)}
    assert model.generate(**batch, **keep, **answer, max_new_tokens=NEW) == ("answer", 0.5)


@pytest.mark.parametrize("own", [None, PAD])
@pytest.mark.parametrize("how", ["argument", "config"])
@torch.no_grad()
def test_without_a_mask_the_calls_padding_token_tells_padding(own, how):
    """As in the base model, whose config names another one, or none."""
    base, model = wrap("llava")
    base.generation_config.pad_token_id = own
    _, batch = batch_of("llava")
    mask = batch.pop("attention_mask")
    batch["input_ids"][mask == 0] = 3
    settings = {"max_new_tokens": NEW, "pad_token_id": 3}
    if how == "config":
        settings = {"generation_config": GenerationConfig(**settings)}
    assert torch.equal(model.generate(**batch, keep_ratio=1.0, **settings), base.generate(**batch, **settings))
    assert torch.equal(model.generate(**batch, **settings), model.generate(**batch, attention_mask=mask, **settings))


@pytest.mark.parametrize("longer", [-1, 0, 1])
@torch.no_grad()
def test_a_negative_prompt_is_read_whole(longer):
    base, model = wrap("llava")
    batch = collate("llava", [sample("llava", 2, 2, text=8)])
    negative = torch.arange(batch["input_ids"].shape[1] + longer)[None] % 50 + 5
    mask = torch.ones_like(negative)
    settings = {"guidance_scale": 3.0, "negative_prompt_ids": negative, "negative_prompt_attention_mask": mask}
    read = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, arguments, output: read.append(arguments[0]))
    model.generate(**batch, **settings, max_new_tokens=1)
    handle.remove()
    assert any(torch.equal(ids, negative) for ids in read)
    expected = base.generate(**batch, **settings, max_new_tokens=3)
    assert torch.equal(model.generate(**batch, **settings, keep_ratio=1.0, max_new_tokens=3), expected)


@pytest.mark.parametrize("longer", [0, 1])
@torch.no_grad()
def test_a_second_look_has_its_samples_negative_prompts(longer):
    _, model = wrap("llava")
    _, batch = batch_of("llava")
    negative = torch.arange(3 * (batch["input_ids"].shape[1] + longer)).view(3, -1) % 50 + 5
    settings = {"guidance_scale": 3.0, "negative_prompt_ids": negative, "max_new_tokens": 3}
    made = model.generate(
        **batch, **settings, escalate=Escalation(keep_ratio=0.9, below=1.0), return_dict_in_generate=True
    )
    assert 0 < made.is_escalated.sum() < 3
    expected = model.generate(**batch, **settings, keep_ratio=0.9)
    assert torch.equal(made.sequences[made.is_escalated], expected[made.is_escalated])


@torch.no_grad()
def test_random_state_does_not_matter_to_pruning():
    _, model = wrap("llava")
    batch = collate("llava", [sample("llava", 1, 1)])
    with model.using(RandomPruner(keep_ratio=0.5)):
        first = model.prune(**batch).keep_mask
        torch.manual_seed(123)
        assert torch.equal(model.prune(**batch).keep_mask, first)
    assert batch["input_ids"][0, 0] == BOS
