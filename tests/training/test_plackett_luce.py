"""Keep sets drawn without replacement: exact counts, and the probabilities of Plackett and Luce."""

from itertools import permutations

import pytest
import torch

from tests.training.test_trainers import GRPO, gradients_of, stage
from tprl_hf.training import TPRLGRPOConfig, TPRLMAPOConfig
from tprl_hf.training.plackett_luce import NOT_DRAWN, draw_ordered, ordered_logprobs
from tprl_hf.training.rollouts import annealed, logits_at_budget, replayed_logprobs

LOGITS = torch.tensor([0.3, -1.0, 1.2, 0.0, 9.0])
ACTION_MASK = torch.tensor([True, True, True, True, False])  # the likeliest is not to be drawn
SETS = {"draw": "sets", "lambda_disc": 1.0, "shared_budget": 0.0}


def probability_of(order: tuple[int, ...]) -> float:
    """By its definition: each among those that are left."""
    left, probability = [0, 1, 2, 3], 1.0
    for token in order:
        weights = LOGITS[left].exp()
        probability *= float(LOGITS[token].exp() / weights.sum())
        left.remove(token)
    return probability


def ranks_of(order: tuple[int, ...]) -> torch.Tensor:
    ranks = torch.full((len(LOGITS),), NOT_DRAWN)
    ranks[list(order)] = torch.arange(len(order))
    return ranks


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_log_probability_of_an_order_is_that_of_its_definition(count):
    orders = list(permutations(range(4), count))
    ranks = torch.stack([ranks_of(order) for order in orders])
    logits = LOGITS.expand(len(orders), -1)
    terms = ordered_logprobs(logits, ACTION_MASK.expand(len(orders), -1), ranks)
    expected = torch.tensor([probability_of(order) for order in orders])
    torch.testing.assert_close(terms.sum(1).exp(), expected, atol=1e-6, rtol=1e-5)
    assert float(expected.sum()) == pytest.approx(1, abs=1e-5)
    assert not terms[ranks == NOT_DRAWN].any()


def test_orders_are_drawn_as_often_as_they_are_probable():
    draws = 40_000
    generator = torch.Generator().manual_seed(0)
    counts = torch.full((draws,), 2)
    ranks = draw_ordered(LOGITS.expand(draws, -1), ACTION_MASK.expand(draws, -1), counts, generator)
    assert ((ranks != NOT_DRAWN).sum(1) == 2).all() and (ranks[:, 4] == NOT_DRAWN).all()
    for order in permutations(range(4), 2):
        share = (ranks == ranks_of(order)).all(1).float().mean().item()
        expected = probability_of(order)
        assert abs(share - expected) < 5 * (expected * (1 - expected) / draws) ** 0.5, order


def test_the_gradient_is_that_of_the_definition():
    logits = LOGITS.clone().double().requires_grad_()
    ordered_logprobs(logits[None], ACTION_MASK[None], ranks_of((2, 0))[None]).sum().backward()
    plain = LOGITS.clone().double().requires_grad_()
    first, second = plain[2] - plain[:4].logsumexp(0), plain[0] - plain[[0, 1, 3]].logsumexp(0)
    (first + second).backward()
    torch.testing.assert_close(logits.grad, plain.grad)


@pytest.mark.parametrize("ratio", ["joint", "token"])
def test_each_rollout_keeps_its_budget_and_the_ratio_is_1(ratio, make_model, processor, dataset, tmp_path):
    gradients = []
    for micro_batch_size in (None, 1):
        settings = {**SETS, "ratio": ratio, "num_mini_batches": 1, "per_device_train_batch_size": 4}
        trainer = stage(
            "grpo", make_model, processor, dataset, str(tmp_path), **settings, micro_batch_size=micro_batch_size
        )
        trainer.training_step(trainer.model, None)
        rollouts = trainer.rollouts
        kept = (rollouts.keep_masks[1:] & rollouts.action_mask).sum(-1)
        assert torch.equal(kept.float(), rollouts.targets) and (kept > 0).all()
        ratios = torch.tensor(trainer.args.rollout_keep_ratios)
        assert torch.isin(rollouts.num_kept[-1], (16 * ratios).round().long()).all()
        assert trainer.metrics["val/ratio"] == pytest.approx([1.0] * len(trainer.metrics["val/ratio"]), abs=1e-4)
        assert set(trainer.metrics["policy/clipfrac_avg"]) == {0.0}
        with torch.no_grad():
            logits = trainer.model(trainer.batch.inputs, rollouts.sample_index, rollouts.keep_masks[:-1]).logits
        replayed = replayed_logprobs(rollouts, logits_at_budget(rollouts, logits + 0.3, 1.0), 1.0)
        torch.testing.assert_close(replayed, rollouts.logprobs, atol=1e-5, rtol=1e-5)
        gradients.append(gradients_of(trainer))
    assert any(g.any() for g in gradients[0].values())
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, atol=1e-6, rtol=1e-4)


def test_the_token_ratio_is_a_mean_over_the_draws(make_model, processor, dataset, tmp_path):
    """And not over all tokens, which would make small budgets count least."""
    gradients = {}
    for ratio in ("joint", "token"):
        settings = {**SETS, "ratio": ratio, "rollout_keep_ratios": [0.25], "num_steps": 1, "beta": 0.0}
        settings |= {"score": "logprob", "min_logprob": -100.0, "num_mini_batches": 1}
        trainer = stage("grpo", make_model, processor, dataset, str(tmp_path), **settings)
        trainer.training_step(trainer.model, None)
        gradients[ratio] = gradients_of(trainer)
    assert trainer.rollouts.targets.unique().tolist() == [4.0]
    assert any(gradient.any() for gradient in gradients["joint"].values())
    for name, gradient in gradients["joint"].items():
        torch.testing.assert_close(gradients["token"][name], gradient / 4, atol=1e-7, rtol=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(make_model, processor, dataset, tmp_path):
    settings = {**SETS, "max_steps": 7, "save_steps": 6, "save_strategy": "steps", "keep_best": False}
    whole = stage("grpo", make_model, processor, dataset, str(tmp_path), **settings)
    whole.train()
    resumed = stage("grpo", make_model, processor, dataset, str(tmp_path), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    after = resumed.model.state_dict()
    assert all(value.equal(after[name]) for name, value in whole.model.state_dict().items())


@pytest.mark.parametrize(
    "settings", [{"rollout_keep_ratios": None}, {"shared_budget": 0.5}, {"lambda_disc": 0.5}], ids=lambda s: str(*s)
)
def test_sets_need_budgets_of_their_own(settings, tmp_path):
    with pytest.raises(ValueError, match='draw="sets" keeps as many'):
        TPRLGRPOConfig(str(tmp_path), **{**GRPO, **SETS, **settings})


def test_a_memory_does_not_know_the_order(tmp_path):
    with pytest.raises(ValueError, match="MAPO remembers sets"):
        TPRLMAPOConfig(str(tmp_path), **{**GRPO, **SETS})


def test_annealed_budgets_end_at_the_smallest():
    ratios = [1 / 3, 1 / 18, 1 / 9]
    assert [len(annealed(ratios, progress)) for progress in (0, 0.3, 0.34, 0.66, 0.67, 1)] == [3, 3, 2, 2, 1, 1]
    assert annealed(ratios, 0.5) == [1 / 18, 1 / 9] and annealed(ratios, 1) == [1 / 18]


@pytest.mark.parametrize("name", ["grpo", "counterfactual"])
def test_a_run_anneals_its_budgets_and_resumes_so(name, make_model, processor, dataset, tmp_path):
    settings = {"anneal_budgets": True, "shared_budget": 0.0, "max_steps": 8, "save_steps": 1, "save_total_limit": 9}
    settings |= {"num_mini_batches": 2, "num_iterations": 1, "keep_best": False, "save_strategy": "steps"}
    whole = stage(name, make_model, processor, dataset, str(tmp_path), **settings)  # four buffers of two steps
    drawn, encode = [], whole.encode_questions
    whole.encode_questions = lambda buffer: drawn.append(encode(buffer)) or drawn[-1]
    whole.train()
    ratios = [budgets.keep_ratio.unique().tolist() for _, budgets in drawn]
    assert len(ratios) == 4 and max(map(max, ratios[:2])) == 0.5 and ratios[2:] == [[0.25], [0.25]]
    for step in (1, 6):  # in the middle of a buffer, and between two
        resumed = stage(name, make_model, processor, dataset, str(tmp_path), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        after = resumed.model.state_dict()
        assert all(value.equal(after[key]) for key, value in whole.model.state_dict().items())


def test_one_budget_is_not_annealed(tmp_path):
    with pytest.raises(ValueError, match="set at least two"):
        TPRLGRPOConfig(str(tmp_path), **{**GRPO, "rollout_keep_ratios": [0.5], "anneal_budgets": True})
