"""Each stage on rows that have pictures and prompts only; and labels as benchmarks have them, by name."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_from_disk

from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.cli.main import main
from tprl_hf.cli.train import load_data
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
from tprl_hf.training.rewards import load_reward, reward_name
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
    trainer.train()
    logs = trainer.state.log_history
    assert all(entry["grad_norm"] > 0 for entry in logs if "grad_norm" in entry) and "grad_norm" in logs[1]
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


@pytest.fixture
def own_data(unlabelled, tmp_path):
    """A folder with pictures and a .jsonl file of prompts."""
    lines = []
    for number, row in enumerate(undecoded(unlabelled)):
        name = f"{number // 2}.png"
        (tmp_path / name).write_bytes(row["images"][0]["bytes"])
        lines.append(json.dumps({"image": name, "prompt": row["prompt"]}))
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    return tmp_path / "own.jsonl"


def test_a_recipe_on_pictures_and_prompts_alone(base, own_data, tmp_path, capsys):
    pytest.importorskip("trl")
    short = {"max_answer_length": 4}
    stage = {"max_steps": 2, "disable_tqdm": True, "use_cpu": True, **short}
    sections = {
        "base_model": base,
        "output_dir": str(tmp_path / "run"),
        "policy": {"latent_dim": 16, "policy_num_heads": 4, "policy_dim": 16},
        "data": {"train": {"source": str(own_data)}, "validation": {"source": str(own_data)}},
        "demonstrations": {
            "teacher": "gradient", "keep_ratios": ["1/4"], "num_samples": 6, "score": "agreement", **short,
        },
        "lfd": stage,
        "counterfactual": {**stage, **ROLLOUTS, "num_flips": 2, "score": "kl", "keep_ratio": "1/4"},
        "tune": {"keep_ratios": [1, 0.5], "max_steps": 1, "use_cpu": True, "max_length": None},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    assert main(["train", "all", "--config", str(tmp_path / "recipe.yaml")]) == 0
    reports = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("run/*/training.json")}
    assert reports["counterfactual"]["metrics"].keys() >= {"agreement@0.111", "agreement_logprob", "kl"}
    made = load_from_disk(str(tmp_path / "run" / "demonstrations" / "dataset"))
    assert "answer" not in made.column_names and len(made["unpruned_answer"]) == 6

    # every question was answered once, for all stages that ask for answers of that length
    answered = [path.read_text().splitlines() for path in (tmp_path / "run" / "unpruned_answers").glob("*.jsonl")]
    lengths = [json.loads(head)["max_answer_length"] for head, *_ in answered]
    keys = [(length, line[:64]) for length, (_, *lines) in zip(lengths, answered, strict=True) for line in lines]
    assert len(keys) == len(set(keys)) and {length: lengths.count(length) for length in lengths} == {4: 2, 128: 1}
    assert [length for length, _ in keys].count(4) == [length for length, _ in keys].count(128) == 8
    assert not (tmp_path / "run" / "lfd" / "unpruned_answers").exists()


def test_the_recipe_for_own_data_needs_no_answers(base, own_data, tmp_path):
    small = {
        "base_model": base, "output_dir": tmp_path / "run",
        "data.train.source": own_data, "data.validation.source": own_data,
        "policy.latent_dim": 16, "policy.policy_num_heads": 4, "policy.policy_dim": 16,
        "lfd.num_train_epochs": 1,
    }  # fmt: skip
    for stage in ("autoencoder", "lfd", "grpo"):
        small |= {f"{stage}.max_steps": 1, f"{stage}.use_cpu": True}
    for stage in ("demonstrations", "lfd", "grpo"):
        small[f"{stage}.max_answer_length"] = 4
    words = [f"{name}={json.dumps(str(value) if isinstance(value, Path) else value)}" for name, value in small.items()]
    assert main(["train", "all", "--config", "own_data", "--set", *words]) == 0
    metrics = json.loads((tmp_path / "run" / "grpo" / "training.json").read_text())["metrics"]
    assert metrics.keys() >= {"agreement@0.333", "agreement@0.111"} and "accuracy" not in metrics


def test_a_recipe_can_leave_labels_out_and_mix_one_answer_with_several(dataset, tmp_path):
    dataset.save_to_disk(str(tmp_path / "one"))
    several = dataset.remove_columns("answer").add_column("answer", [["word7", "word7", "word8"]] * len(dataset))
    several.save_to_disk(str(tmp_path / "several"))
    sources = [{"source": str(tmp_path / name)} for name in ("one", "several")]
    mixture = load_data({"data": {"train": sources}}, "train")
    assert (
        sorted(map(tuple, mixture["answer"]))[-8:]
        == sorted([*((answer,) for answer in dataset["answer"]), *(("word7", "word7", "word8"),) * 8])[-8:]
    )
    bare = load_data({"data": {"train": [{**source, "labels": False} for source in sources]}}, "train")
    assert not {"answer", "boxes", "objects"} & set(bare.column_names) and len(bare) == 16


def test_without_the_question_two_questions_about_a_picture_get_one_mask(make_model, processor, unlabelled, tmp_path):
    config = CounterfactualConfig(
        str(tmp_path),
        max_steps=3,
        score="agreement",
        num_flips=4,
        num_iterations=1,
        keep_ratio=0.5,
        **QUIET,
        **ROLLOUTS,
    )
    masks, scores = {}, {}
    for query_agnostic in (True, False):
        model = make_model(query_agnostic=query_agnostic)
        CounterfactualTrainer(model, config, processing_class=processor, train_dataset=unlabelled).train()
        model.save_pretrained(tmp_path / "model", save_base_model=True)
        model = TPRLForConditionalGeneration.from_pretrained(tmp_path / "model")
        questions = ["word5", "word6 word7 word8 word9", "word10 word11"]
        batch = SampleEncoder(model, processor)([{**undecoded(unlabelled)[0], "prompt": text} for text in questions])
        masks[query_agnostic] = model.prune(**batch.prompts(range(3)), keep_ratio=0.5).keep_mask.view(3, 16)
        plan = model.prune(**batch.prompts([1]), keep_ratio=0.5)
        assert torch.equal(plan.keep_mask, masks[query_agnostic][1])
        scores[query_agnostic] = model.prune(**batch.prompts(range(3)), keep_ratio=0.5).scores.view(3, 16)
    assert (masks[True] == masks[True][0]).all() and masks[True].sum() == 24
    # rows of a batch may differ in the last bit, on some processors
    torch.testing.assert_close(scores[True][1], scores[True][2], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(scores[False][1], scores[False][2], atol=1e-5)


# ---- labels as benchmarks have them ----

CASES = {  # answer, label, score
    "exact_match": [("Red.", "red", 1), ("reddish", ["red", "blue"], 0), ("", "red", 0)],
    "vqa_score": [
        ("Two", ["2"] * 3 + ["3"] * 7, 0.9),
        ("the dog", ["dog"] * 10, 1),
        ("", ["dog"] * 10, 0),
        ("cat", ["cat"] + ["dog"] * 9, 0.3),
    ],
    "relaxed_accuracy": [("104", "100", 1), ("106", "100", 0), ("5%", "0.05", 1), ("", "3", 0), ("Blue", ["blue"], 1)],
    "anls": [("smitt", ["Smith"], 0.8), ("jones", ["Smith"], 0), ("", ["Smith"], 0)],
    "multiple_choice": [
        *((answer, "B", 1) for answer in ("B", "b", "(B)", "B.", "B. a cat", "B) a cat", "The answer is B.")),
        *((answer, "B", 0) for answer in ("A", "", "A. B", "Bats fly", "a cat", "not sure")),
        ("A cat", "A", 0),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_rewards_of_benchmarks_by_name(name):
    function = load_reward(name)
    assert reward_name(function) == name
    answers, labels, expected = zip(*CASES[name], strict=True)
    assert function(prompts=[None] * len(answers), completions=answers, answer=labels, extra=1) == pytest.approx(
        expected
    )
    messages = [[{"role": "assistant", "content": text}] for text in answers]
    assert function(prompts=[None] * len(answers), completions=messages, answer=labels) == pytest.approx(expected)
    assert function(prompts=[None], completions=["x"], answer=[None]) == [None]


def test_a_choice_without_a_letter_is_refused():
    """Each answer would count as wrong, and nothing would say so."""
    with pytest.raises(ValueError, match=r"The reference \['cat'\] is not the letter of an option"):
        load_reward("multiple_choice")(prompts=[None], completions=["B"], answer=["cat"])


def test_a_recipe_names_rewards_for_lists_of_answers(base, dataset, tmp_path, capsys):
    several = dataset.remove_columns("answer").add_column("answer", [["word7", "word7", "word8"]] * len(dataset))
    several.save_to_disk(str(tmp_path / "several"))
    sections = {
        "base_model": base,
        "output_dir": str(tmp_path / "run"),
        "policy": {"latent_dim": 16, "policy_num_heads": 4, "policy_dim": 16},
        "data": {name: {"source": str(tmp_path / "several")} for name in ("train", "validation")},
        "counterfactual": {
            "max_steps": 2, "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, **ROLLOUTS, "num_flips": 2,
            "reward_funcs": ["vqa_score", "anls"], "reward_weights": [1, 0.5],
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    assert main(["train", "all", "--config", str(tmp_path / "recipe.yaml")]) == 0
    report = json.loads((tmp_path / "run" / "counterfactual" / "training.json").read_text())
    logged = [entry for entry in report["log_history"] if "rewards/vqa_score/mean" in entry]
    assert logged and all("rewards/anls/mean" in entry for entry in logged)
    assert main(
        ["train", "all", "--config", str(tmp_path / "recipe.yaml"), "--set", "counterfactual.reward_funcs=[vqa]"]
    )
    assert "or one of ours: exact_match, vqa_score, relaxed_accuracy, anls, multiple_choice" in capsys.readouterr().err
