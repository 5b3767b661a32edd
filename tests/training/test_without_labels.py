"""Each stage on rows that have pictures and prompts only; and labels as benchmarks have them, by name."""

import pytest
import torch

from tprl_hf.training import (
    CounterfactualConfig,
    CounterfactualTrainer,
    GradientTeacher,
    LeaveOutTeacher,
    LfDConfig,
    LfDTrainer,
    TPRLGRPOConfig,
    TPRLGRPOTrainer,
    TPRLMAPOConfig,
    TPRLMAPOTrainer,
    TPRLPPOConfig,
    TPRLPPOTrainer,
    calibrate_threshold,
    generate_demonstrations,
)
from tprl_hf.training.answer_batches import SampleEncoder, undecoded
from tprl_hf.training.answer_scores import gradient_saliency
from tprl_hf.training.unpruned_answers import UnprunedAnswers

QUIET = {"disable_tqdm": True, "use_cpu": True, "per_device_eval_batch_size": 4, "max_answer_length": 4}
ROLLOUTS = {"per_device_train_batch_size": 2, "num_mini_batches": 1, "min_logprob": -100.0, "learning_rate": 1e-2}
ALGORITHMS = {
    "ppo": (TPRLPPOTrainer, TPRLPPOConfig, {"num_ppo_epochs": 1}),
    "grpo": (TPRLGRPOTrainer, TPRLGRPOConfig, {"num_generations": 2, "num_iterations": 1}),
    "mapo": (TPRLMAPOTrainer, TPRLMAPOConfig, {"num_generations": 2, "num_iterations": 1}),
    "counterfactual": (
        CounterfactualTrainer,
        CounterfactualConfig,
        {"num_iterations": 1, "num_flips": 4, "rollout_keep_ratios": [0.5, 0.25]},
    ),
}


@pytest.fixture(scope="module")
def unlabelled(dataset):
    return dataset.remove_columns(["answer", "question_type", "boxes", "objects"])


def trainer_of(name, make_model, processor, train, output_dir, **settings):
    trainer_class, config_class, own = ALGORITHMS[name]
    config = config_class(str(output_dir), **{**QUIET, **ROLLOUTS, **own, "score": "agreement", **settings})
    return trainer_class(make_model(), config, processing_class=processor, train_dataset=train, eval_dataset=train)


@pytest.mark.parametrize(("name", "score"), [(name, "agreement") for name in ALGORITHMS] + [("counterfactual", "kl")])
def test_each_algorithm_learns_from_rows_without_answers(name, score, make_model, processor, unlabelled, tmp_path):
    settings = {"score": score, "max_steps": 4, "save_steps": 3, "logging_steps": 1}
    trainer = trainer_of(name, make_model, processor, unlabelled, tmp_path / "run", **settings)
    before = {key: value.clone() for key, value in trainer.model.policy.state_dict().items()}
    trainer.train()
    assert any(not value.equal(before[key]) for key, value in trainer.model.policy.state_dict().items())
    logs = trainer.state.log_history
    measured = [entry for entry in logs if "eval_agreement" in entry]
    assert len(measured) == 2 and all(entry["eval_kl"] > 0 for entry in measured)
    assert not any(name in entry for entry in logs for name in ("eval_accuracy", "eval_logprob", "objective/accuracy"))
    scored = [entry["objective/score"] for entry in logs if "objective/score" in entry]
    assert (
        scored and all(-20 < value < 0 for value in scored) and any("objective/agreement" in entry for entry in logs)
    )
    best = "eval_kl" if score == "kl" else "eval_agreement_logprob"
    choose = min if score == "kl" else max
    assert trainer.state.best_metric == choose(entry[best] for entry in measured)
    assert trainer.unpruned_answers.num_generated == len(unlabelled)

    # a run that was cut off finds the answers, and does what the whole run did
    other = trainer_of(name, make_model, processor, unlabelled, tmp_path / "run", **settings)
    other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert other.unpruned_answers.num_generated == 0
    for key, value in trainer.model.policy.state_dict().items():
        torch.testing.assert_close(other.model.policy.state_dict()[key], value)


def test_demonstrations_need_no_labels_and_hand_on_the_answers(make_model, processor, unlabelled, tmp_path):
    model, directory = make_model(), tmp_path / "unpruned_answers"
    teach = {"score": "agreement", "max_answer_length": 4, "batch_size": 3}
    made = generate_demonstrations(
        GradientTeacher(), model, processor, unlabelled, unpruned_answers_dir=str(directory), **teach
    )
    assert made.column_names == [*unlabelled.column_names, "keep_masks", "unpruned_answer"]
    unpruned_answers = UnprunedAnswers(model, processor, max_answer_length=4)
    batch = unpruned_answers(SampleEncoder(model, processor)([undecoded(unlabelled)[i] for i in range(8)]))
    assert [row["text"] for row in made["unpruned_answer"]] == [sample.unpruned.text for sample in batch.samples]
    saliency = gradient_saliency(model, batch, batch.inputs.valid)
    for masks, of_sample in zip(made["keep_masks"], saliency, strict=True):
        assert set(of_sample.topk(8).indices.tolist()) == {i for i, kept in enumerate(masks[-1]) if kept}

    # the trainer takes the answers of the rows, and measures without labels
    config = LfDConfig(str(tmp_path / "lfd"), max_steps=2, per_device_train_batch_size=2, **QUIET)
    trainer = LfDTrainer(model, config, processing_class=processor, train_dataset=made, eval_dataset=made)
    trainer.train()
    assert trainer.evaluate().keys() >= {"eval_agreement@0.333", "eval_agreement_logprob", "eval_kl"}
    assert trainer.unpruned_answers.num_generated == 0
    assert 0 < calibrate_threshold(model, processor, unlabelled, keep_ratio=0.5) < 1


def test_a_teacher_whose_run_was_cut_off_resumes_without_labels(make_model, processor, unlabelled, tmp_path):
    arguments = (make_model(), processor, unlabelled, [0.5], str(tmp_path / "made"))
    teach = {"score": "agreement", "max_answer_length": 4, "batch_size": 3}

    class CutOff(LeaveOutTeacher):
        calls = 0

        def score(self, model, batch, keep_mask):
            self.calls, type(self).calls = 0, type(self).calls + 1
            if type(self).calls == 3:
                raise KeyboardInterrupt
            return super().score(model, batch, keep_mask)

    with pytest.raises(KeyboardInterrupt):
        generate_demonstrations(CutOff(), *arguments, **teach)
    made = generate_demonstrations(CutOff(), *arguments, **teach)
    assert CutOff.calls == 4 and len(list((tmp_path / "made.unpruned_answers").glob("*.jsonl"))) == 1
    whole = generate_demonstrations(LeaveOutTeacher(), make_model(), processor, unlabelled, [0.5], **teach)
    assert made["keep_masks"] == whole["keep_masks"] and made["unpruned_answer"] == whole["unpruned_answer"]


def test_what_needs_labels_says_so_before_it_starts(make_model, processor, unlabelled, dataset, tmp_path):
    with pytest.raises(ValueError, match=r"dataset has no column 'answer'.*score='agreement'"):
        generate_demonstrations(GradientTeacher(), make_model(), processor, unlabelled)
    with pytest.raises(ValueError, match="score must be 'logprob' or 'agreement'; got 'kl'"):
        generate_demonstrations(GradientTeacher(), make_model(), processor, unlabelled, score="kl")
    with pytest.raises(ValueError, match=r"train_dataset has no column 'answer'.*score='agreement'"):
        trainer_of("ppo", make_model, processor, unlabelled, tmp_path, score="logprob")
    some = dataset.map(lambda row, number: {"answer": row["answer"] if number else None}, with_indices=True)
    with pytest.raises(ValueError, match="1 of 8 rows of train_dataset have no `answer`"):
        trainer_of("ppo", make_model, processor, some, tmp_path, score="correct")
