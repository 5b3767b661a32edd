"""What the settings of a recipe may be that no config checks: those of data and of demonstrations; and names that YAML
takes for truth values. Imports torch."""

from collections.abc import Mapping
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tprl_hf.modeling.values import COUNT, Check, flag, one_of, optional, text, whole, wrong

from .recipe_file import AS_TEXT, check_names

WORDS = {False: ("no", "off"), True: ("yes", "on")}  # that YAML reads as these, where they have no quotes


def as_it_is(name: str, value: Any) -> Any:
    """For what is checked where it is read, where more is known."""
    return value


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
    "seed": whole(0),
    "keep_ratios": as_it_is,
    "num_samples": optional(COUNT),
    "batch_size": COUNT,
    "feature_cache_mb": whole(0),
    "feature_cache_dir": optional(text),
    "score": one_of(("logprob", "agreement")),
    "max_answer_length": COUNT,
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
