"""What makes long training on many images possible: no work twice, batches by memory, short logs."""

import itertools
import subprocess
import sys

import pytest
import torch

from tprl_hf.training import answer_scores
from tprl_hf.training.answer_batches import SampleEncoder
from tprl_hf.training.answer_scores import AnswerScores, gradient_saliency, score_answers, score_logits
from tprl_hf.training.micro_batches import within_memory
from tprl_hf.training.rollout_trainer import LogBuffers
from tprl_hf.training.stored_texts import packed, unpacked

from .test_trainers import gradients_of, stage


def test_parts_fit_into_memory_and_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    for count, limit in itertools.product((None, 1, 3), (1, 50, 1000)):
        lengths = torch.randint(1, 100, (40,), generator=generator).tolist()
        parts = within_memory(lengths, limit, count)
        assert [number for part in parts for number in part] == [*range(40)]
        for part in parts:
            assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= limit
            assert count is None or len(part) <= count
    assert within_memory([5] * 10, 10**9, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert within_memory([], 10) == []


@pytest.mark.parametrize("name", ["autoencoder", "lfd"])
def test_gradients_do_not_depend_on_memory(name, make_model, processor, dataset, tmp_path):
    found = []
    for tokens in (32_768, 40, 1):  # all eight samples of 16 tokens, two of them, one
        trainer = stage(name, make_model, processor, dataset, str(tmp_path), micro_batch_tokens=tokens)
        trainer.current_gradient_accumulation_steps = 1  # as its loop sets it
        rows = [trainer.train_dataset[i] for i in range(8)]
        calls = []
        trainer.encoder.batch = lambda rows, samples, batch=trainer.encoder.batch, calls=calls: (
            calls.append(len(rows)) or batch(rows, samples)
        )
        loss = trainer.training_step(trainer.model, rows)
        found.append((calls, loss, gradients_of(trainer)))
    assert [calls for calls, _, _ in found] == [[8], [2] * 4, [1] * 8]
    for _, loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][1], atol=1e-6, rtol=1e-5)
        for key, value in gradients.items():
            torch.testing.assert_close(value, found[0][2][key], atol=1e-6, rtol=1e-4)


def test_scores_do_not_depend_on_memory(make_model, processor, dataset):
    model = make_model()
    batch = SampleEncoder(model, processor)([dataset[i] for i in range(8)])
    masks = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = score_answers(model, batch, masks, [*range(8)])
    for tokens in (60, 1):
        parts = score_answers(model, batch, masks, [*range(8)], max_tokens=tokens)
        torch.testing.assert_close(parts.logprobs, whole.logprobs, atol=1e-5, rtol=1e-5)
        assert parts.correct.equal(whole.correct)


def test_the_gradient_teacher_does_not_depend_on_memory(make_model, processor, dataset):
    model = make_model()
    batch = SampleEncoder(model, processor)([dataset[i] for i in range(8)])
    whole = gradient_saliency(model, batch, batch.inputs.valid)
    assert whole.any()
    for tokens in (60, 1):
        torch.testing.assert_close(gradient_saliency(model, batch, batch.inputs.valid, tokens), whole)


def test_the_gradient_teacher_in_float16_knows_sure_answers(make_model, processor, dataset, monkeypatch):
    """Whose gradients are smaller than what float16 holds."""
    model, rows, faint = make_model(), [dataset[i] for i in range(4)], 2.0**-20

    def of_sure_answers(*arguments):
        scores = score_logits(*arguments)
        return AnswerScores(scores.logprobs * faint, scores.correct)

    monkeypatch.setattr(answer_scores, "score_logits", of_sure_answers)
    found = {}
    for dtype in (torch.float32, torch.float16):
        model.lvlm.to(dtype)
        batch = SampleEncoder(model, processor)(rows)
        found[dtype] = gradient_saliency(model, batch, batch.inputs.valid) / faint
    assert found[torch.float32].max() < 1  # so that float16 holds no millionth of it
    torch.testing.assert_close(found[torch.float16], found[torch.float32], atol=1e-3, rtol=0.1)


@pytest.mark.parametrize("rewards", [False, True])
def test_an_unpruned_prompt_is_read_once_in_a_training(rewards, make_model, processor, dataset, tmp_path):
    trainer = stage("ppo", make_model, processor, dataset, str(tmp_path), max_steps=4)
    called = []

    def length(completions, **columns):
        called.append(len(completions))
        return [float(len(text)) for text in completions]

    if rewards:
        trainer.reward_funcs, trainer.reward_weights = [length], [1.0]
    per_buffer = 4 * trainer.args.num_steps  # two questions, two rollouts each
    passes = []
    for buffer in range(trainer.buffers_per_epoch + 1):
        trainer.collect(buffer)
        passes.append(trainer.num_scored)
    assert passes[:4] == [(2 + per_buffer) * count for count in (1, 2, 3, 4)]
    assert passes[4] - passes[3] == per_buffer  # of the second epoch
    assert called == [2 + per_buffer] * 5 * rewards
    scores = trainer.score_steps(trainer.batch, trainer.rollouts)
    trainer.unpruned.clear()
    torch.testing.assert_close(trainer.score_steps(trainer.batch, trainer.rollouts), scores, atol=1e-5, rtol=1e-5)


def test_a_question_that_comes_twice_in_a_buffer_is_read_once(make_model, processor, dataset, tmp_path):
    trainer = stage("ppo", make_model, processor, dataset.select([0, 1]), str(tmp_path), max_steps=4)
    trainer.args.per_device_train_batch_size = 4
    trainer.collect(0)
    masks = len(trainer.asked) * trainer.args.num_generations * trainer.args.num_steps
    assert len(trainer.asked) == 4 and trainer.num_scored == 2 + masks


def test_resuming_reads_no_unpruned_prompt_again(make_model, processor, dataset, tmp_path):
    settings = {"max_steps": 16, "save_steps": 16, "save_strategy": "steps", "keep_best": False}
    whole = stage("ppo", make_model, processor, dataset, str(tmp_path), **settings)
    whole.train()
    assert whole.unpruned.keys() == set(range(8))
    resumed = stage("ppo", make_model, processor, dataset, str(tmp_path), **{**settings, "max_steps": 20})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert resumed.num_scored - whole.num_scored == 4 * whole.args.num_steps


def test_a_log_for_each_buffer(make_model, processor, dataset, tmp_path):
    trainer = stage("ppo", make_model, processor, dataset, str(tmp_path), max_steps=8, save_strategy="no")
    trainer.train()
    steps = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert steps == [4, 8]  # two passes of two mini-batches
    told = stage("ppo", make_model, processor, dataset, str(tmp_path), max_steps=8, logging_steps=3)
    told.train()
    assert [row["step"] for row in told.state.log_history if "loss" in row] == [3, 6]


def test_a_long_run_has_a_short_log(make_model, processor, dataset, tmp_path):
    trainer = stage("ppo", make_model, processor, dataset, str(tmp_path))
    trainer.state.max_steps = 2_500_000
    LogBuffers(16).on_train_begin(trainer.args, trainer.state, trainer.control)
    assert trainer.state.logging_steps % 16 == 0 and 1900 <= 2_500_000 / trainer.state.logging_steps <= 2000


def test_updates_encode_the_tokens_of_a_buffer_once(make_model, processor, dataset, tmp_path):
    trainer = stage("ppo", make_model, processor, dataset, str(tmp_path))
    trainer.collect(0)
    encoded = []
    trainer.tprl_model.autoencoder.encoder.register_forward_hook(lambda *_: encoded.append(1))
    for index in torch.arange(4).split(1):
        trainer.trajectory_losses(trainer.model, index)
    assert len(encoded) == 1
    trainer.collect(1)
    encoded.clear()
    trainer.trajectory_losses(trainer.model, torch.arange(2))
    assert len(encoded) == 1


def test_texts_come_back_as_they_were():
    text = (
        torch.arange(5),
        torch.tensor([], dtype=torch.long),
        torch.tensor([True, False]),
        {"types": torch.zeros(3)},
    )
    again = unpacked(packed(text))
    assert all(one.equal(other) and one.dtype == other.dtype for one, other in zip(text[:3], again[:3], strict=True))
    assert again[3]["types"].equal(text[3]["types"])


def test_memory_is_flat_in_the_number_of_images(tmp_path):
    words = ["100", "400", "--directory", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "tests.training.memory", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    small, large = (float(line.split()[2]) for line in done.stdout.splitlines())
    assert large < small + 8, done.stdout  # MiB; the features of 300 images more would take 20
