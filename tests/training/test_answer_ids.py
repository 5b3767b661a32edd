"""Where answers end: a reference has the tokens that a model would say, and an answer none of the filler behind it."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers
from transformers import CLIPImageProcessorPil, LlamaTokenizer, LlavaProcessor, PreTrainedTokenizerFast

import tprl_hf
from tests.families.tiny_models import IMAGE
from tprl_hf.data import mosaic_vqa
from tprl_hf.evaluation.compare_pruners import Setting, compare_pruners
from tprl_hf.loading import load_model
from tprl_hf.training.answer_batches import SampleEncoder, undecoded
from tprl_hf.training.answer_ids import answer_lengths, reference_ids
from tprl_hf.training.rewards import generate_completions
from tprl_hf.training.unpruned_answers import UnprunedAnswers

# as LLaVA-1.5's: an answer has a space behind it, and nothing ends a turn
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def llama_tokenizer(prepends: bool):
    letters = dict.fromkeys("▁USERAITN:whatisredcolu?\nn")
    vocab = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "<pad>": 3,
        **{letter: 4 + place for place, letter in enumerate(letters)},
    }
    merges = [("r", "e"), ("re", "d"), ("▁", "red")]
    vocab |= {"re": 50, "red": 51, "▁red": 52, "<image>": IMAGE}
    special = {"pad_token": "<pad>", "additional_special_tokens": ["<image>"]}
    if not prepends:
        return LlamaTokenizer(vocab=vocab, merges=merges, **special)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **special)


@pytest.mark.parametrize("prepends", [False, True])
@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        (LLAVA, "red", ["▁red", "</s>"]),
        (LLAVA, " red ", None),
        (CHATML, "red", ["red", "</s>"]),
        (CHATML, "red ", ["red", "</s>"]),
        (LLAVA, "", ["</s>"]),
    ],
)
def test_a_reference_is_what_a_model_would_say(make_model, prepends, template, answer, expected):
    tokenizer = llama_tokenizer(prepends)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = LlavaProcessor(
        pictures, tokenizer, 6, "default", chat_template=template, num_additional_image_tokens=1
    )
    encoder = SampleEncoder(make_model(), processor)
    row = {"images": [Image.new("RGB", (24, 24))], "prompt": "what", "answer": answer}
    found = tokenizer.convert_ids_to_tokens(encoder.encode(row).answer_ids.tolist())
    if expected is not None:
        assert found == expected
    assert found.count("</s>") == 1 and found[-1] == "</s>"


def test_what_ends_a_reference():
    tokenizer = llama_tokenizer(False)
    red, end, other = (tokenizer.convert_tokens_to_ids(token) for token in ("▁red", "</s>", "?"))
    for tail, ends, expected in [
        ("", [end], end),
        (" ", [end], end),
        ("</s>\n", [other, end], end),
        ("\n ? </s>", [other, end], other),
    ]:
        assert reference_ids(tokenizer, "what:", " red", tail, ends) == [red, expected]
    # the answer is within what the template writes
    assert reference_ids(tokenizer, "what:", " red</s> red", "", [end]) == [red, end]


@pytest.mark.parametrize("end", [[9], [9, 8]])
def test_lengths_of_answers(end):
    sequences = torch.tensor([[1, 9, 5, 9, 0], [1, 9, 5, 6, 7], [1, 9, 9, 0, 0], [1, 8, 5, 5, 9]])
    assert answer_lengths(sequences, 2, end) == [2, 3, 1, 3]
    assert answer_lengths(sequences[:, :2], 2, end) == [0, 0, 0, 0]


@pytest.fixture(scope="module")
def stopped_by_yes(tmp_path_factory):
    """The embedded model, whose answers end at a text that some of them have."""
    path = tmp_path_factory.mktemp("stops") / "model"
    shutil.copytree(tprl_hf.embedded_checkpoint(), path)
    words = json.loads((path / "tokenizer.json").read_text())
    words["model"]["vocab"]["abcdef"] = words["model"]["vocab"].pop("teal")  # as in test_stop_strings.py
    (path / "tokenizer.json").write_text(json.dumps(words))
    model, processor = load_model(path, dtype="float32")
    model.generation_config.stop_strings = ["yes"]
    rows = undecoded(mosaic_vqa("test", seed=7, num_samples=60))
    rows = sorted((rows[i] for i in range(60)), key=lambda row: row["answer"] != "yes")
    return model, processor, [*rows[:2], *rows[-2:]]


def test_an_answer_has_no_filler_of_its_batch(stopped_by_yes):
    model, processor, rows = stopped_by_yes
    encoder = SampleEncoder(model, processor)
    together = UnprunedAnswers(model, processor).answers(encoder(rows))
    batch = encoder(rows)
    ids = generate_completions(model, processor, batch, batch.inputs.valid, [0, 1, 2, 3], 8)[1]
    assert min(map(len, ids)) == 1  # ended by the text
    for number, row in enumerate(rows):
        batch = encoder([row])
        alone = UnprunedAnswers(model, processor).answers(batch)[0]
        assert together[number].text == alone.text and together[number].ids.equal(alone.ids)
        torch.testing.assert_close(together[number].top_logprobs, alone.top_logprobs, atol=1e-4, rtol=1e-3)
        assert ids[number] == generate_completions(model, processor, batch, batch.inputs.valid, [0], 8)[1][0]


def test_a_probability_does_not_depend_on_the_batch(stopped_by_yes):
    model, processor, rows = stopped_by_yes
    settings = [Setting("none", "1", None, {"prune": False})]
    several, single = (
        [record for records in compare_pruners(model, processor, rows, settings, batch_size=size, max_new_tokens=8)
         for record in records]
        for size in (4, 1)
    )  # fmt: skip
    assert [one.answer for one in several] == [one.answer for one in single]
    for one, other in zip(several, single, strict=True):
        assert one.probability == pytest.approx(other.probability, rel=1e-4)
