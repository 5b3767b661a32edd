"""The recipe of the embedded LVLM: packed questions mean what single ones mean, and training resumes."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText

from tprl_hf import TPRLForConditionalGeneration, embedded_checkpoint
from tprl_hf.data.easy import EASY_VQA_COLORS, EASY_VQA_SHAPES
from tprl_hf.data.mosaic import COLORS, SHAPES, draw_scene, mosaic_scenes, scene_rng
from tprl_hf.evaluation.answers import chat_inputs
from tprl_hf.evaluation.smaller_pictures import PictureShrinker
from tprl_hf.test_bed.batches import (
    ANSWER_LAYER,
    IGNORE,
    NOUN_LAYER,
    PATCH_COLORS,
    PATCH_KINDS,
    label_scene,
    mosaic_image,
    pack,
)
from tprl_hf.test_bed.model import NUM_PATCHES, PATCHES_PER_SIDE, TEXT_HEADS, build_lvlm, build_processor
from tprl_hf.test_bed.train import (
    GROUNDED_HEADS,
    MosaicLVLMConfig,
    ReadingHeads,
    answer_losses,
    load_state,
    run_tower,
    save_state,
    train,
)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def model(processor):
    return build_lvlm(processor.tokenizer).eval()


@pytest.fixture(scope="module")
def images():
    return [mosaic_image("train", 11, i) for i in range(2)]


def test_tokenizer_knows_every_word_of_the_data_and_gives_it_back(processor):
    tokenizer = processor.tokenizer
    stream = mosaic_scenes("validation", 0)
    texts = [text for _ in range(30) for q in next(stream)[2] for text in (q.prompt, q.answer)]
    texts += [*SHAPES, *COLORS, *EASY_VQA_SHAPES, *EASY_VQA_COLORS, "yes", "no", *map(str, range(100))]
    texts += ["does the image not contain a teal shape?", "what is the color of the rectangle?"]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")
    assert tokenizer.decode(tokenizer("47").input_ids) == "47"


@torch.no_grad()
def test_packed_questions_equal_single_prompts(processor, model, images):
    batch = pack(images, processor.tokenizer, [False, False])
    patches, _ = run_tower(model, batch.pixel_values)
    logits = answer_losses(model, ReadingHeads(192), patches, batch).logits
    rows = iter(batch.answer_rows)
    for image in images:
        for question in image.questions:
            i, first, _ = next(rows)
            content = [{"type": "image"}, {"type": "text", "text": question.prompt}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            single = processor(images=Image.fromarray(image.pixels), text=prompt, return_tensors="pt")
            expected = model(**single).logits[0, -1]
            assert torch.allclose(logits[i, first], expected, atol=2e-5)


@torch.no_grad()
def test_a_smaller_picture_is_packed_as_it_is_evaluated(processor, model, images):
    """Equals the row `resize` of `tprl evaluate`: its pixels, its number of visual tokens, their positions."""
    small = mosaic_image("train", 11, 0, side=4)
    batch = pack([small], processor.tokenizer, [False])
    patches, _ = run_tower(model, batch.pixel_values)
    logits = answer_losses(model, ReadingHeads(192), patches, batch).logits
    pruned = TPRLForConditionalGeneration.from_base_model(model, pruner="none")
    shrinker = PictureShrinker(pruned, processor)
    for question, (_, first, _) in zip(small.questions, batch.answer_rows, strict=True):
        sample = {"images": [Image.fromarray(images[0].pixels)], "prompt": question.prompt}
        smaller, shrunk = shrinker(sample, 1 / 9)
        single = chat_inputs(smaller, [shrunk])
        assert torch.allclose(single["pixel_values"], batch.pixel_values, atol=1e-5)
        features = pruned.encode_images(**single, **pruned.adapter.smaller_picture_options)
        expected = pruned(**single, visual_features=features).logits[0, -1]
        assert torch.allclose(logits[0, first], expected, atol=2e-5)


@torch.no_grad()
def test_packed_conversation_equals_the_chat_template(processor, model, images):
    batch = pack(images[:1], processor.tokenizer, [True])
    patches, _ = run_tower(model, batch.pixel_values)
    logits = answer_losses(model, ReadingHeads(192), patches, batch).logits
    messages = []
    for k, question in enumerate(images[0].questions[:3]):
        content = [{"type": "image"}] if k == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question.prompt}]})
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        single = processor(images=Image.fromarray(images[0].pixels), text=prompt, return_tensors="pt")
        _, first, _ = batch.answer_rows[k]
        assert torch.allclose(logits[0, first], model(**single).logits[0, -1], atol=2e-5)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})


def test_labels_are_the_answers(processor, images):
    batch = pack(images, processor.tokenizer, [False, True])
    answers = [question.answer for image in images for question in image.questions]
    for answer, (i, first, stop) in zip(answers, batch.answer_rows, strict=True):
        labels = batch.labels[i, first:stop]
        assert processor.tokenizer.decode(labels[:-1]) == answer and labels[-1] == processor.tokenizer.eos_token_id
    asked = sum(stop - first for _, first, stop in batch.answer_rows)
    assert (batch.labels != IGNORE).sum() == asked


def test_patch_labels_say_what_lies_there():
    scene = draw_scene(scene_rng("train", 3, 0))
    labelled = mosaic_image("train", 3, 0)
    assert labelled.centers.sum() == sum(item.kind != "sign" for item in scene.objects)
    for item, shown in zip(scene.objects, labelled.object_patches, strict=True):
        rows, columns = np.divmod(np.flatnonzero(shown), PATCHES_PER_SIDE)
        x0, y0, x1, y1 = (side / 12 for side in item.box)
        assert shown.any() and rows.min() >= int(y0) and rows.max() < math.ceil(y1)
        assert columns.min() >= int(x0) and columns.max() < math.ceil(x1)
        if item.number is not None:
            assert {item.number // 10, 10 + item.number % 10} <= set(labelled.digits.tolist())


@pytest.mark.parametrize("side", [3, 6])
def test_patch_labels_of_a_smaller_picture_say_what_lies_there(side):
    scene = draw_scene(scene_rng("train", 3, 0))
    labelled = label_scene(scene, [], side)
    assert labelled.pixels.shape == (12 * side, 12 * side, 3) and labelled.kinds.shape == (side**2,)
    for item, shown in zip(scene.objects, labelled.object_patches, strict=True):
        rows, columns = np.divmod(np.flatnonzero(shown), side)
        x0, y0, x1, y1 = (place * side / 144 for place in item.box)
        assert shown.any() and rows.min() >= int(y0) and rows.max() < math.ceil(y1)
        assert columns.min() >= int(x0) and columns.max() < math.ceil(x1)
    blocks = scene.instances.reshape(side, 144 // side, side, 144 // side).swapaxes(1, 2).reshape(side**2, -1)
    for kind, color, block in zip(labelled.kinds, labelled.colors, blocks, strict=True):
        names = {("background", None)} | {
            (item.kind, item.color) for i, item in enumerate(scene.objects) if i in block
        }
        found = (PATCH_KINDS[kind], None if color == IGNORE else PATCH_COLORS[color])
        assert kind == IGNORE or found in names


def test_grounding_loss_reads_the_models_own_attention(processor, images):
    model = build_lvlm(processor.tokenizer)
    batch = pack(images, processor.tokenizer, [False, True])
    patches, _ = run_tower(model, batch.pixel_values)
    grounding = answer_losses(model, ReadingHeads(192), patches, batch, with_grounding=True).grounding

    llm = model.model.language_model
    llm.set_attn_implementation("eager")
    embeds = model.get_input_embeddings()(batch.input_ids)
    projected = model.model.multi_modal_projector(patches)
    embeds = torch.cat([embeds[:, :2], projected, embeds[:, batch.prefix_length :]], dim=1)
    attentions = llm(
        inputs_embeds=embeds,
        attention_mask=batch.attention_mask(),
        position_ids=batch.position_ids,
        output_attentions=True,
    ).attentions
    expected = torch.zeros(())
    for layer in (NOUN_LAYER, ANSWER_LAYER):
        asked = batch.grounding_rows[:, 2] == layer
        i, row = batch.grounding_rows[asked, 0], batch.grounding_rows[asked, 1]
        mass = attentions[layer][i, :GROUNDED_HEADS, row, 2 : batch.prefix_length] * batch.grounding[asked, None]
        expected = expected - (mass.sum(-1) + 1e-6).log().mean() / 2
    assert torch.allclose(grounding, expected, atol=1e-5)


def test_relation_loss_asks_for_the_places_of_the_nouns(processor, images):
    batch = pack(images, processor.tokenizer, [False, True])
    asked = [(i, q) for i, image in enumerate(images) for q in image.questions if q.question_type == "relation"]
    for (i, question), row, centers in zip(asked, batch.relation_rows, batch.relation_centers, strict=True):
        names = re.fullmatch(r"Is the \w+ (\w+) .* the \w+ (\w+)\?", question.prompt).groups()
        words = processor.tokenizer.convert_ids_to_tokens(batch.input_ids[i, row[1:]])
        assert row[0] == i and tuple(words) == names
        before = centers[0, 0] < centers[1, 0] if "left" in question.prompt else centers[0, 0] > centers[1, 0]
        if "above" in question.prompt or "below" in question.prompt:
            before = (centers[0, 1] < centers[1, 1]) == ("above" in question.prompt)
        assert question.answer == ("yes" if before else "no")


@torch.no_grad()
def test_tower_starts_as_a_convolution(model):
    tower = build_lvlm(build_processor().tokenizer).model.vision_tower
    tower.set_attn_implementation("eager")
    attentions = tower(torch.rand(1, 3, 144, 144) * 2 - 1, output_attentions=True).attentions
    middle = 1 + 5 * PATCHES_PER_SIDE + 5
    for layer in attentions:
        looked_at = [divmod(int(layer[0, head, middle].argmax()) - 1, PATCHES_PER_SIDE) for head in range(5)]
        assert looked_at == [(5, 5), (5, 4), (5, 6), (4, 5), (6, 5)]


@torch.no_grad()
def test_llm_starts_with_heads_for_the_text(processor, images):
    model = build_lvlm(processor.tokenizer)
    model.set_attn_implementation("eager")
    question = images[0].questions[0].prompt
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=Image.fromarray(images[0].pixels), text=prompt, return_tensors="pt")
    attentions = model(**inputs, output_attentions=True).attentions
    for layer, heads in zip(attentions, TEXT_HEADS, strict=True):
        for head, offset in heads.items():
            last = layer[0, head, -1]
            assert last[2 : 2 + NUM_PATCHES].sum() < 0.1
            if offset is not None:
                assert int(last.argmax()) == len(last) - 1 - offset


def test_state_is_saved_and_loaded_whole(processor, tmp_path):
    model = build_lvlm(processor.tokenizer, seed=1)
    modules = nn.ModuleDict({"lvlm": model, "heads": ReadingHeads(192)})
    optimizer = torch.optim.AdamW(modules.parameters(), fused=True)
    for parameter in modules.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    save_state(tmp_path / "state.safetensors", modules, optimizer, {"step": 3, "minutes": 0.5})

    other = nn.ModuleDict({"lvlm": build_lvlm(processor.tokenizer, seed=2), "heads": ReadingHeads(192)})
    progress, moments = load_state(tmp_path / "state.safetensors", other)
    assert progress == {"step": 3, "minutes": 0.5}
    assert all(torch.equal(a, b) for a, b in zip(modules.parameters(), other.parameters(), strict=True))
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[i][name]) for name, value in state.items())


def test_training_starts_from_a_checkpoint_and_keeps_its_policy(tmp_path, monkeypatch):
    pytest.importorskip("easy_vqa")
    monkeypatch.setattr("tprl_hf.test_bed.train.VALIDATION_IMAGES", (2, 1))
    threads = torch.get_num_threads()
    still = {"learning_rate": 1e-30, "joint_tower_learning_rate": 1e-30, "tower_minutes": 0.0, "joint_minutes": 0.01}
    start = embedded_checkpoint()
    config = MosaicLVLMConfig(str(tmp_path), start_from=str(start), smallest_side=3, num_processes=1, **still)
    train(0, config, port=0)
    torch.set_num_threads(threads)
    before, after = (AutoModelForImageTextToText.from_pretrained(path) for path in (start, tmp_path / "model"))
    assert type(after) is TPRLForConditionalGeneration and after.config.policy_training
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, after.state_dict()[name]), name
    assert json.loads((tmp_path / "training.json").read_text())["validation"]["color"] > 0.9


@pytest.mark.parametrize("side", [0, 13])
def test_sizes_that_pictures_cannot_have_are_refused(side):
    with pytest.raises(ValueError, match=f"smallest_side is a number from 1 to 12, got {side}"):
        MosaicLVLMConfig("x", smallest_side=side)


def test_recipe_runs_resumes_and_answers(processor, tmp_path, monkeypatch):
    pytest.importorskip("easy_vqa")
    threads = torch.get_num_threads()
    config = MosaicLVLMConfig(
        str(tmp_path), tower_minutes=0.01, joint_minutes=0.02, num_processes=1, mosaic_images=1, easy_images=1
    )
    monkeypatch.setattr("tprl_hf.test_bed.train.VALIDATION_IMAGES", (2, 1))
    train(0, config, port=0)
    first = json.loads((tmp_path / "training.json").read_text())
    assert set(first["validation"]) >= {"easy", "existence", "patch_kind"}
    assert {json.loads(line)["phase"] for line in (tmp_path / "log.jsonl").open()} == {"tower", "joint"}

    (tmp_path / "training.json").unlink()
    lines = (tmp_path / "log.jsonl").read_text()
    train(0, config, port=0)  # both phases are done: nothing is trained again
    assert json.loads((tmp_path / "training.json").read_text()) == first
    assert (tmp_path / "log.jsonl").read_text() == lines
    torch.set_num_threads(threads)
