"""Noise gates: what they let through, and what the policy learns by the gradient through them."""

import pytest
import torch

from tests.training.test_trainers import gradients_of, stage
from tprl_hf.training import NoiseGateConfig, NoiseGateTrainer
from tprl_hf.training.answer_scores import score_answers
from tprl_hf.training.noise_gate_trainer import ALWAYS_KEPT, gate, logits_of_rows


def test_a_gate_lets_through_its_share_and_keeps_the_moments():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, 3, generator=generator) * torch.tensor([1.0, 2.0, 0.1]) + torch.tensor([0.0, 5.0, -1.0])
    noise = torch.randn(rows.shape, generator=generator)
    for share in (0.0, 0.25, 0.9):
        logits = torch.full((len(rows),), share).logit().clamp(-40, 40)
        gated = gate(rows, rows, logits, noise)
        torch.testing.assert_close(gated.mean(0), rows.mean(0), atol=0.05, rtol=0.02)
        torch.testing.assert_close(gated.std(0), rows.std(0), atol=0.0, rtol=0.03)
        for column in range(3):
            correlation = torch.corrcoef(torch.stack([gated[:, column], rows[:, column]]))[0, 1]
            assert float(correlation) == pytest.approx(share**0.5, abs=0.03)
    torch.testing.assert_close(gate(rows, rows, torch.full((len(rows),), ALWAYS_KEPT), noise), rows)


def test_gates_have_a_gradient_at_any_logit():
    logits = torch.tensor([-200.0, -40.0, 0.0, 40.0, 200.0], requires_grad=True)
    gate(torch.randn(5, 4), torch.randn(9, 4), logits, torch.randn(5, 4)).square().sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[2] != 0


def test_each_row_has_the_gate_of_its_token(make_model, processor, dataset, tmp_path):
    trainer = stage("noise_gate", make_model, processor, dataset, str(tmp_path))
    rows = [trainer.train_dataset[i] for i in range(4)]
    two, one = {**rows[0], "images": rows[0]["images"] + rows[2]["images"], "image_id": "both"}, rows[3]
    batch = trainer.encoder([one, two])
    samples = [1, 0, 1]
    logits = torch.randn(3, batch.inputs.valid.shape[1])
    of_rows = logits_of_rows(trainer.tprl_model, batch, samples, logits)["image"]
    valid = batch.inputs.valid[samples]
    assert valid.sum(1).tolist() == [32, 16, 32]
    assert torch.equal(of_rows, logits[valid])  # a LLaVA's rows lie as its tokens


def test_open_gates_give_the_score_of_the_unpruned_prompt(make_model, processor, dataset, tmp_path):
    trainer = stage("noise_gate", make_model, processor, dataset, str(tmp_path), score="logprob")
    trainer.collect(0)
    valid = trainer.batch.inputs.valid
    features = trainer.gated_features(torch.full(valid.shape, ALWAYS_KEPT), [0, 1], [0, 1])
    whole = trainer.batch.features.modalities["image"].rows
    torch.testing.assert_close(features.modalities["image"].rows, whole, atol=1e-5, rtol=1e-5)
    closed = trainer.gated_features(torch.full(valid.shape, -ALWAYS_KEPT), [0, 1], [0, 1]).modalities["image"].rows
    assert torch.equal(
        closed, trainer.gated_features(torch.full(valid.shape, -ALWAYS_KEPT), [0, 1], [0, 1]).modalities["image"].rows
    )  # noise follows from step and trajectory
    assert not torch.allclose(closed, whole, atol=0.1)


@pytest.mark.parametrize("score", ["logprob", "agreement", "kl"])
def test_gradients_do_not_depend_on_micro_batches(score, make_model, processor, dataset, tmp_path):
    gradients, scores = [], []
    for micro_batch_size in (None, 1):
        settings = {"num_mini_batches": 1, "per_device_train_batch_size": 4, "micro_batch_size": micro_batch_size}
        trainer = stage("noise_gate", make_model, processor, dataset, str(tmp_path), score=score, **settings)
        loss = trainer.training_step(trainer.model, None)
        gradients.append(gradients_of(trainer))
        scores.append(float(loss))
        assert trainer.llm_passes == 3 * len(trainer.rollouts.sample_index)
        assert trainer.metrics["objective/keep_ratio"][0] > 0
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert any(g.any() for g in gradients[0].values())
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, atol=1e-6, rtol=1e-3)


def test_the_gradient_is_the_slope_of_the_loss(make_model, processor, dataset, tmp_path):
    settings = {"num_mini_batches": 1, "per_device_train_batch_size": 4, "score": "logprob"}
    trainer = stage("noise_gate", make_model, processor, dataset, str(tmp_path), **settings)
    trainer.collect(0)
    index = torch.arange(len(trainer.rollouts.sample_index))
    weight = trainer.model.policy.policy_head.weight

    def loss():
        return trainer.trajectory_losses(trainer.model, index).sum()

    loss().backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    slope, step = float((weight.grad * direction).sum()), 1e-2
    with torch.no_grad():
        weight += step * direction
        above = float(loss())
        weight -= 2 * step * direction
        below = float(loss())
    assert slope == pytest.approx((above - below) / (2 * step), rel=0.05)


def test_the_policy_gets_better_on_what_it_learns_from(make_model, processor, dataset, tmp_path):
    settings = {"max_steps": 30, "num_mini_batches": 1, "per_device_train_batch_size": 8, "learning_rate": 2e-2}
    settings |= {"eval_keep_ratios": [0.25], "rollout_keep_ratios": [0.25], "keep_best": False, "score": "kl"}
    trainer = stage("noise_gate", make_model, processor, dataset, str(tmp_path), **settings)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < before


def test_float16_is_refused(make_model, processor, dataset, tmp_path):
    model = make_model()
    model.lvlm.half()
    with pytest.raises(ValueError, match="too small for float16"):
        stage("noise_gate", lambda **_: model, processor, dataset, str(tmp_path))


def test_reward_functions_are_refused(make_model, processor, dataset, tmp_path):
    def length(completions, **columns):
        return [float(len(text)) for text in completions]

    data = {"processing_class": processor, "train_dataset": dataset}
    with pytest.raises(ValueError, match="a reward function has none"):
        NoiseGateTrainer(make_model(), NoiseGateConfig(str(tmp_path)), **data, reward_funcs=length)
    with pytest.raises(ValueError, match="score must be"):
        NoiseGateConfig(str(tmp_path), score="correct")


def test_the_unpruned_score_of_the_trainer_is_that_of_the_others(make_model, processor, dataset, tmp_path):
    """With all gates open the loss is minus the score that other algorithms give to the unpruned prompt."""
    trainer = stage("noise_gate", make_model, processor, dataset, str(tmp_path), score="logprob")
    trainer.collect(0)
    trainer.gated_features = lambda gates, samples, trajectories: trainer.batch.features.take(samples)
    index = torch.arange(len(trainer.rollouts.sample_index))
    losses = trainer.trajectory_losses(trainer.model, index)
    samples = trainer.rollouts.sample_index.tolist()
    valid = trainer.batch.inputs.valid[samples]
    expected = score_answers(trainer.tprl_model, trainer.batch, valid, samples).logprobs
    torch.testing.assert_close(-losses.detach(), expected, atol=1e-5, rtol=1e-5)
