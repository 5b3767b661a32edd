"""Recipes: YAML files that say how a policy is trained. Imports no torch."""

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from tprl_hf.training.stages import STAGES

from .old_recipes import renewed

OURS = Path(__file__).parents[1] / "recipes"
SECTIONS = ("base_model", "output_dir", "policy", "data")  # and one for each stage
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def as_number(value: Any) -> Any:
    """
    Numbers that YAML leaves as text, in a value and all that it holds: "1/3" and "1e-4".

    Example:

    ```python
    >>> as_number({"learning_rate": "1e-4", "keep_ratios": ["1/2", 0.25], "ratio": "joint"})
    {'learning_rate': 0.0001, 'keep_ratios': [0.5, 0.25], 'ratio': 'joint'}
    ```
    """
    if isinstance(value, Mapping):
        return {key: as_number(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_number(inner) for inner in value]
    if not isinstance(value, str):
        return value
    parts = value.split("/")
    if len(parts) > 2 or not all(_NUMBER.fullmatch(part.strip()) for part in parts):
        return value
    numbers = [float(part) for part in parts]
    if len(numbers) == 2 and numbers[1] == 0:
        raise ValueError(f"{value} is not a number.")
    return numbers[0] / numbers[1] if len(numbers) == 2 else numbers[0]


def check_names(given: Iterable[str], known: Iterable[str], where: str, examples: Iterable[str] | None = None) -> None:
    """
    Raises `ValueError`, with the name that was probably meant, for a name that is not known.

    Args:
        examples (`Iterable[str]`, *optional*): what the message lists where no name is close; all by default.
    """
    known = list(known)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            listed = ", ".join(known if examples is None else examples)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {listed}."
            raise ValueError(f"{where} has no setting {name!r}{hint}")


def find_recipe(name: str) -> str:
    """The path of a recipe: `name` itself where it is a file, else that of ours which is called so.

    Raises:
        `FileNotFoundError`: when there is no such file and none of ours has that name.
    """
    if Path(name).is_file():
        return name
    ours = {path.stem: path for path in sorted(OURS.glob("*.yaml"))}
    if name not in ours:
        raise FileNotFoundError(f"There is no recipe {name}: pass a file, or one of ours: {', '.join(ours)}.")
    return str(ours[name])


def read_recipe(path: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """
    Reads a recipe.

    Args:
        path (`str`): a YAML file with some of the sections of `SECTIONS` and of stages, or the name of one of ours.
        overrides (`Iterable[str]`, *optional*): `"lfd.learning_rate=1e-4"` and the like; values are YAML.
            `"lfd=false"` leaves a stage out.

    Returns:
        `dict`: the sections; numbers are numbers. A recipe of an older version is read as one of today, with a
        warning.

    Raises:
        `FileNotFoundError`, `ValueError`: when there is no such file, or it is not a recipe.
    """
    file = Path(find_recipe(path))
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(recipe, dict):
            raise ValueError(f"{path} is not a recipe: it has no sections.")
        for override in overrides:
            apply_override(recipe, override, path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} or an override is not valid YAML: {error}") from None
    check_names(recipe, (*SECTIONS, *STAGES), path)
    if "output_dir" not in recipe:
        raise ValueError(f"{path} must say `output_dir`: where each stage has its directory.")
    fill_sections(recipe, path)
    recipe = {
        name: value if name in ("base_model", "output_dir") else as_number(value) for name, value in recipe.items()
    }
    recipe, changes = renewed(recipe)
    for change in changes:
        warnings.warn(f"{path} is a recipe of an older version: {change}", FutureWarning, stacklevel=2)
    return recipe


def apply_override(recipe: dict[str, Any], override: str, path: str) -> None:
    """Puts `"SECTION.SETTING=VALUE"` into `recipe`, which was read from `path`."""
    name, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"{override!r} is not an override: write SECTION.SETTING=VALUE.")
    *sections, setting = name.split(".")
    if sections and sections[0] in STAGES and sections[0] not in recipe:
        stages = ", ".join(stage for stage in STAGES if stage in recipe)
        raise ValueError(f"{override!r}: {path} has no stage {sections[0]}; its stages are {stages}.")
    place = recipe
    for section in sections:
        if not isinstance(place.setdefault(section, {}), dict):
            raise ValueError(f"{override!r}: {section} is not a section of {path}.")
        place = place[section]
    place[setting] = yaml.safe_load(text)


def fill_sections(recipe: dict[str, Any], path: str) -> None:
    """Makes an empty section one of defaults, and takes out a stage that is `false`."""
    for section in ("policy", "data", *STAGES):
        if section in recipe and recipe[section] is None:
            recipe[section] = {}
        elif section in STAGES and recipe.get(section) is False:
            del recipe[section]
        elif section in recipe and not isinstance(recipe[section], dict):
            raise ValueError(f"{section} in {path} must be a section of settings; got {recipe[section]!r}.")
