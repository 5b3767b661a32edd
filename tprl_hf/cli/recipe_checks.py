"""What the settings of a recipe may be that no config checks: those of data and of demonstrations, and those of
transformers, TRL and PEFT; and names that YAML takes for truth values. Imports torch."""

import contextlib
from collections.abc import Mapping, Sequence
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tprl_hf.modeling.values import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    Check,
    did_you_mean,
    flag,
    list_of,
    number,
    one_of,
    optional,
    plain,
    text,
    whole,
    wrong,
)

from .recipe_file import AS_TEXT, check_names

WORDS = {False: ("no", "off"), True: ("yes", "on")}  # that YAML reads as these, where they have no quotes


def as_it_is(name: str, value: Any) -> Any:
    """For what is checked where it is read, where more is known."""
    return value


SEED = whole(0, 2**32 - 1)
DATA_CHECKS: dict[str, Check] = {
    "source": text,
    "split": text,
    "seed": whole(0),
    "num_samples": optional(COUNT),
    "question_types": as_it_is,
    "labels": flag,
}
DEMONSTRATION_CHECKS: dict[str, Check] = {
    "teacher": text,
    "seed": SEED,
    "keep_ratios": as_it_is,
    "num_samples": optional(COUNT),
    "batch_size": COUNT,
    "feature_cache_mb": whole(0),
    "feature_cache_dir": optional(text),
    "score": one_of(("logprob", "agreement")),
    "max_answer_length": COUNT,
}


def none(name: str, value: Any) -> None:
    """A check for null."""
    if value is not None:
        raise wrong(name, value, "null")


# By type, in words and as a check, what a setting of it may be.
TYPES: dict[Any, tuple[str, Check]] = {
    bool: ("True or False", flag),
    int: ("a whole number", whole()),
    float: ("a number, and finite", number()),
    str: ("a text that is not empty", text),
    list[str]: ("a list of texts", list_of(text, least=1)),
    type(None): ("null", none),
}
MOST_NAMES = 8


def number_of_steps(name: str, value: Any) -> int:
    """A check for `max_steps`: -1 leaves it to the epochs; 0 would do so too."""
    return -1 if plain(value) == -1 else whole(1, cure="-1, or leaving it out, trains num_train_epochs.")(name, value)


RANGES: dict[str, Check] = {
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "adam_epsilon": POSITIVE,
    "num_train_epochs": POSITIVE,
    "max_steps": number_of_steps,
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "eval_steps": optional(POSITIVE),
    "save_total_limit": optional(COUNT),
    "gradient_accumulation_steps": COUNT,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "max_length": optional(COUNT),
    "seed": SEED,
    "data_seed": optional(SEED),
    "r": COUNT,
    "lora_alpha": COUNT,
    "lora_dropout": number(least=0, below=1, what="a number in [0, 1)"),
}


def check_section(section: dict[str, Any], checks: Mapping[str, Check], where: str) -> None:
    """Raises `ValueError` for settings that are not known or not what they must be; whole numbers become `int`."""
    check_names(section, checks, where)
    for name, value in section.items():
        section[name] = checks[name](f"{where}.{name}", value)


def restore_names(section: dict[str, Any], config_class: type, where: str) -> None:
    """
    Gives settings that are names their name back where YAML took it for a truth value, as in `eval_strategy: no`.

    Raises:
        `ValueError`: for a truth value where the config wants a text, and none of its names is such a word.
    """
    hints = get_type_hints(config_class)
    for name, value in section.items():
        if type(value) is not bool or name not in hints:
            continue
        kinds = alternatives(hints[name])
        if bool in kinds or value in kinds:
            continue
        names = [one for kind in kinds for one in names_of(kind)]
        found = [word for word in WORDS[value] if word in names]
        if found:
            section[name] = found[0]
        elif all(kind is str or names_of(kind) for kind in kinds):
            raise wrong(f"{where}.{name}", value, " or ".join(map(repr, names)) or "a text", AS_TEXT)


def check_types(section: dict[str, Any], config_class: type, where: str) -> None:
    """
    Checks fields of transformers, TRL and PEFT, whose configs take anything. Whole numbers become `int`.

    Raises:
        `ValueError`: for a value of another type than its field has, one out of its range, and a name that is not
            among those of the field.
    """
    hints = get_type_hints(config_class)
    for name, value in section.items():
        if name in RANGES:
            section[name] = RANGES[name](f"{where}.{name}", value)
            continue
        kinds = alternatives(hints[name]) if name in hints else []
        named = [one for kind in kinds for one in names_of(kind) if isinstance(kind, type)]
        if named and str in kinds:  # as in `IntervalStrategy | str`
            if value not in named:
                some = ", ".join(named[:MOST_NAMES]) + (", ..." if len(named) > MOST_NAMES else "")
                raise wrong(f"{where}.{name}", value, f"one of {some}", did_you_mean(value, named))
        elif kinds and all(isinstance(kind, str) for kind in kinds):  # a literal
            section[name] = one_of(kinds)(f"{where}.{name}", value)
        elif kinds and all(kind in TYPES for kind in kinds):
            checks = [TYPES[kind] for kind in kinds]
            section[name] = first_that_fits(checks, f"{where}.{name}", value)


def first_that_fits(checks: Sequence[tuple[str, Check]], name: str, value: Any) -> Any:
    """What the first check that lets the value through makes of it."""
    for _, check in checks:
        with contextlib.suppress(ValueError):
            return check(name, value)
    raise wrong(name, value, " or ".join(words for words, _ in checks))


def alternatives(hint: Any) -> list[Any]:
    """The types that a type hint allows, and the values of its literals."""
    if get_origin(hint) in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in alternatives(part)]
    return list(get_args(hint)) if get_origin(hint) is Literal else [hint]


def names_of(kind: Any) -> list[str]:
    """The names that one of [`alternatives`] stands for: those of an enumeration, or of a literal itself."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.value for member in kind if isinstance(member.value, str)]
    return [kind] if isinstance(kind, str) else []
