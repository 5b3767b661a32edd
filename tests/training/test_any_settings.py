"""Whatever a trainer's config or a demonstration is given: taken as it is, or one clear exception."""

import tempfile
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.any_values import (
    ANYTHING,
    all_good,
    assert_good,
    is_count,
    is_flag,
    is_fraction,
    is_number,
    judge,
    or_none,
    scalar,
    several,
    some_of,
)
from tprl_hf.modeling.token_layout import TokenLayout
from tprl_hf.modeling.token_pruner import PruningInputs
from tprl_hf.training import (
    AutoencoderConfig,
    CounterfactualConfig,
    LfDConfig,
    NoiseGateConfig,
    TPRLGRPOConfig,
    TPRLMAPOConfig,
    TPRLPPOConfig,
)
from tprl_hf.training.demonstrations import generate_demonstrations
from tprl_hf.training.lfd_trainer import demonstrated_steps


def is_rate(value: Any) -> bool:
    return is_number(value, least=0)


def is_positive(value: Any) -> bool:
    return is_number(value, above=0)


def is_unit(value: Any) -> bool:
    return is_number(value, least=0, most=1)


def is_ratios(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(is_fraction(one) for one in value)


def among(*choices: str):
    return lambda value: type(value) is str and value in choices


OF_ALL = {
    "feature_cache_mb": lambda value: is_count(value, 0),
    "feature_cache_dir": or_none(lambda value: type(value) is str and value.strip() != ""),
    "feature_cache_dtype": or_none(among("bfloat16", "float16")),
    "encode_batch_size": or_none(is_count),
    "prefetch_threads": lambda value: is_count(value, 0),
    "score_batch_size": is_count,
    "score_batch_tokens": or_none(is_count),
    "micro_batch_tokens": is_count,
    "save_base_model": or_none(is_flag),
    "learning_rate": is_rate,
    "num_train_epochs": is_positive,
    "per_device_train_batch_size": is_count,
}
OF_POLICIES = {
    **OF_ALL,
    "eval_keep_ratios": is_ratios,
    "keep_best": is_flag,
    "best_metric": among("accuracy", "logprob"),
    "keep_ratio": or_none(is_fraction),
    "max_answer_length": is_count,
    "unpruned_answers_dir": or_none(lambda value: isinstance(value, str) and bool(value.strip())),
    "watched_samples": lambda value: is_count(value, 0),
}
OF_ROLLOUTS = {
    **OF_POLICIES,
    "num_generations": is_count,
    "score": among("correct", "logprob", "agreement", "kl"),
    "min_logprob": lambda value: is_number(value, most=0),
    "reward_weights": or_none(lambda value: isinstance(value, (list, tuple)) and all(map(is_number, value))),
    "max_completion_length": is_count,
    "log_completions": is_flag,
    "num_completions_to_print": or_none(is_count),
    "max_llm_passes": or_none(is_count),
    "num_mini_batches": is_count,
    "micro_batch_size": or_none(is_count),
}
BUDGETED = {
    **OF_ROLLOUTS,
    "rollout_keep_ratios": or_none(is_ratios),
    "shared_budget": is_unit,
    "anneal_budgets": is_flag,
    "efficiency_coef": is_rate,
    "min_spread": is_rate,
    "num_iterations": is_count,
    "epsilon": is_positive,
    "beta": is_rate,
}
GRPO = {
    **BUDGETED,
    "num_generations": lambda value: is_count(value, 2),
    "num_steps": is_count,
    "lambda_disc": is_fraction,
    "score_every_step": is_flag,
    "scale_rewards": among("group", "none"),
    "ratio": among("joint", "token"),
    "draw": among("bits", "sets"),
    "num_probes": lambda value: is_count(value, 0),
}
CONFIGS: dict[type, dict[str, Any]] = {
    AutoencoderConfig: OF_ALL,
    LfDConfig: {**OF_POLICIES, "train_encoder": is_flag},
    TPRLPPOConfig: {
        **OF_ROLLOUTS,
        "num_steps": is_count,
        "lambda_disc": is_fraction,
        "score_every_step": is_flag,
        "alpha": is_rate,
        "beta": is_rate,
        "gamma": is_unit,
        "lam": is_unit,
        "whiten_advantages": is_flag,
        "num_ppo_epochs": is_count,
        "ratio": among("joint", "token"),
        "cliprange": is_positive,
        "cliprange_value": is_positive,
        "vf_coef": is_rate,
        "entropy_coef": is_rate,
        "critic_learning_rate": is_rate,
    },
    TPRLGRPOConfig: GRPO,
    TPRLMAPOConfig: {
        **GRPO,
        "scale_rewards": among("none"),
        "draw": among("bits"),
        "num_probes": lambda value: is_count(value, 0) and scalar(value) == 0,
        "shared_budget": lambda value: is_unit(value) and scalar(value) == 0,
        "memory_size": is_count,
        "memory_weight": lambda value: is_number(value, above=0, below=1),
    },
    CounterfactualConfig: {
        **BUDGETED,
        "num_flips": is_count,
        "weight_by_budget": is_flag,
        "scale_advantages": is_flag,
    },
    NoiseGateConfig: {
        **OF_ROLLOUTS,
        "rollout_keep_ratios": is_ratios,
        "score": among("logprob", "agreement", "kl"),
    },
}
WORDS = st.sampled_from(["joint", "token", "group", "none", "correct", "logprob", "kl", "accuracy", "bits", "sets"])
RATIOS = st.sampled_from([[0.5], [2.0], [0.5, 0.0], (1 / 3, 1), [None], [True], ["1/3"], [float("nan")], [[0.5]]])
MORE_CHOICES = st.one_of(
    ANYTHING, st.integers(1, 4), st.sampled_from([1e-3, 0.5, 0, True, False, None]), WORDS, RATIOS
)
# of fields of transformers that ours replace, only these are ours to check
BOOLS_OF_OURS = ("remove_unused_columns", "dataloader_pin_memory")


def test_each_field_of_ours_is_described_here():
    """A new field is checked, and this test says what it may be."""
    for config_class, described in CONFIGS.items():
        own = config_class.all_checks().keys()
        declared = {
            name
            for base in config_class.__mro__
            if base.__module__.startswith("tprl_hf")
            for name in vars(base).get("__annotations__", {})
        }
        of_transformers = {
            *(
                "logging_steps",
                "save_total_limit",
                "report_to",
                "hub_strategy",
                "ddp_find_unused_parameters",
                "checks",
                "some_metrics",
                "no_checkpointing",
            ),
        }
        assert own - {*BOOLS_OF_OURS} == described.keys()
        assert declared - of_transformers == {*own} & declared, config_class


def goes_together(config_class: type, values: dict[str, Any]) -> bool:
    """Whether fields that are valid alone contradict each other."""
    of = {name: values.get(name, getattr(config_class, name, None)) for name in CONFIGS[config_class]}
    if config_class is CounterfactualConfig and "rollout_keep_ratios" not in values:
        of["rollout_keep_ratios"] = [1 / 3, 1 / 9]
    ratios = values.get("eval_keep_ratios", ())
    if len({f"{scalar(ratio):.3f}" for ratio in ratios}) < len(ratios):
        return False
    if of["feature_cache_dtype"] is not None and of["feature_cache_dir"] is None:
        return False
    if "num_mini_batches" in of:
        trajectories = scalar(of["per_device_train_batch_size"]) * scalar(of["num_generations"])
        if trajectories % scalar(of["num_mini_batches"]):
            return False
    if "shared_budget" in of and scalar(of["shared_budget"]) and not of["rollout_keep_ratios"]:
        return False
    if scalar(of.get("anneal_budgets", False)) and len(of["rollout_keep_ratios"] or []) < 2:
        return False
    exact = (
        of.get("rollout_keep_ratios") and not scalar(of.get("shared_budget", 0)) and scalar(of.get("lambda_disc")) == 1
    )
    if of.get("draw") == "sets" and not exact:
        return False
    probes = scalar(of.get("num_probes", 0))
    if probes and not 2 <= probes < scalar(of["num_generations"]):
        return False
    if probes and (scalar(of["score_every_step"]) or scalar(of["min_spread"]) == 0):
        return False
    return not (scalar(of.get("weight_by_budget", False)) and not of["rollout_keep_ratios"])


def plain(value: Any) -> Any:
    found = scalar(value)
    if found is NotImplemented:
        return [scalar(one) for one in value] if isinstance(value, (list, tuple)) else value
    return found


@st.composite
def configs(draw):
    config_class = draw(st.sampled_from(sorted(CONFIGS, key=lambda one: one.__name__)))
    return config_class, draw(some_of(dict.fromkeys(CONFIGS[config_class], MORE_CHOICES), most=2))


@several(550)
@given(case=configs())
def test_a_config(case):
    config_class, values = case
    is_valid = all_good(values, CONFIGS[config_class]) and goes_together(config_class, values)
    named = {**values}
    if all_good(values, CONFIGS[config_class]):  # a contradiction may name what was not set
        named.update(dict.fromkeys(("rollout_keep_ratios", "num_mini_batches", "shared_budget", "draw"), "="))

    def differs(config):
        other = [name for name, value in values.items() if getattr(config, name) != plain(value)]
        wrong_type = [
            name for name in values if type(getattr(config, name)) not in (bool, int, float, str, list, type(None))
        ]
        return f"{other} {wrong_type}" if other or wrong_type else None

    with tempfile.TemporaryDirectory() as folder:
        assert_good(judge(lambda: config_class(folder, use_cpu=True, **values), named, is_valid, differs))


# ---- demonstrations ----

BITS = st.lists(st.booleans(), min_size=4, max_size=4)
ODD_BITS = st.sampled_from(
    [[0.3, 1, 0, 1], [None] * 4, [2, 0, 0, 1], ["x"] * 4, [-1, 1, 1, 1], [float("nan"), 1, 1, 1]]
)


def inputs_of(count: int) -> PruningInputs:
    layout = TokenLayout.from_stacked(torch.zeros(7, 1, count, dtype=torch.long))
    valid = torch.ones(1, count, dtype=torch.bool)
    query = torch.zeros(1, 0, 2)
    return PruningInputs(torch.zeros(1, count, 2), valid, valid.sum(1), layout, None, query, valid[:, :0], [0])


@several(150)
@given(masks=st.lists(st.one_of(BITS, BITS, BITS, ODD_BITS), max_size=3))
def test_demonstrations(masks):
    steps = [[True] * 4, *masks]
    is_valid = bool(masks) and all(
        all(type(bit) is not str and bit in (0, 1) and bit <= was for bit, was in zip(mask, before, strict=True))
        and any(mask)
        for before, mask in zip(steps, masks, strict=False)
    )

    def differs(result):
        before, kept, _ = result
        same = kept[:, 0].tolist() == [[bool(bit) for bit in mask] for mask in masks]
        return None if same and before[0].all() and torch.equal(before[1:], kept[:-1]) else "other steps"

    verdict = judge(lambda: demonstrated_steps([masks], inputs_of(4)), {"keep_masks": "keep_masks"}, is_valid, differs)
    assert_good(verdict)


@several(80)
@given(name=st.sampled_from(["keep_ratios", "batch_size", "feature_cache_mb"]), value=st.one_of(ANYTHING, RATIOS))
def test_arguments_of_generate_demonstrations(name, value):
    """A valid one comes as far as the model, of which there is none here."""
    given = [value] if not isinstance(value, (list, tuple)) else value
    lists = given if any(isinstance(one, (list, tuple)) for one in given) else [given]
    is_valid = {
        "batch_size": is_count(value),
        "feature_cache_mb": is_count(value, 0),
        "keep_ratios": isinstance(value, (list, tuple))
        and all(
            is_ratios(one) and all(a > b for a, b in zip([1.0, *map(scalar, one)], map(scalar, one), strict=False))
            for one in lists
        )
        and len(value) > 0,
    }[name]
    if is_valid:
        with pytest.raises(AttributeError, match="chat_template"):
            generate_demonstrations(None, None, None, None, **{name: value})
        return
    verdict = judge(lambda: generate_demonstrations(None, None, None, None, **{name: value}), {name: value}, False)
    assert_good(verdict)
