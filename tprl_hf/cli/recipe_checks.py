"""What the settings of a recipe may be that no config checks: those of data and of demonstrations. Imports torch."""

from collections.abc import Mapping
from typing import Any

from tprl_hf.modeling.values import COUNT, Check, flag, one_of, optional, text, whole

from .recipe_file import check_names


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
