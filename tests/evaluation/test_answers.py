import numpy as np
import pytest
from PIL import Image
from tokenizers.processors import TemplateProcessing

from tests.families.tiny_models import IMAGE, build
from tests.families.tiny_processor import make_chat_processor, make_processor
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.evaluation.answers import chat_inputs, generate_answers
from tprl_hf.evaluation.compare_pruners import encode_once
from tprl_hf.training.answer_batches import SampleEncoder


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 255, (3, 24, 24, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def test_images_and_prompts_come_together_however_many_there_are(images):
    samples = [
        {"images": images[:1], "prompt": "word7 word8"},
        {"images": [], "prompt": "word7"},
        {"images": images[1:], "prompt": "word7 word8 word9"},
    ]
    inputs = chat_inputs(make_processor(), samples)
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [16, 0, 32]
    assert len(inputs["pixel_values"]) == 3
    assert inputs["attention_mask"].sum(1).tolist() == [18, 1, 35]
    assert inputs["attention_mask"][:, -1].all()  # padded on the left
    # the questions, wherever padding and placeholders are
    assert [inputs["input_ids"][i][mask].tolist() for i, mask in enumerate(inputs["query_mask"])] == [
        make_processor().tokenizer(sample["prompt"], add_special_tokens=False).input_ids for sample in samples
    ]
    assert "pixel_values" not in chat_inputs(make_processor(), samples[1:2])


def test_chat_messages_are_taken_as_they_are(images):
    question = [{"role": "user", "content": [{"type": "text", "text": "word7"}, {"type": "image"}]}]
    inputs = chat_inputs(make_processor(), [{"images": images[:1], "prompt": question}])
    assert (
        inputs["input_ids"][0].tolist() == [make_processor().tokenizer.convert_tokens_to_ids("word7")] + [IMAGE] * 16
    )


def test_each_picture_is_encoded_once_whatever_its_label(images):
    model, processor = TPRLForConditionalGeneration.from_base_model(build("llava")), make_processor()
    samples = [
        {"images": [images[number]], "prompt": "word7", "image_id": label}
        for number, label in ((0, "0"), (1, "0"), (0, "a"), (1, None))
    ]
    seen = []
    hook = model.lvlm.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs.get("pixel_values", args and args[0]))), with_kwargs=True
    )
    rows = encode_once(model, processor, samples, None).modalities["image"].rows.view(4, 16, -1)
    hook.remove()
    assert sum(seen) == 2 and rows[0].equal(rows[2]) and rows[1].equal(rows[3]) and not rows[0].equal(rows[1])


def test_answers_are_the_new_tokens_only(images):
    model = TPRLForConditionalGeneration.from_base_model(
        build("llava"), latent_dim=8, keep_ratio=0.5, policy_training={"stage": "lfd"}
    )
    sample = {"images": images[:1], "prompt": "word7 word8"}
    (answer,) = generate_answers(model, make_processor(), [sample], max_new_tokens=3)
    assert len(answer.split()) == 3
    assert generate_answers(model, make_processor(), []) == []


def test_a_template_that_writes_the_first_token_gets_no_second_one(images):
    """As Gemma's and Llama 4's do; the server and transformers' own `apply_chat_template` read it so."""
    processor = make_chat_processor()
    tokenizer = processor.tokenizer
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    sample = {"images": images[:1], "prompt": "what is the colour ?", "answer": "dog"}
    content = [{"type": "image", "image": images[0]}, {"type": "text", "text": sample["prompt"]}]
    messages = [{"role": "user", "content": content}]
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    model = TPRLForConditionalGeneration.from_base_model(build("llava"), pruner="uniform")
    for template in (processor.chat_template, "{{ bos_token }}{{ ' ' }}" + processor.chat_template):
        processor.chat_template = template
        wanted = processor.apply_chat_template(messages, **asked)["input_ids"][0].tolist()
        assert wanted.count(tokenizer.bos_token_id) == 1
        assert chat_inputs(processor, [sample])["input_ids"][0].tolist() == wanted
        assert SampleEncoder(model, processor)([sample]).samples[0].prompt_ids.tolist() == wanted
