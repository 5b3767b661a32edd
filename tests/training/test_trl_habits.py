"""What users of TRL write, on our trainers: it works as in TRL, or one line says what to write instead."""

import asyncio
import dataclasses
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import AutoModelForImageTextToText, HfArgumentParser, TrainerCallback, TrainingArguments

from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.evaluation.answers import chat_inputs
from tprl_hf.modeling.text_query import chat_messages
from tprl_hf.report.runs import MASKS, json_lines
from tprl_hf.training import (
    AutoencoderConfig,
    AutoencoderTrainer,
    CounterfactualConfig,
    CounterfactualTrainer,
    GradientTeacher,
    LfDConfig,
    LfDTrainer,
    TPRLGRPOConfig,
    TPRLGRPOTrainer,
    TPRLPPOConfig,
    TPRLPPOTrainer,
    calibrate_threshold,
    generate_demonstrations,
)
from tprl_hf.training.answer_batches import SampleEncoder
from tprl_hf.training.answer_rewards import ANSWER_REWARDS
from tprl_hf.training.tuning import as_chats

TRAINERS = {
    "autoencoder": (AutoencoderTrainer, AutoencoderConfig),
    "lfd": (LfDTrainer, LfDConfig),
    "ppo": (TPRLPPOTrainer, TPRLPPOConfig),
    "grpo": (TPRLGRPOTrainer, TPRLGRPOConfig),
    "counterfactual": (CounterfactualTrainer, CounterfactualConfig),
}
QUIET = {"disable_tqdm": True, "use_cpu": True, "max_steps": 1, "save_strategy": "no"}
PPO = {**QUIET, "per_device_train_batch_size": 2, "num_mini_batches": 2, "num_ppo_epochs": 1, "num_steps": 2}
PPO |= {"eval_keep_ratios": [0.5], "per_device_eval_batch_size": 8, "logging_steps": 1, "max_completion_length": 2}
BUDGETED = {**QUIET, "per_device_train_batch_size": 2, "num_generations": 2, "num_mini_batches": 2}
SETTINGS = {"ppo": PPO, "grpo": BUDGETED, "counterfactual": {**BUDGETED, "efficiency_coef": 0.5, "num_flips": 3}}


@pytest.fixture
def ppo(make_model, processor, dataset, tmp_path):
    """A trainer of PPO with what a test wants to be different."""

    def make(settings=None, **arguments):
        config = TPRLPPOConfig(str(tmp_path), **{**PPO, **(settings or {})})
        usual = {"model": make_model(), "args": config, "train_dataset": dataset, "processing_class": processor}
        return TPRLPPOTrainer(**{**usual, **arguments})

    return make


def with_one_answer(dataset):
    answers = [*dataset["answer"][:1], *[None] * (len(dataset) - 1)]
    return dataset.remove_columns("answer").add_column("answer", answers)


def without_answers(dataset):
    return dataset.remove_columns(["answer"])


def rows(dataset, **columns):
    """The rows of a dataset with other columns, each a function of the row."""
    return Dataset.from_list([{name: column(row) for name, column in columns.items()} for row in dataset])


def said(content):
    return [{"role": "user", "content": content}]


IMAGES, PROMPT, ANSWER = ({name: lambda row, name=name: row[name]} for name in ("images", "prompt", "answer"))
ANSWERED = {**IMAGES, **ANSWER}


def text(row):
    return {"type": "text", "text": row["prompt"]}


def ones(completions, **columns):
    return [1.0] * len(completions)


def nothing(completions, **columns):
    return [None] * len(completions)


def nothing_at_all(completions, **columns):
    return None


def of_two_dimensions(completions, **columns):
    return np.ones((len(completions), 1))


async def asynchronous(completions, **columns):
    await asyncio.sleep(0)
    return [1.0] * len(completions)


# ---- how a trainer is made ----


@pytest.mark.parametrize("name", TRAINERS)
def test_a_model_by_its_path_and_nothing_else(name, base, make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer_class, config = TRAINERS[name]
    make_model().save_pretrained(tmp_path / "mine")  # without a processor: that of its base model is taken
    for path in (base, str(tmp_path / "mine"), tmp_path / "mine"):
        trainer = trainer_class(path)
        assert type(trainer.args) is config and type(trainer.tprl_model) is TPRLForConditionalGeneration
        assert trainer.args.output_dir.endswith(f"-{name}") and trainer.processing_class.chat_template
    assert trainer.args.output_dir == f"mine-{name}"


def test_a_processor_that_is_nowhere(make_model, tmp_path):
    model = make_model()
    model.config.base_model_name_or_path = None
    with pytest.raises(ValueError, match="no processor at the model, which has no name: pass processing_class"):
        TPRLPPOTrainer(model, TPRLPPOConfig(str(tmp_path), **PPO))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # the order of GRPOTrainer and RLOOTrainer, and our own earlier one
        (lambda m, p, d, a: TPRLPPOTrainer(m, ones, a, d, d, p), TypeError, "takes from 2 to 3 positional arguments"),
        (lambda m, p, d, a: TPRLPPOTrainer(m, a, p, d, d), TypeError, "takes from 2 to 3 positional arguments"),
        (lambda m, p, d, a: TPRLPPOTrainer(m, ones), TypeError, "got function. Reward functions are `reward_funcs=`"),
        (
            lambda m, p, d, a: TPRLPPOTrainer(m, TrainingArguments("x", use_cpu=True)),
            TypeError,
            "is a TPRLPPOConfig; got",
        ),
        (lambda m, p, d, a: TPRLGRPOTrainer(m, a), TypeError, "is a TPRLGRPOConfig; got TPRLPPOConfig"),
        (lambda m, p, d, a: TPRLPPOTrainer(m.lvlm, a), TypeError, "TPRLForConditionalGeneration.from_base_model"),
        (
            lambda m, p, d, a: TPRLPPOTrainer(m, a, peft_config=1),
            TypeError,
            "peft_config`: the policy is trained whole",
        ),
        (lambda m, p, d, a: TPRLPPOTrainer(m, a, quantization_config=1), TypeError, "load the model with it"),
        (lambda m, p, d, a: TPRLPPOTrainer(m, a, compute_metrics=len), TypeError, "measures accuracy"),
        (lambda m, p, d, a: TPRLPPOTrainer(m, a, data_collator=len), TypeError, "encoded where they are used"),
        (lambda m, p, d, a: TPRLPPOTrainer(m, a, tools=[len]), TypeError, "a series of keep masks"),
        (lambda m, p, d, a: TPRLPPOTrainer(m, a, reward_fn=ones), TypeError, "has no argument 'reward_fn'"),
        (lambda m, p, d, a: LfDTrainer(m, reward_funcs=ones), TypeError, "has no argument 'reward_funcs'"),
        # data
        (
            lambda m, p, d, a: TPRLPPOTrainer(m, a, train_dataset=d.to_iterable_dataset()),
            TypeError,
            "a stream must end",
        ),
        (lambda m, p, d, a: LfDTrainer(m, train_dataset=d.to_iterable_dataset()), TypeError, "a stream must end"),
        (
            lambda m, p, d, a: AutoencoderTrainer(m, eval_dataset=d.to_iterable_dataset()),
            TypeError,
            "a stream must end",
        ),
        (lambda m, p, d, a: TPRLPPOTrainer(m, a, train_dataset=list(d)), TypeError, "Dataset.from_list"),
        (
            lambda m, p, d, a: TPRLPPOTrainer(m, a, train_dataset=DatasetDict(train=d)),
            TypeError,
            "pass one of 'train'",
        ),
        (lambda m, p, d, a: TPRLPPOTrainer(m, a, train_dataset=d.select([])), ValueError, "train_dataset has no rows"),
        (
            lambda m, p, d, a: TPRLPPOTrainer(m, a, train_dataset=d.rename_column("prompt", "question")),
            ValueError,
            "no column 'prompt', only images, question",
        ),
        (
            lambda m, p, d, a: TPRLPPOTrainer(m, a, train_dataset=without_answers(d)),
            ValueError,
            "no column 'answer', .*: score by it, or pass reward_funcs",
        ),
        (
            lambda m, p, d, a: TPRLPPOTrainer(m, a, eval_dataset=with_one_answer(d)).evaluate(),
            ValueError,
            "7 of 8 rows of eval_dataset have no `answer`: fill them in, or remove the column",
        ),
        (
            lambda m, p, d, a: generate_demonstrations(GradientTeacher(), m, p, d.to_iterable_dataset()),
            TypeError,
            "dataset is a datasets.Dataset; got IterableDataset",
        ),
        (lambda m, p, d, a: calibrate_threshold(m, p, list(d), 0.5), TypeError, "got list: make one with Dataset"),
        (lambda m, p, d, a: TPRLPPOTrainer(m, a).train(), ValueError, "has no train_dataset"),
        (lambda m, p, d, a: LfDTrainer(m, LfDConfig(a.output_dir, **QUIET)).train(), ValueError, "a train_dataset"),
        (lambda m, p, d, a: TPRLPPOTrainer(m, a).evaluate(), ValueError, "pass eval_dataset"),
        (lambda m, p, d, a: TPRLPPOTrainer(m, a, eval_dataset={}), ValueError, "eval_dataset has no sets: pass"),
        (lambda m, p, d, a: AutoencoderTrainer(m).evaluate({}), ValueError, "eval_dataset has no sets: pass"),
        (
            lambda m, p, d, a: AutoencoderTrainer(m).predict(d),
            ValueError,
            r"AutoencoderTrainer has nothing to predict: call trainer.evaluate\(dataset\)",
        ),
        # rewards
        (
            lambda m, p, d, a: TPRLPPOTrainer(
                m, a, train_dataset=d, reward_funcs=lambda completions, **k: [1.0]
            ).train(),
            ValueError,
            "returned 1 values for 6 completions",
        ),
        (
            lambda m, p, d, a: TPRLPPOTrainer(
                m, a, train_dataset=d, reward_funcs=lambda completions, **k: ["x"] * len(completions)
            ).train(),
            ValueError,
            "returned 'x': a number, or None",
        ),
        (
            lambda m, p, d, a: TPRLPPOTrainer(
                m, a, train_dataset=d, reward_funcs=lambda completions, **k: [float("nan")] * len(completions)
            ).train(),
            ValueError,
            "returned nan: return None where there is no reward",
        ),
        (
            lambda m, p, d, a: TPRLPPOTrainer(m, a, train_dataset=d, reward_funcs=nothing_at_all).train(),
            ValueError,
            "The reward function nothing_at_all returned NoneType: return a list of 6 numbers",
        ),
        (
            lambda m, p, d, a: TPRLPPOTrainer(m, a, train_dataset=d, reward_funcs=of_two_dimensions).train(),
            ValueError,
            r"of_two_dimensions returned array\(\[1\.\]\): a number, or None",
        ),
        (
            lambda m, p, d, a: TPRLPPOTrainer(
                m, a, train_dataset=d.add_column("completions", [1] * 8), reward_funcs=ones
            ).train(),
            ValueError,
            "given 'completions' by the trainer, and a column of the dataset has that name",
        ),
        (
            lambda m, p, d, a: TPRLPPOTrainer(m, a, train_dataset=d, reward_funcs="vqa"),
            ValueError,
            "'vqa' does not name a reward function: .* ours: .*vqa_score",
        ),
        (lambda m, p, d, a: TPRLPPOTrainer(m, a, train_dataset=d, reward_funcs=[3]), TypeError, "of them; got int"),
    ],
)
def test_what_is_refused_says_what_to_write(
    call, error, message, make_model, processor, dataset, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as refused:
        call(make_model(), processor, dataset, TPRLPPOConfig(str(tmp_path), **PPO))
    assert len(str(refused.value).splitlines()) <= 3 and len(str(refused.value)) < 360


def test_adapters_that_no_checkpoint_would_hold_are_refused_before_training(make_model, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model.lvlm)
    with pytest.raises(ValueError, match=r"weights of adapters .*, which from_pretrained would not bring back"):
        TPRLPPOTrainer(model, TPRLPPOConfig(str(tmp_path), **PPO))


def test_a_peft_model_is_refused(make_model, tmp_path):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"got PeftModel: of a PEFT model take model.merge_and_unload\(\)"):
        TPRLPPOTrainer(tuned, TPRLPPOConfig(str(tmp_path), **PPO))


def test_arguments_of_trl_that_are_none_ask_for_nothing(ppo):
    assert ppo(peft_config=None, quantization_config=None, compute_metrics=None).args.max_steps == 1


# ---- what it is trained on ----


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        (lambda d: d, {"reward_funcs": ones}),
        (without_answers, {"reward_funcs": ones}),
        (lambda d: d, {"reward_funcs": asynchronous}),
        (lambda d: d, {"reward_funcs": [asynchronous, ones]}),
        (lambda d: d, {"reward_funcs": nothing}),
        (lambda d: rows(d, **ANSWERED, prompt=lambda row: said([{"type": "image"}, text(row)])), {}),
        (lambda d: rows(d, **ANSWERED, prompt=lambda row: said(row["prompt"])), {}),
        (lambda d: rows(d, **PROMPT, **ANSWER, image=lambda row: row["images"][0]), {}),
        (lambda d: rows(d, **PROMPT, **IMAGES, answer=lambda row: [row["answer"]]), {}),
        (lambda d: d, {"settings": {"bf16": True}}),
        (lambda d: d, {"settings": {"reward_weights": [0.5]}, "reward_funcs": ones}),
    ],
    ids=["rewards", "no answers", "async", "async and not", "None", "chat parts", "chat strings", "image", "answers",
         "bf16", "reward_weights"],
)  # fmt: skip
def test_rows_and_settings_that_train(change, arguments, ppo, dataset):
    trainer = ppo(train_dataset=change(dataset), **arguments)
    trainer.train()
    assert trainer.state.global_step == 1 and np.isfinite(trainer.state.log_history[0]["loss"])


NAMES = [name for name in ("gradient_checkpointing", "activation_checkpointing") if hasattr(TrainingArguments, name)]


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_under_either_of_its_names(name, ppo, dataset, caplog):
    """transformers 5.24 renames the setting; our networks have neither method, so it must not reach the trainer."""
    trainer = ppo(train_dataset=dataset, settings={name: True})
    assert f"{name}=True has no effect" in caplog.text
    trainer.train()
    assert trainer.state.global_step == 1
    with pytest.raises(ValueError, match=f"{name} must be True or False"):
        ppo(train_dataset=dataset, settings={name: "yes"})


@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_settings_alone_are_not_warned_about(name, tmp_path):
    """Fields that ours replace are not those that transformers calls old."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TRAINERS[name][1](str(tmp_path), **SETTINGS.get(name, QUIET))


def test_rows_of_other_forms_are_the_same_samples(make_model, processor, dataset):
    encoder = SampleEncoder(make_model(), processor)
    row = dataset[0]
    several = {**row, "answer": ["word59", row["answer"], row["answer"]]}  # the one given most often
    single = {name: value for name, value in row.items() if name != "images"} | {"image": row["images"][0]}
    chat = {**row, "prompt": said(row["prompt"])}
    plain = encoder.encode(row)
    for other in (several, single, chat):
        found = encoder.encode(other)
        for name in ("prompt_ids", "answer_ids", "query_mask"):
            assert torch.equal(getattr(found, name), getattr(plain, name))
    assert (
        chat_messages("q", 1)
        == chat_messages(said("q"), 1)
        == said([{"type": "image"}, {"type": "text", "text": "q"}])
    )
    history = [{"role": "system", "content": "s"}, *said("a"), {"role": "assistant", "content": "b"}, *said("c")]
    kinds = [[part["type"] for part in message["content"]] for message in chat_messages(history, 2)]
    assert kinds == [["text"], ["image", "image", "text"], ["text"], ["text"]]


def of_files(dataset, folder):
    """The path of each row's picture, in a file of its own."""
    for number, row in enumerate(dataset):
        row["images"][0].save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(len(dataset))]


FORMS = {
    "paths": lambda d, paths: {"images": [[path] for path in paths]},
    "a path": lambda d, paths: {"image": paths},
    "one path in images": lambda d, paths: {"images": paths},
    "bytes": lambda d, paths: {"image": [Path(path).read_bytes() for path in paths]},
    "a list in image": lambda d, paths: {"image": d["images"]},
    # as `concatenate_datasets` joins rows with one column and rows with the other
    "both": lambda d, paths: {
        "images": [*d["images"][:4], *[None] * 4],
        "image": [*[None] * 4, *[images[0] for images in d["images"][4:]]],
    },
    "both, empty": lambda d, paths: {
        "images": [*d["images"][:4], *[[]] * 4],
        "image": [*[None] * 4, *[images[0] for images in d["images"][4:]]],
    },
}


@pytest.mark.parametrize("form", [*FORMS, "numpy", "pandas", "arrow", "torch"])
def test_pictures_in_any_form_are_the_same_pictures(form, ppo, dataset, tmp_path):
    plain = ppo().encoder([dataset[number] for number in range(8)]).inputs.tokens
    if form in FORMS:
        texts = {name: dataset[name] for name in ("prompt", "answer")}
        other = Dataset.from_dict({**FORMS[form](dataset[:], of_files(dataset, tmp_path)), **texts})
    else:
        other = dataset.with_format(form)
    trainer = ppo(train_dataset=other)
    given = [trainer.train_dataset[number] for number in range(8)]
    assert torch.equal(trainer.encoder(given).inputs.tokens, plain)
    inputs = chat_inputs(trainer.processing_class, given)  # evaluation reads the same
    assert torch.equal(inputs["pixel_values"], chat_inputs(trainer.processing_class, list(dataset))["pixel_values"])
    chats = as_chats(other).with_format(None)
    assert [one.tobytes() for (one,) in chats["images"]] == [one.tobytes() for (one,) in dataset["images"]]


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ([{"from": "human", "value": "word7"}, {"from": "gpt", "value": "word8"}], r"prompt\[0\] .*'from': 'human'"),
        ([*said("word7"), {"role": "assistant", "content": None}], r"prompt\[1\] .*'content': None"),
        (said(["word7"]), r"prompt\[0\] .*\['word7'\]"),
        (said([{"type": "text", "value": "word7"}]), r"prompt\[0\] .*'value': 'word7'"),
        (["word7"], r"prompt\[0\] .* got 'word7'"),
        ({"role": "user", "content": "word7"}, "prompt must be a question, or a list"),
    ],
)
def test_what_is_no_chat_message_is_shown(prompt, found, ppo, dataset):
    row = {**dataset[0], "prompt": prompt}
    for read in (lambda: ppo().encoder([row]), lambda: chat_inputs(ppo().processing_class, [row])):
        with pytest.raises(ValueError, match=found) as refused:
            read()
        assert len(str(refused.value)) < 360


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"image": "nowhere.png"}, FileNotFoundError, "no image file nowhere.png: pass the path of one"),
        ({"images": [3]}, ValueError, "A picture of a row must be a PIL image, the path .* got int 3"),
        ({"images": ["a.png"], "image": "b.png"}, ValueError, "`images` and another `image`, two names for one thing"),
    ],
)
def test_pictures_that_are_not_to_be_had(columns, error, message, ppo, dataset):
    row = {name: value for name, value in dataset[0].items() if name != "images"} | columns
    with pytest.raises(error, match=message):
        ppo().encoder([row])
    with pytest.raises(error, match=message):
        chat_inputs(ppo().processing_class, [row])


@pytest.mark.parametrize("name", ["ppo", "grpo", "counterfactual"])
def test_what_no_function_scores_teaches_nothing(name, make_model, processor, dataset, tmp_path):
    """One question of each buffer is not scored; its rollouts have no gradient, and those of the others do."""
    trainer_class, config = TRAINERS[name]
    settings = (
        {**SETTINGS[name], "entropy_coef": 0.0, "vf_coef": 0.0} if name == "ppo" else {**SETTINGS[name], "beta": 0.0}
    )
    asked = []

    def of_some(prompts, completion_ids, **columns):
        asked.append(set(prompts))
        skipped = min(asked[0])
        return [None if prompt == skipped else ids[0] / 7 for prompt, ids in zip(prompts, completion_ids, strict=True)]

    def never(completions, **columns):
        return [None] * len(completions)

    trainer = trainer_class(
        make_model(), config(str(tmp_path), **settings), processing_class=processor, train_dataset=dataset,
        reward_funcs=[of_some, never],
    )  # fmt: skip
    trainer.collect(0)
    rollouts = trainer.rollouts
    skipped = [row["prompt"] for row in trainer.batch.rows].index(min(asked[0]))
    of_skipped = rollouts.sample_index == skipped
    assert trainer.final_scores[of_skipped].isnan().all() and trainer.final_scores[~of_skipped].isfinite().all()
    assert not trainer.buffer["advantages"][:, of_skipped].any()
    assert trainer.buffer["advantages"][:, ~of_skipped].any()
    losses = trainer.trajectory_losses(trainer.model, torch.arange(len(of_skipped)))
    gradients = torch.autograd.grad(
        losses[of_skipped].sum(), trainer.model.policy.policy_head.weight, allow_unused=True
    )
    assert gradients[0] is None or not gradients[0].any()
    metrics = {name: values[0] for name, values in trainer.metrics.items()}
    assert metrics["objective/is_scored"] == 0.5 and np.isfinite(metrics["objective/reward"])
    assert "rewards/of_some/mean" in metrics and "rewards/never/mean" not in metrics
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_reward_functions_are_called_as_in_trl(ppo, dataset):
    seen = {}

    def told(prompts, completions, completion_ids, trainer_state, images, answer, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, images=images)
        assert trainer_state.max_steps == 1 or trainer_state.global_step == 0
        return np.ones(len(prompts))

    chat = rows(dataset, **ANSWERED, prompt=lambda row: said(row["prompt"]))
    ppo(train_dataset=chat, reward_funcs=told).train()
    assert all(message[0]["role"] == "assistant" for message in seen["completions"])
    assert all(len(ids) <= 2 for ids in seen["ids"])
    assert {image.size for images in seen["images"] for image in images} == {(24, 24)}


@pytest.mark.parametrize("filler", [None, 0, 2])
def test_completion_ids_end_with_the_answer(filler, ppo, make_model, dataset):
    """What `generate` writes behind shorter answers of a batch is none of an answer, whatever token it is."""
    seen = []

    def lengths(completion_ids, **columns):
        seen.extend(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    model = make_model()
    ends = list(range(2, 40))  # so that answers end after a few tokens, each after its own number
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ends, filler
    trainer = ppo({"max_completion_length": 12}, model=model, reward_funcs=lengths)
    trainer.collect(0)
    assert len({len(ids) for ids in seen}) > 1
    for ids in seen:
        assert not set(ids[:-1]) & set(ends) and (ids[-1] in ends or len(ids) == 12)


def test_rewards_are_known_by_the_names_that_recipes_give_them(ppo):
    assert ppo(reward_funcs="vqa_score").reward_funcs == ppo(reward_funcs=[ANSWER_REWARDS["vqa_score"]]).reward_funcs


# ---- measuring ----


def test_several_datasets_are_measured_by_name(ppo, dataset):
    sets = DatasetDict(a=dataset.select(range(4)), b=dataset.select(range(4, 8)))
    trainer = ppo({"eval_strategy": "steps", "eval_steps": 1}, eval_dataset=sets)
    trainer.train()
    found = trainer.evaluate()
    for metric in ("accuracy", "logprob", "logprob@0.500"):
        assert found[f"eval_{metric}"] == pytest.approx((found[f"eval_a_{metric}"] + found[f"eval_b_{metric}"]) / 2)
    assert trainer.evaluate("a")["eval_a_logprob"] == pytest.approx(found["eval_a_logprob"])
    assert trainer.evaluate(sets["b"], metric_key_prefix="test")["test_logprob"] == pytest.approx(
        found["eval_b_logprob"]
    )
    assert trainer.best["score"] >= found["eval_logprob"] - 1e-6
    whole = ppo(model=trainer.tprl_model, eval_dataset=dataset).evaluate()
    assert whole["eval_logprob"] == pytest.approx(found["eval_logprob"], abs=1e-5)


def test_what_a_callback_measures_or_logs_takes_nothing_from_the_training_log(ppo, dataset):
    class InBetween(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            self.trainer.evaluate(dataset, metric_key_prefix="test")
            self.trainer.log({"mine": 1.0})

    callback = InBetween()
    alone, watched = ppo({"max_steps": 2}), ppo({"max_steps": 2}, callbacks=[callback])
    callback.trainer = watched
    names = []
    for trainer in (alone, watched):
        trainer.train()
        names.append([row.keys() for row in trainer.state.log_history if "loss" in row])
    assert names[0] == names[1] and {"objective/score", "policy/approxkl_avg"} <= names[1][0]
    others = [row.keys() for row in watched.state.log_history if "test_logprob" in row or "mine" in row]
    assert len(others) == 4 and not any(name.startswith(("objective", "policy")) for row in others for name in row)


def test_without_answers_the_rewards_are_measured(ppo, dataset):
    def share(prompts, completions, **columns):
        return [0.25] * len(prompts)

    trainer = ppo(eval_dataset=without_answers(dataset), reward_funcs=share)
    trainer.train()
    assert trainer.evaluate()["eval_reward"] == pytest.approx(0.25) and trainer.best["score"] == pytest.approx(0.25)


@pytest.mark.parametrize("place", [0, 7])
def test_one_row_without_an_answer_leaves_all_to_the_rewards(place, ppo, dataset):
    """Whichever row it is, and however many are measured together."""
    answers = dataset["answer"][:]
    answers[place] = None
    some = dataset.remove_columns("answer").add_column("answer", answers)

    def length(prompts, **columns):
        return [float(len(prompt)) for prompt in prompts]

    expected = sum(len(prompt) for prompt in dataset["prompt"]) / len(dataset)
    for size in (1, 3, 8):
        trainer = ppo({"per_device_eval_batch_size": size}, eval_dataset=some, reward_funcs=length)
        found = trainer.evaluate()
        assert found["eval_reward"] == found["eval_reward@0.500"] == pytest.approx(expected)
        assert not any("accuracy" in name or "logprob" in name for name in found)


def test_what_no_function_scores_is_not_measured(ppo, dataset):
    """`None` is not 0; where nothing is known nothing is best."""
    bare = without_answers(dataset)

    def of_some(prompts, **columns):
        return [-0.5 if prompt in bare["prompt"][:3] else None for prompt in prompts]

    for size in (1, 8):
        trainer = ppo({"per_device_eval_batch_size": size}, eval_dataset=bare, reward_funcs=of_some)
        trainer.train()
        assert trainer.evaluate()["eval_reward"] == trainer.best["score"] == pytest.approx(-0.5)
    trainer = ppo(eval_dataset=bare, reward_funcs=nothing)
    trainer.train()
    assert "eval_reward" not in trainer.evaluate() and not trainer.best


def test_sets_that_are_measured_by_different_things_have_no_best(ppo, dataset):
    sets = {"a": dataset, "b": without_answers(dataset)}
    for arguments, other in (({}, "unpruned answers"), ({"reward_funcs": ones}, "rewards")):
        with pytest.raises(ValueError, match=f"'a' has answers, 'b' has {other}. Give all rows an `answer`"):
            ppo(eval_dataset=sets, **arguments)
        trainer = ppo({"keep_best": False, "max_answer_length": 4}, eval_dataset=sets, **arguments)
        found = trainer.evaluate()
        assert {"eval_a_logprob", f"eval_b_{'reward' if arguments else 'agreement'}"} <= found.keys()
    ppo({"score": "agreement"}, eval_dataset=sets)
    trainer = ppo()
    trainer.eval_dataset = sets
    with pytest.raises(ValueError, match="'a' has answers, 'b' has unpruned answers"):
        trainer.evaluate()


def test_question_types_may_be_numbers(ppo, dataset, tmp_path):
    types = ClassLabel(names=["colour", "count"])
    for kinds, feature, named in (([0, 1] * 4, types, {"colour", "count"}), ([0, None] * 4, None, {"0", "all"})):
        numbered = dataset.remove_columns("question_type").add_column("question_type", kinds, feature=feature)
        ppo(eval_dataset=numbered).train()
        assert all(of_types.keys() == named for of_types in json_lines(tmp_path / MASKS)[-1]["kept_by_type"])


def test_predictions_are_keep_masks(ppo, dataset):
    trainer = ppo({"eval_keep_ratios": [0.5, 0.25]}, eval_dataset=dataset)
    predicted = trainer.predict(dataset)
    assert predicted.predictions.shape == (8, 2, 16) and predicted.label_ids is None
    assert predicted.predictions.sum(2).tolist() == [[8, 4]] * 8
    measured = trainer.evaluate()
    assert predicted.metrics == pytest.approx({k.replace("eval_", "test_"): v for k, v in measured.items()})
    mask = torch.from_numpy(predicted.predictions[3, 0])
    pruner = trainer.tprl_model.learned_pruner()
    with trainer.tprl_model.using(pruner):
        plan = trainer.tprl_model.prune(**trainer.encoder.process(dataset[3]), keep_ratio=0.5)
    assert torch.equal(plan.keep_mask, mask)


def test_predictions_have_the_bounds_of_the_config(make_model, processor, dataset, tmp_path):
    """As `generate` has them: what is measured is the pruning of inference."""
    model = make_model(min_keep=2, max_keep=3)
    args = TRAINERS["ppo"][1](str(tmp_path), eval_keep_ratios=[0.5, 1 / 16])
    trainer = TRAINERS["ppo"][0](model, args, processing_class=processor, train_dataset=dataset)
    assert trainer.predict(dataset).predictions.sum(2).tolist() == [[3, 2]] * 8
    with model.using(model.learned_pruner()):
        assert model.prune(**trainer.encoder.process(dataset[0]), keep_ratio=0.5).num_kept.tolist() == [3]


# ---- what it says ----


@pytest.mark.parametrize("name", ["autoencoder", "ppo"])
def test_a_model_card(name, make_model, processor, dataset, tmp_path):
    trainer_class, config = TRAINERS[name]
    data = {"processing_class": processor, "train_dataset": dataset, "eval_dataset": dataset}
    trainer = trainer_class(make_model(), config(str(tmp_path / "mine"), **SETTINGS.get(name, QUIET)), **data)
    trainer.create_model_card("My policy", dataset_name="me/questions", tags="blue")
    path = tmp_path / "mine" / "README.md"
    card = path.read_text()
    assert "My policy" in card and "- me/questions" in card and "- blue" in card and trainer._name in card
    assert str(tmp_path) not in card
    path.write_text(card + "\nWhat I found out.\n")
    trainer.create_model_card("Another")
    assert "What I found out." in path.read_text() and "Another" in path.read_text()


def test_completions_are_logged(ppo, tmp_path, capsys):
    settings = {"log_completions": True, "num_completions_to_print": 2, "max_steps": 2, "logging_steps": 2}
    trainer = ppo(settings)
    plain = ppo({"max_steps": 2, "logging_steps": 2})
    trainer.train()
    (path,) = (tmp_path / "completions").iterdir()
    assert path.name == "completions_00002.parquet"
    table = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert table.column_names == ["step", "question", "kept_tokens", "visual_tokens", "answer", "reference", "score"]
    assert table["visual_tokens"] == [16, 16] and set(table["step"]) == {2}
    kept = trainer.rollouts.keep_masks[-1, :2].sum(1).tolist()
    assert table["kept_tokens"] == kept and table["score"] == trainer.final_scores[:2].tolist()
    assert table["question"] == [trainer.batch.rows[i]["prompt"] for i in trainer.rollouts.sample_index[:2]]
    out = capsys.readouterr().out
    assert "Step 2" in out and f"{kept[0]}/16" in out and table["question"][0] in out
    plain.train()  # to look changes nothing
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_tensorboard_has_the_pictures(ppo, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    ppo({"log_completions": True, "num_completions_to_print": 2, "report_to": "tensorboard"}).train()
    events = accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {"completions/0", "completions/1"}
    assert "completions/text_summary" in tags["tensors"]
    assert events.Images("completions/0")[0].width > 100


# ---- names that are as they were ----


def test_configs_are_parsed_and_explained():
    trl = pytest.importorskip("trl")
    parser = trl.TrlParser((TPRLPPOConfig, trl.ModelConfig, trl.ScriptArguments))
    text = io.StringIO()
    parser.print_help(text)
    assert "--num_ppo_epochs" in text.getvalue()
    for _, config in TRAINERS.values():
        words = ["--output_dir", "x", "--use_cpu", "True", "--feature_cache_mb", "7"]
        (parsed,) = HfArgumentParser(config).parse_args_into_dataclasses(words)
        assert parsed == config("x", use_cpu=True, feature_cache_mb=7)
    words = ["--output_dir", "x", "--use_cpu", "True", "--rollout_keep_ratios", "0.5", "0.25", "--beta", "0.04"]
    (parsed,) = HfArgumentParser(TPRLGRPOConfig).parse_args_into_dataclasses(words)
    assert parsed.rollout_keep_ratios == [0.5, 0.25] and parsed.beta == 0.04  # KL, as in TRL


@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_a_copy_of_a_config_is_the_same_config(name, tmp_path):
    config = TRAINERS[name][1](str(tmp_path), **SETTINGS.get(name, QUIET), eval_strategy="steps")
    copied = dataclasses.replace(config, seed=7)
    differ = {key for key, value in vars(config).items() if repr(vars(copied)[key]) != repr(value)}
    assert vars(copied).keys() == vars(config).keys() and differ == {"seed"}


def test_a_copy_of_a_config_logs_each_buffer_too(make_model, processor, dataset, tmp_path):
    settings = {**PPO, "max_steps": 4, "logging_steps": None}
    config = dataclasses.replace(TPRLPPOConfig(str(tmp_path), **settings), learning_rate=1e-4)
    for args, steps in ((config, [2, 4]), (dataclasses.replace(config, logging_steps=1), [1, 2, 3, 4])):
        trainer = TPRLPPOTrainer(make_model(), args, processing_class=processor, train_dataset=dataset)
        trainer.train()
        assert [row["step"] for row in trainer.state.log_history if "loss" in row] == steps


def test_errors_and_divergences_are_better_where_they_are_smaller():
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    for config, metric, greater in (
        (AutoencoderConfig, "eval_mse", False), (TPRLPPOConfig, "eval_kl@0.333", False),
        (TPRLPPOConfig, "eval_logprob", True), (AutoencoderConfig, "explained_variance", True),
    ):  # fmt: skip
        made = config("x", use_cpu=True, metric_for_best_model=metric, **best)
        assert made.greater_is_better is greater


def test_an_optimizer_of_the_user(ppo, make_model):
    model = make_model()
    mine = torch.optim.SGD(model.policy.parameters(), lr=1e-3)
    trainer = ppo(model=model, optimizers=(mine, None))
    trainer.train()
    assert (
        trainer.optimizer.optimizer is mine if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer is mine
    )


def test_the_saved_model_is_loaded_by_its_path_again(ppo, tmp_path):
    trainer = ppo()
    trainer.train()
    trainer.save_model()
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is TPRLForConditionalGeneration
    again = TPRLPPOTrainer(str(tmp_path), trainer.args)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_one_process_takes_one_accelerator(make_model, processor, dataset, tmp_path, caplog):
    args = TPRLPPOConfig(str(tmp_path), report_to="none")
    assert args.n_gpu <= 1
    args._n_gpu = 4
    trainer = TPRLPPOTrainer(make_model(), args, processing_class=processor, train_dataset=dataset)
    assert trainer.args.n_gpu == 1 and isinstance(trainer.model, torch.nn.Module)
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)
