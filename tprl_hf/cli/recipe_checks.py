"""What the settings of a recipe may be that no config checks: those of data and of demonstrations. Imports torch."""

from collections.abc import Mapping
from typing import Any

from tprl_hf.modeling.values import COUNT, Check, list_of, optional, text, whole

from .recipe_file import check_names

DATA_CHECKS: dict[str, Check] = {
    "source": text,
    "split": text,
    "seed": whole(0),
    "num_samples": optional(COUNT),
    "question_types": list_of(text, least=1),
}
DEMONSTRATION_CHECKS: dict[str, Check] = {
    "teacher": text,
    "seed": whole(0),
    # `generate_demonstrations` looks into them
    "keep_ratios": list_of(lambda name, value: value, least=1),
    "num_samples": optional(COUNT),
    "batch_size": COUNT,
    "feature_cache_mb": whole(0),
}


def check_section(section: dict[str, Any], checks: Mapping[str, Check], where: str) -> None:
    """Raises `ValueError` for settings that are not known or not what they must be; whole numbers become `int`."""
    check_names(section, checks, where)
    for name, value in section.items():
        section[name] = checks[name](f"{where}.{name}", value)
