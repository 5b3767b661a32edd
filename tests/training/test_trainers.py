"""Each stage on a tiny LLaVA: from directory to directory, resumed, cut into micro-batches, and stopped by NaN."""

import hashlib
import logging

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForImageTextToText

import tprl_hf
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.data.digest import data_digest
from tprl_hf.pruners import VisPruner
from tprl_hf.report.runs import MASKS, json_lines, read_stage
from tprl_hf.training import (
    AutoencoderConfig,
    AutoencoderTrainer,
    CounterfactualConfig,
    CounterfactualTrainer,
    GradientTeacher,
    LfDConfig,
    LfDTrainer,
    NoiseGateConfig,
    NoiseGateTrainer,
    TPRLGRPOConfig,
    TPRLGRPOTrainer,
    TPRLMAPOConfig,
    TPRLMAPOTrainer,
    TPRLPPOConfig,
    TPRLPPOTrainer,
    calibrate_threshold,
    generate_demonstrations,
    rollout_trainer,
)
from tprl_hf.training.answer_scores import score_answers
from tprl_hf.training.rollouts import logits_at_budget, replayed_logprobs

QUIET = {"disable_tqdm": True, "use_cpu": True, "per_device_eval_batch_size": 4}
ROLLOUTS = {
    **QUIET,
    "per_device_train_batch_size": 2,
    "num_generations": 2,
    "num_mini_batches": 2,
    "learning_rate": 1e-2,
}
PPO = {**ROLLOUTS, "num_ppo_epochs": 2}
BUDGETED = {**ROLLOUTS, "num_iterations": 2, "rollout_keep_ratios": [0.5, 0.25], "shared_budget": 0.5}
GRPO = {**BUDGETED, "min_spread": 1e-4, "score": "logprob"}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 10}
COUNTERFACTUAL = {**BUDGETED, "min_logprob": -100.0, "num_flips": 5}  # an untrained model is below the default


def hash_of(module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def weights_of(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith(("policy.", "autoencoder."))}


def gradients_of(trainer) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def demonstrated(make_model, processor, dataset):
    return generate_demonstrations(GradientTeacher(), make_model(), processor, dataset)


def stage(name, make_model, processor, dataset, output_dir, **settings):
    """A trainer of one stage with an untrained policy."""
    data = {"processing_class": processor, "train_dataset": dataset, "eval_dataset": dataset}
    if name == "autoencoder":
        config = AutoencoderConfig(output_dir, **{**QUIET, "per_device_train_batch_size": 2, **settings})
        return AutoencoderTrainer(make_model(), config, **data)
    if name == "lfd":
        config = LfDConfig(
            output_dir, **{**QUIET, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **settings}
        )
        data["train_dataset"] = demonstrated(make_model, processor, dataset)
        return LfDTrainer(make_model(), config, **data)
    if name == "grpo":
        config = TPRLGRPOConfig(output_dir, **{**GRPO, **settings})
        return TPRLGRPOTrainer(make_model(policy_budget=True, policy_similarity=True), config, **data)
    if name == "mapo":
        config = TPRLMAPOConfig(output_dir, **{**GRPO, "shared_budget": 0.0, **settings})
        return TPRLMAPOTrainer(make_model(policy_budget=True), config, **data)
    if name == "counterfactual":
        config = CounterfactualConfig(output_dir, **{**COUNTERFACTUAL, **settings})
        return CounterfactualTrainer(make_model(policy_budget=True, policy_similarity=True), config, **data)
    if name == "noise_gate":
        config = NoiseGateConfig(output_dir, **{**ROLLOUTS, "rollout_keep_ratios": [0.5, 0.25], **settings})
        return NoiseGateTrainer(make_model(policy_budget=True, policy_similarity=True), config, **data)
    config = TPRLPPOConfig(output_dir, **{**PPO, "score": "logprob", **settings})
    return TPRLPPOTrainer(make_model(), config, **data)


def test_from_directory_to_directory(base, processor, dataset, make_model, tmp_path):
    frozen = hash_of(AutoModelForImageTextToText.from_pretrained(base))
    paths = {name: str(tmp_path / name) for name in ("a", "demonstrations", "b", "c")}
    data = {"processing_class": processor, "train_dataset": dataset, "eval_dataset": dataset}

    trainer = AutoencoderTrainer(make_model(), AutoencoderConfig(paths["a"], max_steps=3, **QUIET), **data)
    trainer.train()
    assert trainer.evaluate()["eval_explained_variance"] < 1
    trainer.save_model()

    model = TPRLForConditionalGeneration.from_pretrained(paths["a"])
    generate_demonstrations(VisPruner(), model, processor, dataset, output_dir=paths["demonstrations"])

    demonstrations = load_from_disk(paths["demonstrations"])
    config = LfDConfig(paths["b"], max_steps=3, eval_strategy="steps", eval_steps=1, keep_ratio=0.5, **QUIET)
    trainer = LfDTrainer(model, config, **{**data, "train_dataset": demonstrations})
    trainer.train()
    trainer.save_model()

    model = TPRLForConditionalGeneration.from_pretrained(paths["b"])
    assert model.config.keep_ratio == 0.5
    config = TPRLPPOConfig(paths["c"], max_steps=3, logging_steps=1, eval_strategy="steps", eval_steps=2, **PPO)
    trainer = TPRLPPOTrainer(model, config, **data)
    trainer.train()
    trainer.save_model()
    logged = {name for entry in trainer.state.log_history for name in entry}
    for name in ("objective/score", "policy/approxkl_avg", "policy/clipfrac_avg", "loss/value_avg", "eval_accuracy"):
        assert name in logged
    assert "val/explained_variance" in logged and "objective/keep_ratio" in logged

    final = TPRLForConditionalGeneration.from_pretrained(paths["c"])
    assert hash_of(final.lvlm) == frozen == hash_of(model.lvlm)
    assert all(final.state_dict()[name].equal(value) for name, value in weights_of(model).items())


@pytest.mark.parametrize("name", ["autoencoder", "lfd", "ppo", "grpo", "mapo", "counterfactual", "noise_gate"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name, make_model, processor, dataset, tmp_path):
    # a buffer lasts 4 steps: step 6 is in the middle of the second
    settings = {"max_steps": 7, "save_steps": 6, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 2}
    whole = stage(name, make_model, processor, dataset, str(tmp_path), **settings)
    start = weights_of(whole.tprl_model)
    whole.train()
    resumed = stage(name, make_model, processor, dataset, str(tmp_path), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    after = weights_of(resumed.tprl_model)
    assert all(value.equal(after[key]) for key, value in weights_of(whole.tprl_model).items())
    if name == "autoencoder":
        assert not all(value.equal(start[key]) for key, value in after.items())
    else:
        assert whole.best["step"] == resumed.best["step"] and whole.best["score"] == resumed.best["score"]
    last = [[log for log in t.state.log_history if "loss" in log or "eval_logprob" in log] for t in (whole, resumed)]
    assert last[0] == last[1]


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("ppo", {"ratio": "joint"}),
        ("ppo", {"ratio": "token"}),
        ("grpo", {"ratio": "joint"}),
        ("grpo", {"ratio": "token"}),
        ("counterfactual", {}),
    ],
)
def test_the_ratio_is_1_after_the_rollout_and_micro_batches_change_nothing(
    name, ratio, make_model, processor, dataset, tmp_path
):
    gradients = []
    for micro_batch_size in (None, 1):
        settings = {"num_mini_batches": 1, "per_device_train_batch_size": 4, "micro_batch_size": micro_batch_size}
        trainer = stage(name, make_model, processor, dataset, str(tmp_path), **ratio, **settings)
        trainer.training_step(trainer.model, None)
        assert set(trainer.metrics["policy/clipfrac_avg"]) == {0.0}
        assert trainer.metrics["val/ratio"] == pytest.approx([1.0] * len(trainer.metrics["val/ratio"]), abs=1e-4)
        rollouts = trainer.rollouts
        with torch.no_grad():
            logits = trainer.model(trainer.batch.inputs, rollouts.sample_index, rollouts.keep_masks[:-1]).logits
        lambda_disc = 1.0 if name == "counterfactual" else trainer.args.lambda_disc  # of one step
        logits = logits_at_budget(rollouts, logits + 0.3, lambda_disc) - 0.3 * (rollouts.targets == 0)[..., None]
        logprobs = replayed_logprobs(rollouts, logits, lambda_disc)
        torch.testing.assert_close(logprobs, rollouts.logprobs, atol=1e-5, rtol=1e-5)
        assert not logprobs[~rollouts.action_mask].any()
        assert not (rollouts.keep_masks[1:] & ~rollouts.keep_masks[:-1]).any()
        gradients.append(gradients_of(trainer))
    assert gradients[0].keys() == gradients[1].keys() and any(g.any() for g in gradients[0].values())
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["autoencoder", "lfd"])
def test_a_batch_of_8_gives_the_gradient_of_8_batches_of_1(name, make_model, processor, dataset, tmp_path):
    trainer = stage(name, make_model, processor, dataset, str(tmp_path))
    rows = [trainer.train_dataset[i] for i in range(8)]
    if name == "lfd":  # of several lengths
        rows[0]["keep_masks"] = rows[0]["keep_masks"][:1]
    trainer.compute_loss(trainer.model, rows).backward()
    whole = gradients_of(trainer)
    trainer.model.zero_grad()
    for row in rows:
        (trainer.compute_loss(trainer.model, [row]) / 8).backward()
    for key, value in gradients_of(trainer).items():
        torch.testing.assert_close(value, whole[key], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["autoencoder", "lfd", "ppo", "grpo", "mapo", "counterfactual", "noise_gate"])
def test_nan_stops_with_the_data_saved(name, make_model, processor, dataset, tmp_path):
    trainer = (
        stage(name, make_model, processor, dataset, str(tmp_path), max_steps=4, keep_best=False)
        if name != "autoencoder"
        else stage(name, make_model, processor, dataset, str(tmp_path), max_steps=4)
    )
    bad = trainer.model.policy.policy_head.bias if name != "autoencoder" else trainer.model.autoencoder.decoder[0].bias
    bad.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"at step 0\. .*nan-step-0\.pt.*learning_rate"):
        trainer.train()
    saved = torch.load(tmp_path / "nan-step-0.pt", weights_only=False)
    assert saved["step"] == 0 and saved["inputs"] and any(v.isnan().any() for v in saved["weights"].values())


@pytest.mark.parametrize("name", ["autoencoder", "lfd", "ppo", "grpo", "mapo", "counterfactual", "noise_gate"])
def test_rows_without_a_picture_are_measured_and_not_trained_on(
    name, make_model, processor, dataset, tmp_path, caplog
):
    mixed = dataset.map(lambda row, number: {"images": row["images"] if number < 4 else []}, with_indices=True)
    mixed = mixed.cast(dataset.features)
    trainer = stage(name, make_model, processor, mixed, str(tmp_path), max_steps=2, per_device_eval_batch_size=4)
    assert "4 of 8 rows have no picture, and are left out" in caplog.text
    assert trainer.train_dataset["prompt"] == dataset["prompt"][:4]
    trainer.train()
    whole = trainer.evaluate()
    if name == "autoencoder":  # they have no tokens to code
        assert trainer.evaluate(mixed.select(range(4))) == pytest.approx(whole, rel=1e-5)
    else:
        metric = "eval_kl" if name == "noise_gate" else "eval_logprob"
        parts = [trainer.evaluate(mixed.select(half))[metric] for half in (range(4), range(4, 8))]
        assert whole[metric] == pytest.approx(sum(parts) / 2, abs=1e-5)
        unlabelled = trainer.evaluate(mixed.remove_columns("answer").select(range(4, 8)))
        assert unlabelled["eval_agreement"] == 100  # nothing is pruned
        assert trainer.predict(mixed).predictions.any((1, 2)).tolist() == [True] * 4 + [False] * 4
    with pytest.raises(ValueError, match="No row of train_dataset has a picture"):
        stage(name, make_model, processor, mixed.select(range(4, 8)), str(tmp_path))


def test_only_the_policy_learns(make_model, processor, dataset, tmp_path):
    for name in ("lfd", "ppo", "grpo", "mapo", "counterfactual", "noise_gate"):
        trainer = stage(name, make_model, processor, dataset, str(tmp_path / name), max_steps=2, keep_best=False)
        before, frozen = weights_of(trainer.tprl_model), hash_of(trainer.tprl_model.lvlm)
        trainer.train()
        changed = {key for key, value in weights_of(trainer.tprl_model).items() if not value.equal(before[key])}
        assert changed and all(key.startswith("policy.") for key in changed)
        assert hash_of(trainer.tprl_model.lvlm) == frozen
        assert not any(p.requires_grad or p.grad is not None for p in trainer.tprl_model.lvlm.parameters())


def test_the_encoder_may_learn_with_the_policy(make_model, processor, dataset, tmp_path):
    trainer = stage(
        "lfd", make_model, processor, dataset, str(tmp_path), max_steps=1, train_encoder=True, keep_best=False
    )
    before = weights_of(trainer.tprl_model)
    trainer.train()
    changed = {key for key, value in weights_of(trainer.tprl_model).items() if not value.equal(before[key])}
    assert any(key.startswith("autoencoder.encoder") for key in changed)
    assert not any(key.startswith("autoencoder.decoder") for key in changed)


def test_the_best_weights_are_kept_the_start_included(make_model, processor, dataset, tmp_path, caplog):
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = stage("ppo", make_model, processor, dataset, str(tmp_path), **settings)
    start = weights_of(trainer.tprl_model)
    worse = iter([-1.0, -2.0, -3.0])
    trainer.measure = lambda dataset: {"logprob": next(worse), "accuracy": 50.0}
    monitored = logging.getLogger("transformers")
    monitored.addHandler(caplog.handler)
    trainer.train()
    monitored.removeHandler(caplog.handler)
    assert trainer.best["step"] == 0 == trainer.state.best_global_step
    measured = [
        (entry["step"], entry["eval_logprob"]) for entry in trainer.state.log_history if "eval_logprob" in entry
    ]
    assert measured == [(0, -1.0), (1, -2.0), (2, -3.0)]
    told = (
        "TPRL PPO ended below its start: eval_logprob -1 at step 0, -3 at step 2. The model is that of the start (-1)."
    )
    assert told in caplog.text
    assert all(value.equal(start[key]) for key, value in weights_of(trainer.tprl_model).items())


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_a_policy_that_ends_at_its_start_leaves_the_pruner(make_model, processor, dataset, tmp_path, save_strategy):
    """Without it the untrained model, whose budget that is, would answer unpruned."""
    model = make_model()
    model.set_pruner("divprune", keep_ratio=0.5)
    before = model.config.pruner, model.config.policy_training
    settings = {**QUIET, "max_steps": 2, "save_steps": 1, "save_strategy": save_strategy, "learning_rate": 0.0}
    data = {"processing_class": processor, "eval_dataset": dataset}
    data["train_dataset"] = demonstrated(make_model, processor, dataset)
    trainer = LfDTrainer(model, LfDConfig(str(tmp_path), **settings), **data)
    trainer.train()
    assert trainer.best["step"] == 0 and (model.config.pruner, model.config.policy_training) == before
    trainer.save_model(str(tmp_path / "end"))
    assert TPRLForConditionalGeneration.from_pretrained(tmp_path / "end").config.pruner == before[0]
    assert type(model.pruner).__name__ == "DivPrune"


def test_masks_over_time_are_of_the_weights_of_their_step(make_model, processor, dataset, tmp_path):
    """At the end the last step is measured once more, with the best weights."""
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1.0}
    trainer = stage("ppo", make_model, processor, dataset, str(tmp_path), **settings)
    measure, worse = trainer.measure, iter([-1.0, -2.0, -3.0, -1.0])
    trainer.measure = lambda dataset: {**measure(dataset), "logprob": next(worse)}
    trainer.train()
    trainer.evaluate()
    start, first, second, again = json_lines(tmp_path / MASKS)
    assert read_stage(tmp_path).masks == [start, first, second]
    assert again["step"] == second["step"] and again["masks"] == start["masks"] != second["masks"]


def test_reward_functions_see_what_trl_shows_them(make_model, processor, dataset, tmp_path, monkeypatch):
    seen = []

    def length(prompts, completions, answer, **columns):
        seen.append((prompts, completions, answer, columns))
        return [float(len(text.split())) for text in completions]

    def brief(completions, **columns):
        return [-float(len(text)) for text in completions]

    config = TPRLPPOConfig(str(tmp_path), max_completion_length=3, reward_weights=[1.0, 0.5], **PPO)
    data = {"processing_class": processor, "train_dataset": dataset}
    trainer = TPRLPPOTrainer(make_model(), config, **data, reward_funcs=[length, brief])
    monkeypatch.setattr(rollout_trainer, "score_answers", None)  # no pass of the LLM but for the answers
    trainer.collect(0)
    (prompts, completions, answers, columns) = seen[0]
    assert len(prompts) == len(completions) == len(answers) == 2 + 3 * 4
    assert "question_type" in columns and "images" not in columns
    words = sum(len(text.split()) for text in completions[-4:]) / 4
    letters = sum(len(text) for text in completions[-4:]) / 4
    logged = {name: values[0] for name, values in trainer.metrics.items()}
    assert logged["rewards/length/mean"] == pytest.approx(words)
    assert logged["rewards/brief/mean"] == pytest.approx(-letters)
    assert logged["objective/score"] == pytest.approx(words - 0.5 * letters)
    assert "objective/accuracy" not in logged
    with pytest.raises(ValueError, match="some share one: brief, brief"):
        TPRLPPOTrainer(make_model(), TPRLPPOConfig(str(tmp_path), **PPO), **data, reward_funcs=[brief] * 2)
    with pytest.raises(ValueError, match=r"reward_weights=\[1.0, 0.5\] are not one for each of \['brief'\]"):
        TPRLPPOTrainer(make_model(), config, **data, reward_funcs=brief)


def test_rollouts_without_data_are_refused(make_model, processor, tmp_path):
    trainer = TPRLPPOTrainer(make_model(), TPRLPPOConfig(str(tmp_path), **PPO), processing_class=processor)
    with pytest.raises(ValueError, match="TPRLPPOTrainer has no train_dataset"):
        trainer.train()


def test_counterfactual_advantages_are_what_keeping_a_token_earns(make_model, processor, dataset, tmp_path):
    settings = {"efficiency_coef": 0.5, "min_logprob": -4.0, "scale_advantages": False, "min_spread": 0.0}
    settings |= {"rollout_keep_ratios": None, "shared_budget": 0.0, "weight_by_budget": False}
    trainer = stage("counterfactual", make_model, processor, dataset, str(tmp_path), **settings)
    trainer.collect(0)
    (advantages,), rollouts, batch = trainer.buffer["advantages"], trainer.rollouts, trainer.batch
    flipped = advantages.nonzero().tolist()
    assert len(flipped) == 5 * len(rollouts.sample_index)
    for row, bit in flipped:
        kept, sample = rollouts.keep_masks[1, row].clone(), int(rollouts.sample_index[row])
        rewards = []
        for keep in (True, False):
            kept[bit] = keep
            (score,) = score_answers(trainer.tprl_model, batch, kept[None], [sample]).logprobs.clamp(min=-4)
            rewards.append(score - 0.5 * kept.sum() / batch.inputs.valid[sample].sum())
        torch.testing.assert_close(advantages[row, bit], rewards[0] - rewards[1], atol=1e-5, rtol=1e-4)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert any(not value.equal(before[name]) for name, value in trainer.model.state_dict().items())


def test_at_a_shared_budget_tokens_compete(make_model, processor, dataset, tmp_path):
    one_budget = {"rollout_keep_ratios": [0.5], "weight_by_budget": False, "scale_advantages": False}

    def collected(shared_budget, **changed):
        settings = {**one_budget, "shared_budget": shared_budget, **changed}
        trainer = stage("counterfactual", make_model, processor, dataset, str(tmp_path), **settings)
        trainer.collect(0)
        return trainer

    trainer = collected(1.0, min_spread=0.0)
    (advantages,), rollouts = trainer.buffer["advantages"], trainer.rollouts
    probs, drawn = rollouts.logprobs[0].exp(), rollouts.action_mask[0]
    weights = probs * (1 - probs) * drawn
    assert advantages[drawn].abs().min() > 0  # also of bits that were not flipped
    torch.testing.assert_close((advantages * weights).sum(), torch.tensor(0.0), atol=1e-6, rtol=0)

    few = collected(1.0, min_spread=trainer.buffer["advantages"].abs().amax(-1).median().item())
    assert few.metrics["objective/is_trained_on"][0] < 1
    assert few.buffer["is_trained_on"].all()  # they give way, whoever gains nothing
    alone = collected(0.0, min_spread=0.0).buffer["advantages"]
    assert (alone == 0).any()
    weighted = collected(0.0, min_spread=0.0, weight_by_budget=True).buffer["advantages"]
    torch.testing.assert_close(weighted, 0.5 * alone)


def test_a_budget_has_the_gradient_of_its_shift(make_model, processor, dataset, tmp_path):
    trainer = stage("grpo", make_model, processor, dataset, str(tmp_path), shared_budget=0.0, num_steps=2)
    trainer.collect(0)
    rollouts = trainer.rollouts
    generator = torch.Generator().manual_seed(0)
    logits, direction = torch.randn(2, *rollouts.action_mask.shape, generator=generator, dtype=torch.float64)
    rollouts.targets = rollouts.targets.double()

    def at_budget(x):
        return logits_at_budget(rollouts, x, trainer.args.lambda_disc)

    for step, action_mask in enumerate(rollouts.action_mask):
        probs = trainer.args.lambda_disc**step * at_budget(logits)[step].sigmoid()
        reachable = rollouts.targets[step] < 0.99 * trainer.args.lambda_disc**step * action_mask.sum(1)
        torch.testing.assert_close((probs * action_mask).sum(1)[reachable], rollouts.targets[step][reachable])
    torch.testing.assert_close(at_budget(logits + 0.7)[:1], at_budget(logits)[:1])  # a common offset is no difference
    moved = logits.clone().requires_grad_()
    weights = torch.randn(rollouts.action_mask[0].shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((at_budget(moved)[0] * weights).sum(), moved)
    step = 1e-5
    change = at_budget(logits + step * direction)[0] - at_budget(logits - step * direction)[0]
    expected = (change * weights).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), expected, atol=1e-4, rtol=1e-4)


def test_only_the_last_step_may_be_scored(make_model, processor, dataset, tmp_path):
    advantages = []
    for every in (True, False):
        trainer = stage("grpo", make_model, processor, dataset, str(tmp_path), score_every_step=every)
        trainer.collect(0)
        advantages.append(trainer.buffer["advantages"][0])
        assert ("objective/score_unpruned" in trainer.metrics) == every
    # without discount the scores between cancel, and among the rollouts of a question that of the unpruned prompt
    torch.testing.assert_close(advantages[0], advantages[1], atol=1e-5, rtol=1e-4)


def test_probes_say_which_questions_are_worth_scoring(make_model, processor, dataset, tmp_path):
    """Scores are those of scoring all; questions whose probes agree are left, and cost only their probes."""

    def collected(**settings):
        asked = {"efficiency_coef": 0.0, "num_generations": 4, "per_device_train_batch_size": 8, "min_logprob": -100.0}
        settings = {**asked, "score_every_step": False, **settings}
        trainer = stage("grpo", make_model, processor, dataset, str(tmp_path), **settings)
        trainer.collect(0)
        return trainer

    def scores_of(trainer, groups):
        return trainer.final_scores.view(-1, 4)[groups]

    every = collected()
    probes = every.final_scores.view(-1, 4)[:, :2].std(1)
    middle = float(probes.sort().values[3:5].mean())  # some questions are below it, some above
    assert 0 < middle < probes.max()
    trainer = collected(num_probes=2, min_spread=middle)
    open_groups = probes >= middle
    torch.testing.assert_close(scores_of(trainer, open_groups), scores_of(every, open_groups), atol=1e-5, rtol=1e-4)
    left = scores_of(trainer, ~open_groups)
    assert left[:, 2:].isnan().all() and not left[:, :2].isnan().any()
    questions = len(probes)
    assert trainer.num_scored == 2 * questions + 2 * int(open_groups.sum()) < every.num_scored == 4 * questions
    advantages, same = (one.buffer["advantages"][0].view(-1, 4) for one in (trainer, every))
    torch.testing.assert_close(advantages[open_groups], same[open_groups], atol=1e-3, rtol=1e-3)
    trained_on = trainer.buffer["is_trained_on"].view(-1, 4)
    assert trained_on.any() and not trained_on[~open_groups].any()


def test_ppo_may_score_the_last_step_alone(make_model, processor, dataset, tmp_path):
    """Without discounts the returns are the same; the LLM scores a third of the masks, and each question unpruned."""
    made = []
    for every in (True, False):
        undiscounted = {"gamma": 1.0, "lam": 1.0, "whiten_advantages": False, "num_steps": 3}
        trainer = stage("ppo", make_model, processor, dataset, str(tmp_path), score_every_step=every, **undiscounted)
        trainer.collect(0)
        assert "objective/score_unpruned" in trainer.metrics
        made.append((trainer.buffer["returns"][0], trainer.rollouts, trainer.metrics, trainer.num_scored))
    (returns, rollouts, metrics, scored), (last, same, others, fewer) = made
    assert torch.equal(rollouts.keep_masks, same.keep_masks)
    # the return of the first step, which all trajectories have; later ones lack what was scored before them
    torch.testing.assert_close(returns, last, atol=1e-5, rtol=1e-4)
    rewards = [float(one["objective/reward"][-1]) for one in (metrics, others)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)
    questions, trajectories = len(trainer.batch), len(rollouts.sample_index)
    assert (scored, fewer) == (questions + 3 * trajectories, questions + trajectories)


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (TPRLGRPOConfig, {**GRPO, "num_generations": 1}, r"at least 2; got 1\. GRPO compares"),
        (
            TPRLMAPOConfig,
            {**GRPO, "shared_budget": 0.0, "num_generations": 4, "num_probes": 2, "score_every_step": False},
            "num_probes=2: MAPO scores all",
        ),
        (TPRLGRPOConfig, {**GRPO, "num_probes": 2, "num_generations": 2}, "less than num_generations=2; got 2"),
        (TPRLGRPOConfig, {**GRPO, "num_probes": 2, "num_generations": 8}, "set score_every_step=False and min_spread"),
        (TPRLPPOConfig, {**PPO, "gradient_accumulation_steps": 2}, "micro_batch_size"),
        (TPRLPPOConfig, {**PPO, "data_seed": 3}, "data_seed=3 have no effect here"),
        (TPRLGRPOConfig, {**GRPO, "train_sampling_strategy": "sequential"}, "'sequential' and data_seed=None have no"),
        (TPRLPPOConfig, {**PPO, "ratio": "geometric"}, "ratio must be 'joint' or 'token'; got 'geometric'"),
        (
            TPRLPPOConfig,
            {**PPO, "score": "f1"},
            "score must be 'correct' or 'logprob' or 'agreement' or 'kl'; got 'f1'",
        ),
        (TPRLGRPOConfig, {**GRPO, "scale_rewards": "batch"}, "scale_rewards must be 'group' or 'none'; got 'batch'"),
        (TPRLPPOConfig, {**PPO, "num_mini_batches": 3}, "4 trajectories cannot be cut"),
        (TPRLGRPOConfig, {**ROLLOUTS, "shared_budget": 0.5}, "share of buffers"),
        (
            CounterfactualConfig,
            {"rollout_keep_ratios": None, "shared_budget": 0.0},
            "weight_by_budget=True multiplies",
        ),
        (CounterfactualConfig, {"num_flips": 0}, "at least 1"),
        (LfDConfig, {"best_metric": "f1"}, "'accuracy' or 'logprob'"),
        (LfDConfig, {"eval_keep_ratios": [0.0]}, "that is KEPT"),
        (LfDConfig, {"eval_keep_ratios": [0.5001, 0.5004]}, r"first three decimals.*got \[0.5001, 0.5004\]"),
        (LfDConfig, BEST, "'loss' is not measured.*set one .*such as 'eval_logprob' or, without labels"),
        (AutoencoderConfig, BEST, "'loss' is not measured.*such as 'eval_explained_variance'"),
        (LfDConfig, {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "'loss' is not measured"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config_class, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config_class(str(tmp_path), **{**QUIET, **settings})


def test_the_config_says_how_the_policy_was_trained(make_model, processor, dataset, tmp_path):
    trainer = stage("autoencoder", make_model, processor, dataset, str(tmp_path / "autoencoder"), max_steps=1)
    trainer.train()
    assert trainer.tprl_model.config.policy_training is None
    for name in ("lfd", "ppo", "grpo", "mapo", "counterfactual", "noise_gate"):
        path = str(tmp_path / name)
        settings = {"max_steps": 2, "save_steps": 1, "keep_best": False}
        trainer = stage(name, make_model, processor, dataset, path, **settings)
        trainer.recipe = "mine"
        trainer.train()
        trainer.save_model()
        for saved in (path, f"{path}/checkpoint-1"):
            found = TPRLForConditionalGeneration.from_pretrained(saved).config.policy_training
            data = data_digest(trainer.train_dataset)
            assert found == {"stage": name, "recipe": "mine", "data": data, "version": tprl_hf.__version__}
    assert data_digest(dataset) == data_digest(dataset.select(range(8))) != data_digest(dataset.select(range(7)))
    assert data_digest(dataset.remove_columns("image_id")) != data_digest(dataset.select(range(7)))


def test_a_policy_that_ends_as_it_began_is_not_called_trained(make_model, processor, dataset, tmp_path):
    trainer = stage("ppo", make_model, processor, dataset, str(tmp_path), max_steps=1, save_strategy="no")
    worse = iter([-1.0, -2.0])
    remember = trainer.remember_if_best
    trainer.remember_if_best = lambda metrics: remember({**metrics, "eval_logprob": next(worse)})
    trainer.train()
    assert trainer.best["step"] == 0 and trainer.tprl_model.config.policy_training is None


def test_demonstrations_replace_those_of_another_teacher(make_model, processor, dataset, tmp_path):
    expected = demonstrated(make_model, processor, dataset)
    before = generate_demonstrations(VisPruner(), make_model(), processor, dataset)
    assert before["keep_masks"] != expected["keep_masks"]
    again = generate_demonstrations(GradientTeacher(), make_model(), processor, before, output_dir=str(tmp_path / "d"))
    assert again["keep_masks"] == expected["keep_masks"] and again.column_names == expected.column_names


def test_lfd_needs_demonstrations(make_model, processor, dataset, tmp_path):
    with pytest.raises(ValueError, match="generate_demonstrations"):
        LfDTrainer(make_model(), LfDConfig(str(tmp_path), **QUIET), processing_class=processor, train_dataset=dataset)


def test_a_calibrated_threshold_keeps_the_asked_share(make_model, processor, dataset):
    model = make_model(policy_positions=True, policy_training={"stage": "lfd"})
    model.policy.policy_head.weight.data.mul_(10)
    threshold = calibrate_threshold(model, processor, dataset, keep_ratio=0.5)
    assert model.config.threshold == threshold and model.config.keep_ratio is None
    kept = [model.prune(**row).keep_mask for row in inputs_of(model, processor, dataset)]
    assert torch.cat(kept).float().mean().item() == pytest.approx(0.5, abs=0.05)


def inputs_of(model, processor, dataset):
    from tprl_hf.training.answer_batches import SampleEncoder

    return [SampleEncoder(model, processor).process(row) for row in dataset]


def test_rows_without_a_picture_do_not_move_the_threshold(make_model, processor, dataset):
    model = make_model()
    expected = calibrate_threshold(model, processor, dataset.select(range(4)), 0.5, batch_size=2)
    mixed = dataset.map(lambda row, number: {"images": row["images"] if number < 4 else []}, with_indices=True)
    mixed = mixed.cast(dataset.features)
    assert calibrate_threshold(model, processor, mixed, 0.5, batch_size=2) == expected
    with pytest.raises(ValueError, match="No row of dataset has a picture"):
        calibrate_threshold(model, processor, mixed.select(range(4, 8)), 0.5)


def test_the_end_is_measured_where_nothing_else_is(make_model, processor, dataset, tmp_path):
    trainer = stage("ppo", make_model, processor, dataset, str(tmp_path), max_steps=1)
    better = iter([-2.0, -1.0])
    remember = trainer.remember_if_best
    trainer.remember_if_best = lambda metrics: remember({**metrics, "eval_logprob": next(better)})
    trainer.train()
    assert trainer.best["step"] == 1


@pytest.mark.parametrize("name", ["ppo", "grpo", "mapo", "counterfactual"])
def test_training_stops_after_so_many_passes_of_the_llm(name, make_model, processor, dataset, tmp_path, monkeypatch):
    scored = []
    for function in ("score_answers",):
        real = getattr(rollout_trainer, function)
        monkeypatch.setattr(
            rollout_trainer,
            function,
            lambda m, b, masks, *rest, real=real: scored.append(len(masks)) or real(m, b, masks, *rest),
        )
    settings = {"max_steps": 40, "max_llm_passes": 40, "logging_steps": 1, "keep_best": False, "save_steps": 6,
                "save_strategy": "steps", "save_total_limit": None}  # fmt: skip
    trainer = stage(name, make_model, processor, dataset, str(tmp_path), **settings)
    trainer.train()
    assert trainer.llm_passes == sum(scored) >= 40 > sum(scored[:-2])
    assert trainer.state.global_step % trainer.updates_per_buffer == 0  # the last buffer is learned from
    logged = [entry["llm_passes"] for entry in trainer.state.log_history if "llm_passes" in entry]
    assert logged == sorted(logged) and logged[-1] == trainer.llm_passes

    resumed = stage(name, make_model, processor, dataset, str(tmp_path), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert (resumed.state.global_step, resumed.llm_passes) == (trainer.state.global_step, trainer.llm_passes)
    # the last step was saved, and the process ended before the training did
    last = tmp_path / f"checkpoint-{trainer.state.global_step}"
    if not last.exists():
        settings["save_steps"] = trainer.state.global_step
        stage(name, make_model, processor, dataset, str(tmp_path), **settings).train()
    again = stage(name, make_model, processor, dataset, str(tmp_path), **settings)
    again.train(resume_from_checkpoint=str(last))
    assert (again.state.global_step, again.llm_passes) == (trainer.state.global_step, trainer.llm_passes)


@pytest.mark.parametrize("name", ["ppo", "mapo", "lfd"])
def test_a_second_training_knows_nothing_of_the_first(name, make_model, processor, dataset, tmp_path):
    """Nor of its data: rows are known by their numbers, and the order of these changes here."""
    settings = {"max_steps": 8, "save_strategy": "no", "logging_steps": 1, "learning_rate": 0.0}
    if name != "lfd":
        settings |= {"max_llm_passes": 50}
    if name == "ppo":
        settings |= {"critic_learning_rate": 0.0}
    used, new = (stage(name, make_model, processor, dataset, str(tmp_path), **settings) for _ in range(2))
    used.train()
    other = used.train_dataset.select(range(7, 0, -1))
    rows = []
    for trainer in (used, new):
        trainer.train_dataset = trainer.eval_dataset = other
        trainer.train()
        rows.append([row for row in trainer.state.log_history if "loss" in row or "eval_logprob" in row])
    assert rows[0] == rows[1] and used.best["score"] == new.best["score"]
    used.note_training(1)
    assert used.tprl_model.config.policy_training["data"] == data_digest(used.train_dataset)


@pytest.mark.parametrize("ratios", [[0.5], None])
def test_a_policy_that_is_told_its_budget_should_train_at_budgets(
    make_model, processor, dataset, tmp_path, caplog, ratios
):
    stage("grpo", make_model, processor, dataset, str(tmp_path), rollout_keep_ratios=ratios, shared_budget=0.0)
    assert ("these rollouts have none: set rollout_keep_ratios" in caplog.text) == (ratios is None)


@pytest.mark.parametrize(("discount", "num_steps", "told"), [(0.5, 2, True), (1.0, 2, False), (0.5, 1, False)])
def test_a_discount_works_against_budgets_in_later_steps(tmp_path, caplog, discount, num_steps, told):
    TPRLGRPOConfig(
        str(tmp_path), report_to="none", rollout_keep_ratios=[0.5], lambda_disc=discount, num_steps=num_steps
    )
    assert ("lambda_disc=0.5 draws fewer tokens in later steps" in caplog.text) == told
