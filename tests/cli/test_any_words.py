"""Whatever is written after `tprl`, or into a recipe: one line that names it, or as far as a valid one comes."""

import json
import re
import tempfile
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.any_values import (
    NUMBERS,
    TEXTS,
    WRITABLE,
    assert_good,
    assert_reaches,
    is_count,
    is_flag,
    is_number,
    judge,
    or_none,
    several,
)
from tprl_hf.cli.main import main


def said(words: list[str], capsys) -> None:
    """Runs a command; its one line of an error as an exception."""
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as error:  # argparse
        code = int(error.code or 0)
    line = capsys.readouterr().err.strip()
    if code:
        assert code == 2 and len(line.splitlines()) == 1, line
        raise ValueError(line)


# ---- options of commands ----


def as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def is_fraction_text(text: str) -> bool:
    parts = text.split("/")
    numbers = [as_number(part) for part in parts]
    if len(parts) > 2 or None in numbers or (len(numbers) == 2 and numbers[1] == 0):
        return False
    value = numbers[0] / (numbers[1] if len(numbers) == 2 else 1)  # type: ignore[operator]
    return 0 < value <= 1


def is_count_text(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9]+", text, re.A)) and int(text) > 0


def is_threshold_text(text: str) -> bool:
    value = as_number(text)
    return value is not None and is_number(value, above=0, below=1)


OPTIONS = {
    "--keep-ratio": is_fraction_text,
    "--num-keep": is_count_text,
    "--threshold": is_threshold_text,
    "--max-new-tokens": is_count_text,
}
WORDS = st.one_of(
    NUMBERS.map(str),
    TEXTS,
    st.sampled_from(["1/3", "1/0", "2/1", "-1", "+3", "3.0", "1e-1", "0x3", "٣", "inf", "1_0", " 3"]),
)


@several(150)
@given(option=st.sampled_from(sorted(OPTIONS)), word=WORDS)
def test_options_of_generate(option, word, capsys):
    """A valid one comes as far as the picture, which is not there."""
    words = ["generate", "--image", "no-such.png", "--question", "what ?", f"{option}={word}"]
    verdict = judge(
        lambda: said(words, capsys),
        {option: word, option.strip("-"): word, option.strip("-").replace("-", "_"): word},
        False,
    )
    if OPTIONS[option](word):
        assert_reaches(verdict, "no-such.png")
    else:
        assert_good(verdict)


@several(40)
@given(
    options=st.lists(
        st.sampled_from(["--keep-ratio=0.5", "--num-keep=3", "--threshold=0.5", "--no-prune"]),
        min_size=2,
        max_size=3,
        unique=True,
    )
)
def test_several_budgets(options, capsys):
    words = ["generate", "--image", "no-such.png", "--question", "what ?", *options]
    named = {option.split("=")[0]: option.split("=")[0] for option in options}
    verdict = judge(lambda: said(words, capsys), named, False)
    assert_good(verdict, "not allowed with argument")


# ---- recipes ----

RECIPE = {
    "output_dir": "out",
    "policy": {"latent_dim": 8, "num_steps": 1},
    "data": {"train": {"source": "mosaic", "num_samples": 6}},
    "autoencoder": {"learning_rate": 1e-3},
    "lfd": {"learning_rate": 1e-3},
    "demonstrations": {"teacher": "uniform"},
    "ppo": {"num_mini_batches": 4},
    "tune": {"keep_ratios": [1, "1/3"], "lora": {"r": 2}},
}


def read_number(value):
    """A number, and what a text that is one means."""
    parts = [float(part) for part in value.split("/")] if isinstance(value, str) else [value, 1]
    return parts[0] / (parts[1] if len(parts) == 2 else 1) if isinstance(value, str) else value


def is_written_number(value, **bounds) -> bool:
    """As a recipe is read: text that is a number is one."""
    if isinstance(value, str):
        parts = value.split("/")
        if (
            not all(re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", part) for part in parts)
            or len(parts) > 2
        ):
            return False
        value = read_number(value)
    return is_number(value, **bounds)


def is_written_count(value, least: int = 1, most: float = float("inf")) -> bool:
    return is_written_number(value) and is_count(read_number(value), least, most)


def is_max_steps(value) -> bool:
    return is_written_count(value) or (is_written_number(value) and read_number(value) == -1)


def is_interval(value) -> bool:
    """Steps, or a share of all."""
    return is_written_number(value, above=0) and (read_number(value) <= 1 or is_count(read_number(value)))


def is_strategy(value) -> bool:
    return value is False or value in ("no", "steps", "epoch", "best")  # YAML's no


OF_TRANSFORMERS = {
    "max_steps": is_max_steps,
    "seed": lambda value: is_written_count(value, 0, 2**32 - 1),
    "learning_rate": lambda value: is_written_number(value, least=0),
    "num_train_epochs": lambda value: is_written_number(value, above=0),
    "per_device_train_batch_size": is_written_count,
    "gradient_accumulation_steps": is_written_count,
    "logging_steps": is_interval,
    "save_steps": is_interval,
    "save_total_limit": or_none(is_written_count),
    "save_strategy": is_strategy,
    "weight_decay": lambda value: is_written_number(value, least=0),
    "lr_scheduler_type": lambda value: value in ("linear", "constant", "cosine"),
    "logging_first_step": is_flag,
    "run_name": or_none(lambda value: isinstance(value, str) and value.strip() and not is_written_number(value)),
}
PLACES = {
    **{(stage, name): check for stage in ("lfd", "tune") for name, check in OF_TRANSFORMERS.items()},
    **dict.fromkeys(
        [("base_model",), ("start_from",), ("dtype",), ("ppo", "reward_funcs")], lambda value: value is None
    ),
    ("tune", "keep_ratios"): lambda value: (
        isinstance(value, list) and value and all(is_written_number(one, above=0, most=1) for one in value)
    ),
    ("tune", "num_samples"): or_none(is_written_count),
    ("tune", "max_length"): or_none(is_written_count),
    ("tune", "lora"): lambda value: value is None or value == {},
    ("tune", "lora", "r"): is_written_count,
    ("tune", "lora", "lora_alpha"): is_written_count,
    ("tune", "lora", "lora_dropout"): lambda value: is_written_number(value, least=0, below=1),
    ("tune", "lora", "use_rslora"): is_flag,
    ("tune", "lora", "bias"): lambda value: value in ("none", "all", "lora_only"),
    ("tune", "lora", "target_modules"): or_none(
        lambda value: (isinstance(value, str) and value.strip() and not is_written_number(value)) or value == ["x"]
    ),
    ("policy", "num_steps"): lambda value: is_written_count(value, 1, 1000),
    ("policy", "query_agnostic"): is_flag,
    ("policy", "keep_ratio"): or_none(lambda value: is_written_number(value, above=0, most=1)),
    ("policy", "position_ids"): lambda value: value in ("original", "contiguous"),
    ("data", "train", "num_samples"): or_none(is_written_count),
    ("data", "train", "seed"): lambda value: is_written_count(value, 0),
    ("data", "train", "labels"): is_flag,
    ("lfd", "train_encoder"): is_flag,
    ("lfd", "eval_keep_ratios"): lambda value: (
        isinstance(value, list) and value and all(is_written_number(one, above=0, most=1) for one in value)
    ),
    ("lfd", "best_metric"): lambda value: value in ("accuracy", "logprob"),
    ("ppo", "num_ppo_epochs"): is_written_count,
    ("ppo", "gamma"): lambda value: is_written_number(value, least=0, most=1),
    ("ppo", "cliprange"): lambda value: is_written_number(value, above=0),
    ("ppo", "lambda_disc"): lambda value: is_written_number(value, above=0, most=1),
    ("demonstrations", "batch_size"): is_written_count,
    ("demonstrations", "num_samples"): or_none(is_written_count),
    ("demonstrations", "seed"): lambda value: is_written_count(value, 0, 2**32 - 1),
    ("demonstrations", "score"): lambda value: value in ("logprob", "agreement"),
    ("demonstrations", "teacher"): lambda value: value in ("uniform", "gradient"),
}
OF_YAML = st.one_of(
    st.sampled_from([1, 2, 0.5, 1e-3, True]),
    WRITABLE,
    st.sampled_from(["1e-3", "1/2", "uniform", "contiguous", "accuracy", [0.5], ["x"], [2.0]]),
    st.sampled_from(
        ["no", "steps", "linear", "adamw", "none", "all", -1, 0, 10, [1, "1/3"], [True], ["a", 1], {"r": 0}]
    ),
)


@several(420)
@given(place=st.sampled_from(sorted(PLACES)), value=OF_YAML)
def test_a_setting_of_a_recipe(place, value, capsys):
    """With valid settings the last stages are refused because the first has not run."""
    recipe = json.loads(json.dumps(RECIPE))
    section = recipe
    for name in place[:-1]:
        section = section[name]
    section[place[-1]] = value
    stage = place[0] if place[0] in ("lfd", "ppo", "tune", "demonstrations") else "demonstrations"
    is_valid = bool(PLACES[place](value))
    with tempfile.TemporaryDirectory() as folder:
        recipe["output_dir"] = folder
        path = Path(folder) / "own.yaml"
        path.write_text(yaml.safe_dump(recipe, allow_unicode=True))
        named = {place[-1]: value}
        if is_written_number(value):  # it may be shown as the number that the text is
            named = {place[-1]: [value, read_number(value)]}
        verdict = judge(lambda: said(["train", stage, "--config", str(path)], capsys), named, False)
    if is_valid:
        assert_reaches(verdict, "left in")
    else:
        # a text may be the name of a model, and of a function
        assert_good(verdict, "There is no directory", "the Hub gave no such model", "does not name a reward function")
