"""A conversation that goes on from a cache is the same conversation without one, however the cache came to be.

Each turn of a chat is compared with the whole conversation afresh, with the keep masks that the cache was filled with:
the same tokens, from the same logits.
"""

import copy
import io
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, StaticCache

from tests.families.more import OTHERS
from tests.families.tiny_models import (
    FAMILIES,
    IMAGE,
    PAD,
    VIDEO,
    Sample,
    build,
    collate,
    entry,
    image_token,
    num_placeholders,
    sample,
)
from tests.families.ways_to_generate import CANNOT
from tprl_hf.modeling import TPRLForConditionalGeneration
from tprl_hf.modeling.cached_prompt import CACHE_NAME

NEW = 3
CONTINUED = [family for family in (*FAMILIES, *OTHERS) if "new image" not in CANNOT.get(family, {})]
# One for each container of features, with several axes of positions, with sliding windows, and with layers of a state.
VARIED = ("llava", "qwen3_vl", "internvl", "idefics3", "gemma3", "qwen3_5")
# Their images are read in both directions: in molmo2 each sees all others, in gemma3 only itself.
SEE_LATER_IMAGES, SEE_WHOLE_IMAGES = ("molmo2",), ("gemma3",)
STATEFUL = ("qwen3_5",)  # the library neither crops, repeats nor selects their caches
NUM_IMAGES = {"text": 0, "image": 1, "two images": 2}


def wrap(family, **settings):
    numbering = "contiguous" if entry(family).own_positions else "original"
    settings = {"latent_dim": 8, "keep_ratio": 0.4, "pruner": "divprune", "position_ids": numbering, **settings}
    base = build(family)
    return base, TPRLForConditionalGeneration.from_base_model(base, **settings).eval()


@dataclass
class Chat:
    """One conversation: what was said, what was shown, which tokens were kept, and the cache."""

    family: str
    model: TPRLForConditionalGeneration
    ids: list[int] = field(default_factory=lambda: [1])
    images: list = field(default_factory=list)
    cache: object = None
    keep_mask: torch.Tensor | None = None
    seed: int = 0

    def say(self, kind):
        """Adds a user's turn with the images of `kind`."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)

        def words(count):
            return torch.randint(5, 60, (count,), generator=generator).tolist()

        self.ids += words(2)
        for index in range(NUM_IMAGES[kind]):
            self.images.append(entry(self.family).image(generator, self.seed + index))
            self.ids += [image_token(self.family)] * num_placeholders(self.family, self.images[-1]) + words(1)
        self.ids += words(2)

    @property
    def inputs(self):
        return collate(self.family, [Sample(self.ids, self.images)])

    def answer(self, **settings):
        """The next turn from the cache, which is that of the whole conversation without one."""
        output = generate(self.model, self.inputs, past_key_values=self.cache, **settings)
        self.keep_mask = output.get("keep_mask")
        check_afresh(self.model, self.inputs, output)
        self.ids, self.cache = output.sequences[0].tolist(), output.past_key_values


def generate(model, inputs, **settings):
    settings = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True, **settings}
    if settings.get("past_key_values") is None:
        settings.pop("past_key_values", None)
    return model.generate(**inputs, **settings)


def check_afresh(model, inputs, output, **settings):
    """`output` is that of the same prompts without a cache."""
    keep = {"prune": False} if output.get("keep_mask") is None else {"keep_mask": output.keep_mask}
    afresh = generate(model, inputs, **keep, **settings)
    assert torch.equal(output.sequences, afresh.sequences)
    assert (torch.stack(output.logits) - torch.stack(afresh.logits)).abs().max() <= 5e-5


@pytest.mark.parametrize("family", CONTINUED)
@torch.no_grad()
def test_three_turns(family):
    """The second and the third go on from what the one before returned, the third with a new image."""
    chat = Chat(family, wrap(family)[1])
    for kind in ("image", "text", "text" if family in SEE_LATER_IMAGES else "image"):
        before = chat.keep_mask
        chat.say(kind)
        chat.answer()
        if before is not None:  # what was chosen stays
            assert torch.equal(chat.keep_mask[: len(before)], before)
    assert chat.keep_mask.sum() < len(chat.keep_mask) or len(chat.keep_mask) == len(chat.images)


@pytest.mark.parametrize("first", NUM_IMAGES)
@pytest.mark.parametrize("family", VARIED)
@torch.no_grad()
def test_four_turns(family, first):
    """Any order of text and images; the last turn is about what was shown before."""
    model = wrap(family)[1]
    kinds = list(NUM_IMAGES)
    for second, third in zip(kinds, (*kinds[1:], kinds[0]), strict=True):
        chat = Chat(family, model)
        for kind in (first, second, third, "text"):
            chat.say(kind)
            chat.answer()


# ---- ways to store and fill a cache ----


def saved_and_loaded(chat):
    buffer = io.BytesIO()
    torch.save(chat.cache, buffer)
    buffer.seek(0)
    chat.cache = torch.load(buffer, weights_only=False)


def copied(chat):
    chat.cache, before = copy.deepcopy(chat.cache), chat.cache
    before.reset()  # nothing of a copy is the copied one's


def last_token_cropped(chat):
    chat.cache.crop(-1)


def answer_cropped(chat):
    """Another answer takes the place of the one that was given."""
    chat.cache.crop(1 - NEW)
    chat.ids = chat.ids[:-NEW]


def images_cropped(chat):
    """Back into the first image: those behind are pruned anew."""
    chat.cache.crop(6 - chat.cache.get_seq_length())


def moved_by_hand(chat):
    """Layer by layer, as users do who store caches."""
    for layer in chat.cache.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


STORED = {
    function.__name__.replace("_", " "): function
    for function in (saved_and_loaded, copied, last_token_cropped, answer_cropped, images_cropped, moved_by_hand)
}
CROPPING = ("last token cropped", "answer cropped", "images cropped")


@pytest.mark.short
@pytest.mark.parametrize("way", STORED)
@pytest.mark.parametrize("family", VARIED)
@torch.no_grad()
def test_stored_and_cropped(family, way):
    if family in STATEFUL and (way in CROPPING or way == "moved by hand"):
        pytest.skip("the library does not crop a state, which has no keys")
    if family in SEE_WHOLE_IMAGES and way == "images cropped":
        pytest.skip("what is left of an image has seen what is gone")
    if family in SEE_WHOLE_IMAGES and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("a new image behind a cache is answered otherwise by older releases: docs/quickstart.md")
    for kinds in (("image", "text", "image"), ("text", "two images", "text")):
        chat = Chat(family, wrap(family)[1])
        for kind in kinds:
            chat.say(kind)
            chat.answer()
            STORED[way](chat)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("family", VARIED)
@torch.no_grad()
def test_own_cache_is_filled_turn_by_turn(family, implementation):
    """The cache that a call is given, and not what it returns; emptied, it serves another conversation."""
    model = wrap(family)[1]
    config = model.lvlm.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config) if implementation == "dynamic" else StaticCache(config, max_cache_len=160)
    for seed in (0, 40):
        chat = Chat(family, model, cache=cache, seed=seed)
        for kind in ("image", "text", "text"):
            chat.say(kind)
            chat.answer()
            assert chat.cache is cache
        cache.reset()


FILLED = ("forward", "forward unpruned", "forward word by word", "unpruned", "base", "base forward", "text only")


@pytest.mark.parametrize("way", FILLED)
@pytest.mark.parametrize("family", VARIED)
@torch.no_grad()
def test_filled_by_another_call(family, way):
    base, model = wrap(family)
    if family in STATEFUL and way.startswith("base"):
        pytest.skip("keys of its first layer of attention depend on more than their token")
    chat = Chat(family, model)
    chat.say("text" if way == "text only" else "image")
    if way in ("unpruned", "text only"):
        chat.answer(**({"prune": False} if way == "unpruned" else {}))
    elif way == "base":
        output = base.generate(**chat.inputs, max_new_tokens=NEW, return_dict_in_generate=True)
        chat.ids, chat.cache = output.sequences[0].tolist(), output.past_key_values
    else:
        reads = base if way == "base forward" else model
        settings = {"prune": False} if way == "forward unpruned" else {}
        output = reads(**chat.inputs, **settings, use_cache=True)
        for _ in range(3 * (way == "forward word by word")):
            chat.ids.append(int(output.logits[0, -1].argmax()))
            word = torch.tensor([chat.ids[-1:]])
            output = model(input_ids=word, past_key_values=output.past_key_values, use_cache=True)
        chat.cache = output.past_key_values
    for kind in ("text", "image", "text"):
        chat.say(kind)
        chat.answer()


ANSWERED = {
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "assisted": {},
    "chunked prefill": {"prefill_chunk_size": 5},
    "sampled": {"do_sample": True, "suppress_tokens": [IMAGE, VIDEO]},
}


@pytest.mark.parametrize("way", ANSWERED)
@pytest.mark.parametrize("family", [family for family in VARIED if family not in STATEFUL])
@torch.no_grad()
def test_turns_answered_otherwise(family, way):
    """The cache that each way to generate leaves serves the next turn."""
    if family in SEE_WHOLE_IMAGES and way == "chunked prefill":
        pytest.skip("the base model itself reads an image by chunks otherwise than whole")
    chat = Chat(family, wrap(family)[1])
    settings = ANSWERED[way] or {"assistant_model": build(family, seed=1)}
    for kind in ("image", "text", "image"):
        chat.say(kind)
        if way in ("prompt lookup", "assisted") and chat.cache is not None:
            with pytest.raises(ValueError, match="read the whole prompt again"):
                generate(chat.model, chat.inputs, past_key_values=chat.cache, **settings)
            chat.cache = None
        torch.manual_seed(chat.seed)
        output = generate(chat.model, chat.inputs, past_key_values=chat.cache, **settings)
        chat.ids, chat.cache = output.sequences[0].tolist(), output.past_key_values
        chat.say("text")
        chat.answer()


@pytest.mark.parametrize("family", VARIED)
@torch.no_grad()
def test_pixels_are_needed_for_new_images_only(family):
    chat = Chat(family, wrap(family)[1])
    for kind in ("two images", "text", "text"):
        chat.say(kind)
        inputs = chat.inputs
        if chat.cache is not None:
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            inputs |= entry(family).extras(inputs["input_ids"])
        output = generate(chat.model, inputs, past_key_values=chat.cache)
        check_afresh(chat.model, chat.inputs, output)
        chat.ids, chat.cache = output.sequences[0].tolist(), output.past_key_values


# ---- batches ----


def questions(rows, samples, order):
    """The next prompts of a batch: what was said in each row so far, and a question of its own, as one batch."""
    asked = [
        Sample([*row, 10 + index, 20 + index, 30], samples[i].images)
        for index, (row, i) in enumerate(zip(rows, order, strict=True))
    ]
    return asked


def padded_like(inputs, rows):
    """The mask of a batch whose rows begin with padding already."""
    starts = torch.tensor([next(place for place, token in enumerate(row) if token != PAD) for row in rows])
    return {**inputs, "attention_mask": (torch.arange(inputs["input_ids"].shape[1]) >= starts[:, None]).long()}


def two_samples(family):
    """The same words about two images, where these can have one size: ids do not tell them apart."""
    one, other = sample(family, 1, 3), sample(family, 1, 6)
    same = num_placeholders(family, one.images[0]) == num_placeholders(family, other.images[0])
    return [one, Sample(one.ids, other.images) if same else other]


def bits_of(output, order):
    bits = output.keep_mask.split(output.num_visual.tolist())
    return torch.cat([bits[row] for row in order])


ROWS = {
    "repeated": ([0, 0, 1, 1], lambda cache: cache.batch_repeat_interleave(2), {}),
    "repeated for beams": ([0, 1], lambda cache: cache.batch_repeat_interleave(2), {"num_beams": 2}),
    "selected": ([1], lambda cache: cache.batch_select_indices(torch.tensor([1])), {}),
    "reordered": ([1, 0], lambda cache: cache.reorder_cache(torch.tensor([1, 0])), {}),
    "selected and repeated": ([1, 1, 1], lambda cache: cache.batch_select_indices(torch.tensor([1, 1, 1])), {}),
}


@pytest.mark.short
@pytest.mark.parametrize("way", ROWS)
@pytest.mark.parametrize("family", [family for family in VARIED if family not in STATEFUL])
@torch.no_grad()
def test_rows_of_a_cache(family, way):
    model, samples = wrap(family)[1], two_samples(family)
    output = generate(model, collate(family, samples))
    order, change, settings = ROWS[way]
    change(output.past_key_values)
    for _ in range(1 if settings else 2):
        rows = [output.sequences[row].tolist() for row in order]
        inputs = padded_like(collate(family, questions(rows, samples, order)), rows)
        following = generate(model, inputs, past_key_values=output.past_key_values, **settings)
        assert torch.equal(following.keep_mask, bits_of(output, order))
        check_afresh(model, inputs, following, **settings)
        output, samples, order = following, [samples[row] for row in order], list(range(len(order)))


@pytest.mark.parametrize("family", VARIED)
@torch.no_grad()
def test_rows_reordered_between_steps_of_forward(family):
    """As a search of one's own does: positions and masks follow their rows."""
    model, samples = wrap(family)[1], [sample(family, 1, 1), sample(family, 2, 2)]
    words = torch.tensor([[7], [8]])
    output = model(**collate(family, samples), use_cache=True)
    expected = model(input_ids=words, past_key_values=copy.deepcopy(output.past_key_values)).logits
    output.past_key_values.reorder_cache(torch.tensor([1, 0]))
    found = model(input_ids=words.flip(0), past_key_values=output.past_key_values)
    assert (found.logits.flip(0) - expected).abs().max() <= 5e-5
    found.past_key_values.reorder_cache(torch.tensor([1, 0]))
    asked = [Sample([*one.ids, 7 + index, 40, 41], one.images) for index, one in enumerate(samples)]
    inputs = collate(family, asked)
    check_afresh(model, inputs, generate(model, inputs, past_key_values=found.past_key_values))


@pytest.mark.parametrize("family", VARIED)
@torch.no_grad()
def test_several_answers_go_on(family):
    model, samples = wrap(family)[1], two_samples(family)
    torch.manual_seed(0)
    output = generate(model, collate(family, samples), do_sample=True, num_return_sequences=2)
    order = [0, 0, 1, 1]
    rows = output.sequences.tolist()
    assert len(set(map(tuple, rows))) == 4
    inputs = padded_like(collate(family, questions(rows, samples, order)), rows)
    following = generate(model, inputs, past_key_values=output.past_key_values)
    assert torch.equal(following.keep_mask, bits_of(output, order))
    check_afresh(model, inputs, following)


@pytest.mark.parametrize("family", [family for family in VARIED if family not in STATEFUL])
@pytest.mark.parametrize("returned", [1, 3])
@torch.no_grad()
def test_after_a_beam_search_the_prompt_is_known(family, returned):
    """As many sequences as beams are returned in another order than that of the cache's rows."""
    model, samples = wrap(family)[1], two_samples(family)
    output = generate(model, collate(family, samples), num_beams=3, num_return_sequences=returned)
    cache, rows = output.past_key_values, output.sequences[::returned].tolist()
    inputs = padded_like(collate(family, questions(rows, samples, [0, 1])), rows)
    with pytest.raises(ValueError, match="6 rows, but 2 prompts"):
        generate(model, inputs, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"written by a beam search.*crop\(-2\)"):
        generate(model, inputs, past_key_values=cache)
    cache.crop(-2)
    check_afresh(model, inputs, generate(model, inputs, past_key_values=cache))


@pytest.mark.parametrize("masked", [True, False], ids=["padding masked", "padding read"])
@pytest.mark.parametrize("family", VARIED)
@torch.no_grad()
def test_answers_that_end_at_different_steps(family, masked):
    """Behind the shorter answer the cache has padding, which the next prompt may leave out or have."""
    model, samples = wrap(family)[1], [sample(family, 1, 1), sample(family, 2, 2)]
    batch = collate(family, samples)
    length = batch["input_ids"].shape[1]
    plain = generate(model, batch, max_new_tokens=6).sequences[:, length:].tolist()
    ends = next(token for row, other in (plain, plain[::-1]) for token in row[:-2] if token not in other)
    output = generate(model, batch, max_new_tokens=6, eos_token_id=ends)
    answers = output.sequences[:, length:]
    assert (answers == PAD).any(1).sum() == 1
    rows = [one.ids + answer.tolist() for one, answer in zip(samples, answers, strict=True)]
    if masked:
        rows = [[token for token in row if token != PAD] for row in rows]
    inputs = collate(family, questions(rows, samples, [0, 1]))
    if masked and family in STATEFUL:
        with pytest.raises(ValueError, match="carry a state"):
            generate(model, inputs, past_key_values=output.past_key_values)
        return
    following = generate(model, inputs, past_key_values=output.past_key_values)
    assert torch.equal(following.keep_mask, output.keep_mask)
    check_afresh(model, inputs, following)


@torch.no_grad()
def test_answers_that_end_at_different_steps_without_a_padding_token():
    """`generate` then writes the token that ends answers behind the shorter one."""
    family = "llava"
    base, model = wrap(family)
    base.generation_config.pad_token_id, samples = None, [sample(family, 1, 1), sample(family, 2, 2)]
    batch = collate(family, samples)
    length = batch["input_ids"].shape[1]
    plain = generate(model, batch, max_new_tokens=6).sequences[:, length:].tolist()
    ends = next(token for row, other in (plain, plain[::-1]) for token in row[:-2] if token not in other)
    output = generate(model, batch, max_new_tokens=6, eos_token_id=[ends, 98])
    answers = output.sequences[:, length:].tolist()
    assert any(answer.count(ends) > 1 for answer in answers)
    for many in (1, 6):  # without what was written behind, and with it
        shown = [answer[: answer.index(ends) + many] if ends in answer else answer for answer in answers]
        rows = [one.ids + answer for one, answer in zip(samples, shown, strict=True)]
        inputs = collate(family, questions(rows, samples, [0, 1]))
        following = generate(model, inputs, past_key_values=copy.deepcopy(output.past_key_values))
        assert torch.equal(following.keep_mask, output.keep_mask)
        check_afresh(model, inputs, following)


@pytest.mark.parametrize("family", [family for family in VARIED if family not in STATEFUL])
@torch.no_grad()
def test_turns_of_different_length(family):
    """Three turns of a batch, whose rows are padded anew each time; in the second, one of them gets an image."""
    model = wrap(family)[1]
    samples, cache = [sample(family, 1, 1), sample(family, 0, 2), sample(family, 2, 3)], None
    shown = sample(family, 1, 5)
    for turn in range(3):
        if turn == 1:
            samples[1] = Sample(samples[1].ids + shown.ids[1:], shown.images)
        asked = [Sample([*one.ids, *range(10, 11 + turn + 2 * row)], one.images) for row, one in enumerate(samples)]
        inputs = collate(family, asked)
        output = generate(model, inputs, past_key_values=cache)
        check_afresh(model, inputs, output)
        answers = output.sequences[:, -NEW:].tolist()
        samples = [Sample(one.ids + answer, one.images) for one, answer in zip(asked, answers, strict=True)]
        cache = output.past_key_values
    if family == "gemma3":
        return  # padding counts in its window of 64 columns
    samples[0] = Sample(samples[0].ids + shown.ids[1:], samples[0].images + shown.images)
    inputs = collate(family, [Sample([*one.ids, 10], one.images) for one in samples])
    cache.batch_repeat_interleave(2)
    check_afresh(model, inputs, generate(model, inputs, past_key_values=cache, num_beams=2), num_beams=2)


@pytest.mark.parametrize("filled_by", ["forward", "generate"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
@torch.no_grad()
def test_a_mask_of_a_step_reaches_what_is_cached(family, filled_by):
    """It hides words of the prompt and of the answer, as in the base model, whether tokens were pruned or not."""
    base, model = wrap(family)
    batch = collate(family, [sample(family, 1, 1), sample(family, 1, 4)])
    length, words = batch["input_ids"].shape[1], torch.tensor([[7, 8], [9, 10]])

    def step(of, hidden, **settings):
        if filled_by == "forward":
            output = of(**batch, **settings, use_cache=True)
        else:
            output = generate(of, batch, **settings)
        mask = torch.ones(2, length + 2 + (NEW - 1) * (filled_by == "generate"), dtype=torch.long)
        mask[:, hidden] = 0
        return of(input_ids=words, attention_mask=mask, **{CACHE_NAME: output[CACHE_NAME]}).logits

    for hidden in (length - 2, -3):
        expected = step(base, hidden)
        for keep in ({"keep_ratio": 1.0}, {"prune": False}):
            assert (step(model, hidden, **keep) - expected).abs().max() <= 5e-5
        assert (step(model, hidden) - step(model, slice(0, 0))).abs().max() > 1e-3


@pytest.mark.parametrize("filled_by", ["base", "model in training"])
@torch.no_grad()
def test_without_a_budget_steps_are_those_of_the_base_model(filled_by):
    """Whoever filled the cache: nothing was pruned."""
    base, model = wrap("llava", keep_ratio=None, pruner=None, policy_training={"stage": "lfd"})
    batch, words = collate("llava", [sample("llava", 1, 1), sample("llava", 2, 2)]), torch.tensor([[7], [8]])
    expected = base(input_ids=words, **{CACHE_NAME: base(**batch, use_cache=True)[CACHE_NAME]}).logits
    reads = base if filled_by == "base" else model.train()
    cache = reads(**batch, use_cache=True)[CACHE_NAME]
    assert (model(input_ids=words, past_key_values=cache).logits - expected).abs().max() <= 2e-5
    with pytest.raises(ValueError, match="did not prune"):
        model(input_ids=words, past_key_values=reads(**batch, use_cache=True)[CACHE_NAME], num_keep=3)


# ---- caches of something else ----


def asked_of(family, chat, **changes):
    other = copy.copy(chat)
    other.ids, other.images = list(chat.ids), list(chat.images)
    for name, value in changes.items():
        setattr(other, name, value)
    return other.inputs


@pytest.mark.parametrize("family", VARIED)
@torch.no_grad()
def test_a_cache_of_another_conversation_is_refused(family):
    base, model = wrap(family)
    chat = Chat(family, model)
    for kind in ("image", "text"):
        chat.say(kind)
        chat.answer()
    chat.say("text")
    first_image = chat.ids.index(image_token(family))
    cases = {
        "another word": ([*chat.ids[:1], chat.ids[1] + 1, *chat.ids[2:]], "differs .* at pruned token 1"),
        "another answer": ([*chat.ids[:-6], chat.ids[-6] + 1, *chat.ids[-5:]], "differs .* at pruned token"),
        "no image": ([token for token in chat.ids if token != image_token(family)], "has 0 visual tokens"),
        "nothing new": (chat.ids[:-5], "at least one new token"),
        "a word before": ([*chat.ids[:1], 50, *chat.ids[1:]], "differs .* at pruned token 1"),
        "a smaller image": (chat.ids[: first_image - 1] + chat.ids[first_image + 1 :], "visual tokens"),
    }
    for ids, message in cases.values():
        inputs = asked_of(family, chat, ids=ids, images=[])
        with pytest.raises(ValueError, match=message):
            generate(model, inputs, past_key_values=copy.deepcopy(chat.cache))
    if family not in STATEFUL:
        chat.cache.crop(-2)
    other = copy.deepcopy(chat.cache)
    base(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=other)
    with pytest.raises(ValueError, match="tokens are unknown"):
        generate(model, chat.inputs, past_key_values=other)
    if family not in STATEFUL:
        other.crop(-1)  # as many columns as there were, of which two are others
        with pytest.raises(ValueError, match="other columns than"):
            generate(model, chat.inputs, past_key_values=other)
    lost = copy.deepcopy(chat.cache)
    del lost.tprl_cached_prompt  # as in a cache that was put together from the tensors of another
    with pytest.raises(ValueError, match="did not prune"):
        generate(model, chat.inputs, past_key_values=lost)


@torch.no_grad()
def test_a_keep_mask_that_is_not_the_caches_is_refused():
    chat = Chat("llava", wrap("llava")[1])
    chat.say("image")
    chat.answer()
    chat.say("image")
    mask = torch.cat([chat.keep_mask, ~chat.keep_mask])
    with pytest.raises(ValueError, match="about 16 visual tokens"):
        generate(chat.model, chat.inputs, past_key_values=copy.deepcopy(chat.cache), keep_mask=~mask)
    output = generate(chat.model, chat.inputs, past_key_values=chat.cache, keep_mask=mask)
    assert torch.equal(output.keep_mask, mask)
    check_afresh(chat.model, chat.inputs, output)


@torch.no_grad()
def test_rows_of_another_number_are_refused():
    model, samples = wrap("llava")[1], two_samples("llava")
    output = generate(model, collate("llava", samples))
    inputs = collate("llava", questions(output.sequences.tolist()[:1], samples, [0]))
    with pytest.raises(ValueError, match="2 rows, but 1 prompts"):
        generate(model, inputs, past_key_values=output.past_key_values)
    with pytest.raises(ValueError, match=r"Row 1 .* is not the same as row 0"):
        generate(model, inputs, past_key_values=output.past_key_values, num_beams=2)
