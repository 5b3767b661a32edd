"""Recipes: YAML files that say how a policy is trained. Imports no torch."""

import difflib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from tprl_hf.loading import check_model_name
from tprl_hf.missing_packages import require
from tprl_hf.training.stages import STAGES

from .arguments import DTYPES, check_writable
from .old_recipes import renewed

NAMED_SOURCES = ("mosaic", "easy-vqa", "photo")
OURS = Path(__file__).parents[1] / "recipes"
AS_TEXT = "YAML reads no, off, yes and on as truth values: write such a text in quotes."
NAMES = ("base_model", "start_from", "output_dir")  # of models and directories
SECTIONS = (*NAMES, "dtype", "policy", "data")  # and one for each stage
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

TYPES = "question_types"  # names, also where they are numbers


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
        return {key: inner if key == TYPES else as_number(inner) for key, inner in value.items()}
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
        recipe = unshared(recipe)
        for override in overrides:
            apply_override(recipe, override, path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} or an override is not valid YAML: {error}") from None
    check_names(recipe, (*SECTIONS, *STAGES), path)
    if recipe.get("dtype") not in (None, *DTYPES):
        raise ValueError(f"dtype in {path} is one of {', '.join(DTYPES)}; got {recipe['dtype']!r}.")
    if recipe.get("start_from") and recipe.get("base_model"):
        raise ValueError(f"{path} has both start_from and base_model: a checkpoint brings its base model, name one.")
    if recipe.get("output_dir") is None:
        raise ValueError(f"{path} must say `output_dir`: where each stage has its directory.")
    for name in NAMES:
        value = recipe.get(name)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            cure = f" {AS_TEXT}" if isinstance(value, bool) else ""
            what = "a text that is not empty" if isinstance(value, str) else "a text"
            raise ValueError(f"{name} in {path} must be {what}; got {value!r}.{cure}")
    fill_sections(recipe, path)
    recipe = {name: value if name in NAMES else as_number(value) for name, value in recipe.items()}
    check_names(recipe.get("data", {}), ("train", "validation", *STAGES), "data")
    for name, source in sources_in(recipe):
        source["source"] = located(source["source"], file.parent, f"data.{name}.source")
    recipe, changes = renewed(recipe)
    for change in changes:
        warnings.warn(f"{path} is a recipe of an older version: {change}", FutureWarning, stacklevel=2)
    return recipe


def model_of(recipe: Mapping[str, Any]) -> str:
    """The model that a recipe begins with: a checkpoint whose policy it continues, or a base model."""
    import tprl_hf

    return str(recipe.get("start_from") or recipe.get("base_model") or tprl_hf.embedded_checkpoint())


def sources_in(recipe: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each section of `data` that names a source, and the name of what it belongs to."""
    for name, sections in recipe.get("data", {}).items():
        for section in sections if isinstance(sections, list) else [sections]:
            if isinstance(section, dict) and isinstance(section.get("source"), str):
                yield name, section


def located(source: str, folder: Path, where: str) -> str:
    """
    A source's path as seen from the working directory, where it lies beside the recipe.

    Args:
        source (`str`): as the recipe or an override has it.
        folder (`Path`): that of the recipe.
        where (`str`): the setting, for the message.

    Raises:
        `ValueError`: when there is one beside the recipe and another one in the working directory.
    """
    here, beside = Path(source), folder / source
    if (
        source in NAMED_SOURCES
        or here.is_absolute()
        or not beside.exists()
        or (here.exists() and here.samefile(beside))
    ):
        return source
    if here.exists():
        raise ValueError(f"{where}: {beside} and {here} in the working directory are two files: write a longer path.")
    return os.path.relpath(beside)


def check_places(recipe: Mapping[str, Any]) -> None:
    """
    Raises `OSError` or `ValueError` for directories and files of a recipe that are not there or not to be used, and
    `ModuleNotFoundError` for a package that its data come with.
    """
    for name in ("base_model", "start_from"):
        if isinstance(recipe.get(name), str):
            check_model_name(recipe[name])
    check_writable(recipe["output_dir"])
    for name, section in sources_in(recipe):
        source = section["source"]
        if source in NAMED_SOURCES or Path(source).exists():
            if source == "easy-vqa":
                require("easy_vqa")
            continue
        close = difflib.get_close_matches(source, NAMED_SOURCES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise FileNotFoundError(
            f"There are no data {source!r}: data.{name}.source is mosaic, easy-vqa, photo, a .jsonl file or the "
            f"directory of a saved dataset, as seen from the recipe or from the working directory.{hint}"
        )


def unshared(value: Any) -> Any:
    """A copy in which sections that YAML's `*name` repeats are several, so that an override changes one of them."""
    if isinstance(value, dict):
        return {name: unshared(inner) for name, inner in value.items()}
    return [unshared(inner) for inner in value] if isinstance(value, list) else value


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
