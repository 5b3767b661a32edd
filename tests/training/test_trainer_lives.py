"""Trainers beside one another, one after another, and cut off: each does what it would do alone and to its end."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.pruners import DivPrune
from tprl_hf.training import (
    AutoencoderConfig,
    AutoencoderTrainer,
    LfDConfig,
    LfDTrainer,
    TPRLGRPOConfig,
    TPRLGRPOTrainer,
    TPRLMAPOConfig,
    TPRLMAPOTrainer,
    TPRLPPOConfig,
    TPRLPPOTrainer,
    generate_demonstrations,
)
from tprl_hf.training.answer_batches import SampleEncoder
from tprl_hf.training.unpruned_answers import UnprunedAnswers

SHARED = {
    "max_steps": 4,
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
}
ROLLOUTS = {
    "num_generations": 4,
    "num_mini_batches": 1,
    "num_iterations": 1,
    "num_steps": 1,
    "rollout_keep_ratios": [0.25, 0.5],
    "efficiency_coef": 0.0,
    "score": "logprob",
    "min_logprob": -50.0,
}


def weights_of(part) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in part.parameters()])


@pytest.fixture
def make_grpo(processor, dataset, tmp_path):
    def make(model, callbacks=(), **settings):
        settings = {**SHARED, **ROLLOUTS, "output_dir": str(tmp_path / "grpo"), **settings}
        data = {"processing_class": processor, "train_dataset": dataset, "callbacks": list(callbacks)}
        reward_funcs = settings.pop("reward_funcs", None)
        return TPRLGRPOTrainer(model, TPRLGRPOConfig(**settings), reward_funcs=reward_funcs, **data)

    return make


@pytest.fixture
def make_lfd(processor, dataset, tmp_path):
    def make(model, rows=None, eval_dataset=None, **settings):
        rows = generate_demonstrations(DivPrune(), model, processor, dataset, [0.5]) if rows is None else rows
        config = LfDConfig(**{**SHARED, "output_dir": str(tmp_path / "lfd"), **settings})
        data = {"processing_class": processor, "train_dataset": rows, "eval_dataset": eval_dataset}
        return LfDTrainer(model, config, **data)

    return make


def test_a_trainer_made_in_between_changes_nothing(make_model, make_grpo, make_lfd, processor, dataset, tmp_path):
    model = make_model()
    config = TPRLPPOConfig(str(tmp_path / "ppo"), **SHARED, score="logprob", min_logprob=-50.0)
    ppo = TPRLPPOTrainer(model, config, processing_class=processor, train_dataset=dataset)
    encoder = AutoencoderTrainer(
        model,
        AutoencoderConfig(str(tmp_path / "autoencoder"), **SHARED),
        processing_class=processor,
        train_dataset=dataset,
    )
    make_lfd(model)
    values, codes = weights_of(model.policy.value_head), weights_of(model.autoencoder)
    encoder.train()
    ppo.train()
    assert not values.equal(weights_of(model.policy.value_head)) and not codes.equal(weights_of(model.autoencoder))


@pytest.mark.parametrize("again", [False, True])
def test_the_policy_is_compared_with_that_which_training_started_with(make_model, make_grpo, make_lfd, again):
    model = make_model()
    settings = {"beta": 1.0, "logging_steps": 1, "save_strategy": "no"}
    trainer = make_grpo(model, learning_rate=5e-2 if again else 0.0, **settings)
    if again:
        trainer.train()
    else:
        make_lfd(model, max_steps=20).train()
    trainer.train()
    first = next(entry["objective/kl"] for entry in trainer.state.log_history if "objective/kl" in entry)
    assert first == pytest.approx(0, abs=1e-6)


def test_a_run_that_is_resumed_with_another_new_policy_ends_the_same(make_model, make_grpo, tmp_path):
    settings = {"max_steps": 6, "save_steps": 3, "beta": 1.0}
    whole = make_grpo(make_model(), **settings)
    whole.train()
    model = make_model()
    with torch.no_grad():
        for weight in model.policy.parameters():
            weight += torch.randn_like(weight)
    resumed = make_grpo(model, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "grpo" / "checkpoint-3"))
    assert weights_of(model.policy).equal(weights_of(whole.tprl_model.policy))


def test_the_seed_governs_a_policy_that_the_trainer_makes(base, make_grpo):
    found = []
    for seed in (0, 0, 1):
        torch.rand(len(found) + 1)  # whatever was drawn before
        found.append(weights_of(make_grpo(base, seed=seed).tprl_model.policy))
    assert found[0].equal(found[1]) and not found[0].equal(found[2])


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **others):
        if state.global_step == 2:
            raise KeyboardInterrupt


class Save(TrainerCallback):
    trainer = None

    def on_step_end(self, args, state, control, **others):
        if state.global_step == 2:
            self.trainer.save_model(f"{args.output_dir}/in-between")


@pytest.mark.parametrize("callback", [Interrupt, Save])
def test_what_is_saved_before_the_end_is_the_trained_policy(make_model, make_grpo, tmp_path, callback):
    model, watcher = make_model(), callback()
    model.set_pruner("divprune")
    trainer = make_grpo(model, callbacks=[watcher], save_strategy="no")
    if callback is Interrupt:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.save_model(f"{tmp_path}/grpo/in-between")
    else:
        watcher.trainer = trainer
        trainer.train()
    saved = TPRLForConditionalGeneration.from_pretrained(tmp_path / "grpo" / "in-between")
    assert saved.config.pruner is None and saved.config.policy_training["stage"] == "grpo"


@pytest.mark.parametrize("budget", [{"threshold": 0.5}, {"num_keep": 4}])
def test_a_budget_of_the_trainer_takes_the_place_of_the_models(make_model, make_lfd, tmp_path, budget):
    trainer = make_lfd(make_model(**budget), keep_ratio=0.5)
    trainer.train()
    trainer.save_model()
    config = TPRLForConditionalGeneration.from_pretrained(tmp_path / "lfd").config
    assert (config.keep_ratio, config.num_keep, config.threshold) == (0.5, None, None)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_penalty_of_the_generation_config_is_not_in_the_references(make_model, make_lfd, dataset, penalty):
    model = make_model()
    model.generation_config.repetition_penalty = penalty
    unlabelled = dataset.remove_columns("answer")
    found = make_lfd(model, eval_dataset=unlabelled, eval_keep_ratios=[1.0]).evaluate()
    assert found["eval_agreement"] == 100 and found["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert model.generation_config.repetition_penalty == penalty


def test_answers_and_masks_of_another_processor_are_not_taken(make_model, processor, dataset, tmp_path):
    import copy

    model, other = make_model(), copy.deepcopy(processor)
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    of_one, of_other = (UnprunedAnswers(model, one, tmp_path / "answers", 8) for one in (processor, other))
    of_one.answers(SampleEncoder(model, processor)([dataset[0]]))
    assert of_one.found([of_one.key(dataset[0])]) != {of_one.key(dataset[0]): None}
    assert of_other.found([of_other.key(dataset[0])]) == {of_other.key(dataset[0]): None}

    masks = {}
    for name, one in {"one": processor, "other": other}.items():
        made = generate_demonstrations(DivPrune(), model, one, dataset, [0.5], output_dir=str(tmp_path / "demos"))
        masks[name] = made["keep_masks"]
    alone = generate_demonstrations(DivPrune(), model, other, dataset, [0.5])["keep_masks"]
    assert masks["other"] == alone != masks["one"]


def test_an_unpruned_answer_without_a_reward_takes_nothing_from_the_rollouts(make_model, make_grpo):
    def length(prompts, completions, **columns):
        return [None] * 4 + [float(len(one)) for one in completions[4:]]  # nothing of the four unpruned ones

    model = make_model()
    before = weights_of(model.policy)
    make_grpo(model, reward_funcs=length, score_every_step=True, beta=0.0, save_strategy="no").train()
    assert not before.equal(weights_of(model.policy))


def test_mapo_shows_the_rollouts_of_a_buffer_with_replays(make_model, processor, dataset, tmp_path):
    settings = SHARED | ROLLOUTS | {"per_device_train_batch_size": 2, "num_generations": 3, "max_steps": 8}
    config = TPRLMAPOConfig(str(tmp_path), **settings, log_completions=True, save_strategy="no")
    trainer = TPRLMAPOTrainer(make_model(), config, processing_class=processor, train_dataset=dataset.select([0, 1]))
    assert trainer.train().global_step == 8


def test_metrics_do_not_depend_on_micro_batches(make_model, make_grpo):
    logs = []
    for size in (None, 3):
        trainer = make_grpo(make_model(), micro_batch_size=size, max_steps=1, logging_steps=1, save_strategy="no")
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[0].keys() == logs[1].keys()
    for name in logs[0].keys() - {"epoch", "step"}:
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4, abs=1e-6), name


def test_rows_that_are_half_labelled_are_refused_when_the_trainer_is_made(make_model, make_lfd, dataset):
    rows = [{**row, "answer": row["answer"] if number else None} for number, row in enumerate(dataset)]
    half = Dataset.from_list(rows, features=dataset.features)
    with pytest.raises(ValueError, match=r"1 of 8 rows of eval_dataset have no `answer`: fill them in, or remove"):
        make_lfd(make_model(), eval_dataset=half, keep_best=False)


def test_datasets_in_torchs_format_are_read_as_others(make_model, make_lfd, processor, dataset):
    model = make_model()
    rows = generate_demonstrations(DivPrune(), model, processor, dataset, [0.5])
    trained = []
    for one in (rows, rows.with_format("torch")):
        trainer = make_lfd(make_model(), rows=one, save_strategy="no")
        trainer.train()
        trained.append(weights_of(trainer.tprl_model.policy))
    assert trained[0].equal(trained[1])


def test_a_reward_function_may_name_one_picture(make_model, make_grpo):
    seen = []

    def look(prompts, completions, image, **columns):
        seen.extend(image)
        return [0.0] * len(completions)

    make_grpo(make_model(), reward_funcs=look, max_steps=1, save_strategy="no").train()
    assert seen and all(np.asarray(one).shape == (24, 24, 3) for one in seen)


@pytest.mark.parametrize("settings", [{"label_smoothing_factor": 0.1}, {"neftune_noise_alpha": 5}])
def test_settings_of_language_models_are_refused(settings, tmp_path):
    assert LfDConfig(str(tmp_path), train_sampling_strategy="sequential").train_sampling_strategy == "sequential"
    with pytest.raises(ValueError, match=r"is for the losses of language models: leave it out"):
        LfDConfig(str(tmp_path), **settings)
