"""Rows as ordinary datasets have them: they train as they are meant, or one line says what to change."""

import pytest
import torch
from datasets import ClassLabel, Dataset, List, Value

from tprl_hf.evaluation.answers import chat_inputs
from tprl_hf.modeling.text_query import chat_messages
from tprl_hf.report.runs import MASKS, json_lines
from tprl_hf.training import (
    AutoencoderTrainer,
    LfDTrainer,
    TPRLGRPOTrainer,
    calibrate_escalation,
)
from tprl_hf.training.answer_batches import SampleEncoder, check_row, reference_answer, undecoded
from tprl_hf.training.answer_rewards import ANSWER_REWARDS
from tprl_hf.training.tuning import as_chats

from .test_trainers import stage
from .test_trl_habits import said

ROW = {"images": ["a.png"], "prompt": "what ?", "answer": "red"}


def with_values(dataset, name, values, feature=None):
    return dataset.remove_columns(name).add_column(name, values, feature=feature)


def files_of(dataset):
    """The pictures of each row, as files."""
    return undecoded(dataset)["images"][:]


# ---- rows without a picture, and other datasets ----


@pytest.mark.parametrize("name", ["autoencoder", "lfd", "ppo", "grpo"])
def test_a_dataset_that_is_assigned_is_checked_as_the_first_one(name, make_model, processor, dataset, tmp_path):
    trainer = stage(name, make_model, processor, dataset, str(tmp_path), max_steps=1)
    first = trainer.train_dataset
    pictures = [*first["images"][:3], None, [], *first["images"][5:]]
    trainer.train_dataset = with_values(first, "images", pictures, first.features["images"])
    assert len(trainer.train_dataset) == 6
    trainer.train()
    with pytest.raises(TypeError, match="a stream must end"):
        trainer.train_dataset = dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match="No row of train_dataset has a picture"):
        trainer.train_dataset = with_values(first, "images", [[]] * 8, first.features["images"])
    if name != "autoencoder":
        lacks = {"lfd": "keep_masks"}.get(name, "answer")
        with pytest.raises(ValueError, match=f"train_dataset has no column .{lacks}"):
            trainer.train_dataset = first.remove_columns(lacks)
    assert len(trainer.train_dataset) == 6  # what is refused changes nothing
    trainer.train_dataset = None
    assert trainer.train_dataset is None


@pytest.mark.parametrize("trainer_class", [AutoencoderTrainer, LfDTrainer, TPRLGRPOTrainer])
def test_a_dataset_is_refused_before_a_model_is_loaded(trainer_class, dataset, tmp_path):
    bare = dataset.remove_columns("images")
    with pytest.raises(ValueError, match="train_dataset has no column 'images'"):
        trainer_class(str(tmp_path / "no model"), train_dataset=bare)


def test_a_second_look_is_calibrated_on_rows_with_pictures(make_model, processor, dataset, caplog):
    model = make_model(policy_training={"stage": "lfd"})
    model.read_chat_template(processor)
    rows = dataset.remove_columns("answer")
    some = with_values(rows, "images", [*files_of(rows)[:6], [], None], rows.features["images"])
    found = [calibrate_escalation(model, processor, one, 0.25, 0.5, 0.5) for one in (some, rows.select(range(6)))]
    assert found[0] == found[1] and "2 of 8 rows have no picture, and are left out" in caplog.text


def test_a_list_of_no_pictures_is_no_picture(make_model, processor, dataset, tmp_path):
    files = files_of(dataset)
    pictures = [[None], [None, *files[0]], *files[2:]]
    some = with_values(dataset, "images", pictures, dataset.features["images"])
    trainer = stage("autoencoder", make_model, processor, some, str(tmp_path), max_steps=1)
    assert len(trainer.train_dataset) == 7
    plain = trainer.encoder.encode(dataset[0])
    again = trainer.encoder.encode({**some[1], "prompt": dataset[0]["prompt"]})
    assert torch.equal(again.prompt_ids, plain.prompt_ids) and again.num_visual == plain.num_visual


# ---- names, numbers, nothing ----


def test_names_are_shown_and_compared(make_model, processor, dataset, tmp_path):
    words = ClassLabel(names=["word7", "word8"])
    kinds = ClassLabel(names=["colour", "count"])
    numbered = with_values(dataset, "answer", [0, 1] * 4, words)
    numbered = with_values(numbered, "question_type", [0, 1] * 4, kinds)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    trainer = stage("ppo", make_model, processor, numbered, str(tmp_path), **settings)
    assert trainer.train_dataset["answer"][:] == ["word7", "word8"] * 4
    trainer.train()
    assert all(one.keys() == {"colour", "count"} for one in json_lines(tmp_path / MASKS)[-1]["kept_by_type"])
    assert [row["completion"][0]["content"] for row in as_chats(numbered)] == ["word7", "word8"] * 4


@pytest.mark.parametrize(
    ("answer", "reference"),
    [(3, "3"), (0, "0"), (0.5, "0.5"), ([1, 2, 2], "2"), (["a", None, None], "a"), ([], None), (None, None)],
)
def test_numbers_are_answers(answer, reference):
    row = {**ROW, "answer": answer}
    check_row(row)
    assert reference_answer(row) == reference


@pytest.mark.parametrize("answer", [True, float("nan"), {"answer": "red"}, [["red"]], [{"answer": "red"}]])
def test_what_is_no_answer_is_shown(answer):
    with pytest.raises(ValueError, match="answer must be the reference answer as a text or a number, or a list"):
        check_row({**ROW, "answer": answer})


def test_rewards_read_numbers(dataset):
    for reward in ANSWER_REWARDS.values():
        assert reward(["q"], ["?"], answer=[None]) == reward(["q"], ["?"], answer=[[]]) == [None]
    for name in ("exact_match", "vqa_score", "relaxed_accuracy", "anls"):
        assert ANSWER_REWARDS[name](["q"] * 3, ["0"] * 3, answer=[0, [0, None], 1]) == [1.0, 1.0, 0.0]


def test_rows_without_a_question_are_refused_at_once(make_model, processor, dataset, tmp_path):
    some = with_values(dataset, "prompt", [*dataset["prompt"][:6], None, None])
    with pytest.raises(ValueError, match="2 of 8 rows of train_dataset have no `prompt`: fill or leave out"):
        stage("autoencoder", make_model, processor, some, str(tmp_path))


def test_rows_with_lists_of_nothing_are_refused_at_once(make_model, processor, dataset, tmp_path):
    answers = with_values(dataset, "answer", [*[["word7"]] * 6, [], [None]])
    with pytest.raises(ValueError, match="2 of 8 rows of train_dataset have no `answer`"):
        stage("ppo", make_model, processor, answers, str(tmp_path))
    prompts = with_values(dataset, "prompt", [*[said("word7")] * 6, [], None])
    with pytest.raises(ValueError, match="2 of 8 rows of train_dataset have no `prompt`"):
        stage("ppo", make_model, processor, prompts, str(tmp_path))


@pytest.mark.parametrize("name", ["video", "videos"])
def test_videos_of_a_dataset_are_not_left_out_in_silence(name, make_model, processor, dataset, tmp_path):
    empty = dataset.add_column(name, [None] * 8, feature=Value("string"))
    assert len(stage("autoencoder", make_model, processor, empty, str(tmp_path)).train_dataset) == 8
    filled = dataset.add_column(name, [*[None] * 7, "cat.mp4"])
    with pytest.raises(ValueError, match=f"has videos in its column '{name}', which are not read: put frames of them"):
        stage("autoencoder", make_model, processor, filled, str(tmp_path))


@pytest.mark.parametrize(("image_id", "called"), [(None, "The image of the question 'what .'"), ("", "The image of"),
                                                  (0, "0"), ("cat", "cat")])  # fmt: skip
def test_a_picture_that_cannot_be_read_is_called_by_its_row(image_id, called, make_model, processor):
    row = {**ROW, "images": [b"nothing"], "image_id": image_id}
    for read in (lambda: SampleEncoder(make_model(), processor)([row]), lambda: chat_inputs(processor, [row])):
        with pytest.raises(ValueError, match=f"^{called}.* is not an image that Pillow can read"):
            read()


# ---- chat messages ----


def test_fields_that_a_dataset_filled_are_not_there():
    """Templates ask which fields a part has: Qwen's takes a text with `image: None` for an image."""
    content = [{"type": "image"}, {"type": "text", "text": "what ?"}]
    part = {"type": Value("string"), "text": Value("string"), "image": Value("string")}
    feature = List({"role": Value("string"), "content": List(part), "name": Value("string")})
    stored = Dataset.from_dict({"a": [0]}).add_column("prompt", [said(content)], feature=feature)[0]["prompt"]
    assert stored[0]["content"][1]["image"] is None and stored[0]["name"] is None
    assert chat_messages(stored, 1) == said(content)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<image>\nwhat ?", "`prompt` has <image> in its text: leave it out. Pictures stand before the first"),
        (said("<image> what ?"), "`prompt` has <image> in its text"),
        (said([{"type": "image"}, {"type": "image"}]), "`prompt` has 2 parts of type 'image', and its row 1 pictures"),
        (said([{"type": "video"}]), "`prompt` has a part of type 'video': trainers read texts and images only"),
        (
            [*said("q"), {"role": "assistant", "content": "red"}],
            "is of 'assistant': end it with the question, of 'user'",
        ),
        ([{"role": "system", "content": "q"}], "The last message of `prompt` is of 'system'"),
    ],
)
def test_prompts_that_would_be_read_wrongly_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message) as refused:
        check_row({**ROW, "prompt": prompt})
    assert len(str(refused.value)) < 360


def test_chat_messages_are_tuned_on_as_they_are(dataset):
    chats = [said(prompt) for prompt in dataset["prompt"]]
    asked = as_chats(with_values(dataset, "prompt", chats))["prompt"]
    assert asked[:] == as_chats(dataset)["prompt"][:] == chats
