"""Processor, pipeline, and which tokens are the question."""

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, pipeline

from tests.families.tiny_models import IMAGE, build
from tests.families.tiny_processor import make_chat_processor
from tprl_hf.modeling import TPRLConfig, TPRLForConditionalGeneration, TPRLProcessor, question_mask
from tprl_hf.pruners import DivPrune

PICTURES = [Image.new("RGB", (30, 24), colour) for colour in ("red", "green")]


def chat(question, image=True, before=()):
    parts = [{"type": "image"}] if image else []
    return [*before, {"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def tokens(chats, pictures):
    reader = make_chat_processor()
    prompts = [reader.apply_chat_template(c, add_generation_prompt=True) for c in chats]
    return reader, reader(images=pictures, text=prompts, padding=True, return_tensors="pt")


@pytest.fixture
def model():
    return TPRLForConditionalGeneration.from_base_model(
        build("llava"), latent_dim=8, policy_training={"stage": "lfd"}, keep_ratio=0.4
    ).eval()


def words(reader, inputs, mask):
    rows = zip(inputs["input_ids"], mask, strict=True)
    return [" ".join(reader.tokenizer.convert_ids_to_tokens(ids[bits])) for ids, bits in rows]


def test_question_is_found_exactly():
    earlier = [*chat("where is the dog ?"), {"role": "assistant", "content": "left"}]
    chats = [chat("what colour is the cat ?"), chat("where is the dog ?", image=False, before=earlier)]
    reader, inputs = tokens(chats, PICTURES)
    mask = question_mask(reader, chats, inputs["input_ids"], inputs["attention_mask"])
    assert words(reader, inputs, mask) == ["what colour is the cat ?", "where is the dog ?"]
    assert mask[1].nonzero().min() > (inputs["input_ids"][1] == IMAGE).nonzero().max()
    # of the two equal questions it is the last
    assert mask[1].nonzero().max() == len(mask[1]) - 3


def test_question_before_its_image():
    asked = [{"role": "user", "content": [{"type": "text", "text": "where is the cat "}, {"type": "image"}]}]
    reader, inputs = tokens([asked], PICTURES[:1])
    mask = question_mask(reader, [asked], inputs["input_ids"])
    assert words(reader, inputs, mask) == ["where is the cat"]


def test_questions_that_are_not_there():
    reader, inputs = tokens([chat("what is the cat ?")], PICTURES[:1])
    with pytest.raises(ValueError, match="is not in its prompt"):
        question_mask(reader, [chat("what is the dog ?")], inputs["input_ids"])


PICTURE = {"type": "image"}


@pytest.mark.parametrize(
    "parts",
    [
        [PICTURE, "what colour is the cat ?"],
        ["where is", PICTURE, "the cat ?"],
        ["what is left of", PICTURE, "the cat", PICTURE, "?"],
        ["where is the cat ? ", "left", PICTURE, "what", PICTURE],
        ["the cat", PICTURE, "the cat", PICTURE, "the cat"],
        ["", PICTURE, "where ?", ""],
        [PICTURE],
        [PICTURE, ""],
        [""],
    ],
)
@torch.no_grad()
def test_images_between_the_words(model, parts):
    """Exactly the words are the question, wherever images lie; one without words is answered too."""
    content = [part if part is PICTURE else {"type": "text", "text": part} for part in parts]
    earlier = [*chat("where is the cat ?", image=False), {"role": "assistant", "content": "left"}]
    asked = [[{"role": "user", "content": content}], [*earlier, {"role": "user", "content": content}]]
    number = sum(part is PICTURE for part in parts)
    reader, inputs = tokens(asked, PICTURES[:number] * 2 if number else None)
    mask = question_mask(reader, asked, inputs["input_ids"], inputs["attention_mask"])
    expected = " ".join(" ".join(part for part in parts if part is not PICTURE).split())
    assert words(reader, inputs, mask) == [expected] * 2
    assert not (mask & (inputs["input_ids"] == IMAGE)).any()
    together = model.generate(**inputs, query_mask=mask, max_new_tokens=3)
    alone = {name: value[: len(value) // 2] for name, value in inputs.items()}
    left_out = int((inputs["attention_mask"][0] == 0).sum())
    alone |= {name: alone[name][:, left_out:] for name in ("input_ids", "attention_mask")}
    single = model.generate(**alone, query_mask=mask[:1, left_out:], max_new_tokens=3)
    assert torch.equal(together[0, left_out:], single[0])


@torch.no_grad()
def test_only_the_question_is_read(model):
    chats = [chat("what colour is the cat ?")]
    reader, inputs = tokens(chats, PICTURES[:1])
    mask = question_mask(reader, chats, inputs["input_ids"])
    scores = model.prune(**inputs, query_mask=mask).scores
    assert not torch.equal(model.prune(**inputs).scores, scores)  # the fallback also reads USER, ASSISTANT and :
    inputs["input_ids"][0, -1] = 5  # the template's last word
    assert torch.equal(model.prune(**inputs, query_mask=mask).scores, scores)


@torch.no_grad()
def test_pipeline(model):
    reader = make_chat_processor()
    ask = pipeline("image-text-to-text", model=model, processor=reader)
    messages = chat("what colour is the cat ?")
    messages[0]["content"][0]["image"] = PICTURES[0]
    answer = ask(text=messages, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    _, inputs = tokens([chat("what colour is the cat ?")], PICTURES[:1])
    made = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert answer == reader.decode(made, skip_special_tokens=True)


@torch.no_grad()
def test_pipeline_of_a_checkpoint_with_a_pruner(tmp_path, model):
    """By its directory alone: the pruner that was set comes back in the pipeline, too."""
    wrapped = TPRLForConditionalGeneration.from_base_model(model.lvlm, latent_dim=8, pruner="divprune", num_keep=5)
    wrapped.save_pretrained(tmp_path, save_base_model=True)
    reader = make_chat_processor()
    reader.save_pretrained(tmp_path)
    ask = pipeline("image-text-to-text", model=str(tmp_path))
    assert type(ask.model.pruner) is DivPrune and ask.model.config.num_keep == 5
    messages = chat("what colour is the cat ?")
    messages[0]["content"][0]["image"] = PICTURES[0]
    answer = ask(text=messages, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    _, inputs = tokens([chat("what colour is the cat ?")], PICTURES[:1])
    made = wrapped.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert answer.strip() == reader.decode(made, skip_special_tokens=True).strip()


def test_processor_of_a_checkpoint_is_its_bases(tmp_path, model):
    make_chat_processor().save_pretrained(tmp_path / "base")
    model.lvlm.save_pretrained(tmp_path / "base")
    model.config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "policy")
    AutoProcessor.register(TPRLConfig, TPRLProcessor, exist_ok=True)
    for path in ("base", "policy"):
        assert type(AutoProcessor.from_pretrained(tmp_path / path)) is type(make_chat_processor())
    model.config.base_model_name_or_path = None
    model.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="no processor and names no base model"):
        AutoProcessor.from_pretrained(tmp_path / "policy")
