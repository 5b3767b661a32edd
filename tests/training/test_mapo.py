"""Memory-augmented policy optimisation: what is remembered, and what it weighs."""

from pathlib import Path

import pytest
import torch

from tprl_hf.cli.paper_tables import read_table, runs_of
from tprl_hf.training import TPRLMAPOConfig, TPRLMAPOTrainer
from tprl_hf.training.mapo_trainer import Memory, memory_weights
from tprl_hf.training.rollouts import Budgets, collect_rollouts, rollouts_of_masks

SETTINGS = {
    "use_cpu": True,
    "disable_tqdm": True,
    "score": "logprob",
    "min_logprob": -100.0,  # an untrained model is below the default
    "per_device_train_batch_size": 8,  # all questions: a second buffer asks them again
    "num_generations": 4,
    "rollout_keep_ratios": [0.5],
    "lambda_disc": 1.0,
    "num_steps": 2,
}


def make_trainer(make_model, processor, dataset, path, **settings):
    config = TPRLMAPOConfig(str(path), **{**SETTINGS, **settings})
    return TPRLMAPOTrainer(make_model(policy_budget=True), config, processing_class=processor, train_dataset=dataset)


def test_the_best_trajectories_are_kept_once():
    memory = Memory(3)
    masks = torch.tensor([[[1, 0, 1]], [[0, 1, 1]], [[1, 1, 0]], [[0, 0, 1]]]).bool()
    memory.add("question", torch.tensor([[0.1], [0.4], [0.2], [0.3]]), masks)
    memory.add("question", torch.tensor([[0.4], [0.25]]), torch.stack([masks[1], masks[0]]))
    kept = memory.kept["question"]
    torch.testing.assert_close(kept["returns"][:, 0], torch.tensor([0.4, 0.3, 0.25]))
    assert kept["keep_masks"].equal(masks[[1, 3, 0]])

    memory.add("another", torch.tensor([[0.5, 0.6]]), torch.ones(1, 2, 5).bool())
    other = Memory(3)
    other.load(memory.state())
    assert other.kept.keys() == memory.kept.keys()
    for key, each in memory.kept.items():
        assert all(value.equal(other.kept[key][name]) for name, value in each.items())
    other.load(Memory(3).state())
    assert other.kept == {}


def test_the_weight_of_a_memory_is_its_probability_and_not_below_alpha():
    logprobs, samples = torch.tensor([0.5, 0.25, 1e-30]).log(), torch.tensor([0, 0, 2])
    weights, probability = memory_weights(logprobs, samples, num_samples=4, least=0.1)
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.0, 0.1, 0.0]))
    torch.testing.assert_close(probability, torch.tensor([0.75, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("budget", [None, 0.5])
def test_known_masks_are_what_the_policy_would_have_drawn(make_model, processor, dataset, tmp_path, budget):
    trainer = make_trainer(make_model, processor, dataset, tmp_path)
    inputs, model = trainer.encoder([dataset[i] for i in range(4)]).inputs, trainer.tprl_model
    budgets = Budgets() if budget is None else Budgets(torch.full((4,), budget))
    networks = (model.policy, model.autoencoder, inputs)
    drawn = collect_rollouts(*networks, 3, 2, 0.7, torch.Generator().manual_seed(0), budgets)
    known = rollouts_of_masks(*networks, drawn.sample_index, drawn.keep_masks, 0.7, budgets)
    for name, value in drawn.state().items():
        torch.testing.assert_close(known.state()[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_a_buffer_replays_the_best_of_each_question(make_model, processor, dataset, tmp_path):
    trainer = make_trainer(make_model, processor, dataset, tmp_path)
    trainer.collect(0)
    first = trainer.rollouts
    assert len(first.sample_index) == 32 and len(trainer.memory.kept) == 8
    asked = trainer.question_indices(0)
    trainer.collect(1)
    second, again = trainer.rollouts, trainer.question_indices(1)
    assert asked != again and sorted(asked) == sorted(again)
    assert len(second.sample_index) == 40  # one of each memory
    for place in range(32, 40):
        row = again[int(second.sample_index[place])]
        before = first.keep_masks[:, asked.index(row) * 4 : asked.index(row) * 4 + 4]
        same = (before == second.keep_masks[:, place : place + 1]).all(-1).all(0)
        assert same.any(), "a replayed trajectory is not one of those that the question had"


@pytest.mark.parametrize(("buffers", "is_told"), [(1, True), (2, False)])
def test_a_memory_that_was_never_used_is_told(buffers, is_told, make_model, processor, dataset, tmp_path, caplog):
    """Where no question comes twice, all is as in leave-one-out."""
    settings = {"max_steps": buffers, "num_iterations": 1, "num_mini_batches": 1, "save_strategy": "no"}
    trainer = make_trainer(make_model, processor, dataset, tmp_path, **settings)
    trainer.train()
    told = (
        f"asked again, so that TPRL MAPO was leave-one-out: train longer, or on fewer questions than {len(dataset)}."
    )
    assert (told in caplog.text) == is_told and bool(trainer.num_replays) != is_told


def questions_of(recipe, stage):
    """How many questions a stage of a recipe learns from."""
    data = recipe["data"].get(stage, recipe["data"]["train"])
    return sum(one["num_samples"] for one in (data if isinstance(data, list) else [data]))


def test_the_control_of_figure_3_has_the_questions_of_mapo():
    runs = runs_of(read_table("fig3"), Path("runs"), full=False)
    controls = [run for run in runs if run.label == "leave-one-out, 256 questions"]
    assert len(controls) == 3
    for run in controls:
        assert run.recipe["data"]["grpo"] == run.recipe["data"]["mapo"] and questions_of(run.recipe, "grpo") == 256


def test_figure_3_asks_questions_of_a_memory_several_times():
    for full in (False, True):
        for run in runs_of(read_table("fig3"), Path("runs"), full):
            if run.stages[-1] == "mapo":
                settings = run.recipe["mapo"]
                passes_of_a_question = settings["num_generations"] * settings["num_steps"] + 1
                asked = settings["max_llm_passes"] / passes_of_a_question
                assert asked > 3.5 * questions_of(run.recipe, "mapo")


def test_weights_of_a_question_sum_to_one_and_what_is_remembered_counts_once(make_model, processor, dataset, tmp_path):
    trainer = make_trainer(make_model, processor, dataset, tmp_path)
    per_question = torch.tensor([0.1, 0.75, 0.0])
    outside = torch.tensor([True, True, True, False] + [False] * 4 + [True] * 4)
    weights = trainer.weights_of_new(per_question, outside).view(3, 4)
    torch.testing.assert_close(weights[0], torch.tensor([0.3, 0.3, 0.3, 0.0]))
    torch.testing.assert_close(weights.sum(1), torch.tensor([0.9, 0.0, 1.0]))

    trainer.collect(0)
    assert trainer.is_remembered(trainer.rollouts, trainer.rollouts.take(torch.tensor([5]))).nonzero().tolist() == [
        [5]
    ]


def test_a_memory_is_drawn_from_in_proportion_to_its_probabilities(make_model, processor, dataset, tmp_path):
    trainer = make_trainer(make_model, processor, dataset, tmp_path)
    trainer.collect(0)
    remembered = trainer.rollouts.take(torch.tensor([0, 1, 4]))  # two of question 0, one of question 1
    logprobs = torch.tensor([0.02, 0.06, 0.5]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([trainer.draw(remembered, logprobs, generator) for _ in range(2000)])
    assert (drawn[:, 1] == 2).all()
    assert abs((drawn[:, 0] == 1).float().mean().item() - 0.75) < 0.04


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_size": 0}, "memory_size must be .* got 0"),
        ({"memory_weight": 1.0}, "memory_weight must be .* got 1.0"),
        ({"scale_rewards": "group"}, "scale_rewards='group'"),
        ({"shared_budget": 0.5}, "shared_budget=0.5"),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        TPRLMAPOConfig("unused", **{**SETTINGS, **settings})
