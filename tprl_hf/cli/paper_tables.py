"""The paper's tables and figures as files: which policies they need, what is trained already, how long the rest takes.

A stage is trained once: runs of all tables share what has equal settings.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from tprl_hf.training.stages import STAGES, stages_until

from .dry_run import seconds_of
from .recipe_file import OURS, check_names, read_recipe

FOLDER = OURS / "paper"
MINUTES = "minutes"


@dataclass
class Table:
    """
    One table or figure.

    Args:
        name (`str`): that of its file.
        title, about (`str`): what it shows, and what the paper says.
        recipe, stage (`str`, *optional*): how its policies are trained, and the stage whose model is measured.
        seeds (`list[int]`): each row is trained under each.
        rows (`dict`): by label, what differs from the recipe: `SECTION.SETTING: value`; or own `stage`, `seeds`, or
            `recipe`, as it is.
        against (`str`, *optional*): the row with which the others are compared, besides the unpruned model.
        common, short (`dict`): settings of all rows; and those of the short version, which two cores can train.
        keep_ratios (`list[str]`): budgets of the measurement.
        test (`dict`): `seeds` of the test questions, and `num_samples` of each.
        checkpoints (`dict`): by label, checkpoints that are measured beside the rows; `embedded` is the shipped one.
        curve (`str`, *optional*): draw accuracy on validation over `step` or `llm_passes`.
        trajectories (`dict`, *optional*): draw `num_samples` test pictures in `num_steps` steps to `keep_ratio`.
        commands (`list[str]`): further `tprl` commands; `{out}` is the table's own directory.
    """

    name: str
    title: str
    about: str
    recipe: str | None = None
    stage: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    against: str | None = None
    common: dict[str, Any] = field(default_factory=dict)
    short: dict[str, Any] = field(default_factory=dict)
    keep_ratios: list[str] = field(default_factory=lambda: ["1/3", "2/9", "1/9", "1/18"])
    test: dict[str, Any] = field(default_factory=lambda: {"seeds": [7, 8, 9], "num_samples": 1400})
    checkpoints: dict[str, str] = field(default_factory=dict)
    curve: str | None = None
    trajectories: dict[str, Any] | None = None
    commands: list[str] = field(default_factory=list)


@dataclass
class Run:
    """One row of a table under one seed.

    Args:
        label (`str`): the row's.
        seed (`int`): of all stages.
        recipe_name (`str`): the recipe's.
        settings (`dict`): what the run changes in it.
        recipe (`dict`): with `output_dir`, where each stage is a link into the shared directory.
        stages (`list[str]`): those that lead to its model, in their order.
        directories (`dict`): by stage, the shared directory.
    """

    label: str
    seed: int
    recipe_name: str
    settings: dict[str, Any]
    recipe: dict[str, Any]
    stages: list[str]
    directories: dict[str, Path]

    @property
    def model(self) -> Path:
        """The directory of what is measured."""
        return Path(self.recipe["output_dir"]) / self.stages[-1]

    def missing(self) -> list[str]:
        """Stages that are not finished."""
        return [stage for stage, path in self.directories.items() if not (path / "training.json").exists()]

    def link(self) -> None:
        """Makes the directory of the run, whose stages are links. The frozen LVLM and its answers are shared too."""
        from .train import answers_folder, base_directory

        folder = Path(self.recipe["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        shared = next(iter(self.directories.values())).parent
        shared.mkdir(parents=True, exist_ok=True)
        base = Path(base_directory({**self.recipe, "output_dir": str(shared)}))
        answers = Path(answers_folder({"output_dir": str(shared)}))
        linked = {**self.directories, answers.name: answers, **({"base": base} if base.parent == shared else {})}
        for name, path in linked.items():
            path.mkdir(exist_ok=True)
            target = os.path.relpath(path.resolve(), folder.resolve())
            link = folder / name
            if link.is_symlink() and os.readlink(link) != target:
                link.unlink()  # of a run with other settings
            if not link.is_symlink():
                link.symlink_to(target, target_is_directory=True)


def table_names() -> list[str]:
    """The paper's figures, its tables, both in their order, and then ours."""
    names = [path.stem for path in FOLDER.glob("*.yaml") if path.stem != MINUTES]
    return sorted(names, key=lambda name: (not name.startswith("fig"), not of_the_paper(name), name))


def of_the_paper(name: str) -> bool:
    """Whether a table is one of the paper's."""
    return name.startswith(("fig", "table"))


def read_table(name: str) -> Table:
    """
    Raises:
        `ValueError`: for a table that there is not.
    """
    if name not in table_names():
        raise ValueError(f"There is no table {name!r}; there are {', '.join(table_names())}; all and more.")
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    check_names(content, [each for each in Table.__dataclass_fields__ if each != "name"], f"{name}.yaml")
    table = Table(name=name, **content)
    if table.against is not None and table.against not in (*table.checkpoints, *table.rows):
        raise ValueError(f"{name}.yaml: against: {table.against!r} is not one of its rows.")
    return table


def settings_of_all(table: Table, full: bool) -> dict[str, Any]:
    """What all rows change in the recipe."""
    return {**table.common, **({} if full else table.short)}


def runs_of(table: Table, folder: Path, full: bool, extra: Iterable[str] = ()) -> list[Run]:
    """
    What a table needs to be trained.

    Args:
        folder (`Path`): where runs lie.
        full (`bool`): the recipe's own length, not the short version.
        extra (`Iterable[str]`): overrides of all runs, as of `tprl train --set`.
    """
    runs = []
    for row, (label, settings) in enumerate(table.rows.items()):
        name, stage = settings.get("recipe", table.recipe), settings.get("stage", table.stage)
        if name is None or stage not in STAGES:
            raise ValueError(f"{table.name}: the row {label!r} has no recipe or no stage.")
        changed = {**({} if "recipe" in settings else settings_of_all(table, full)), **settings}
        for seed in changed.pop("seeds", table.seeds):
            recipe = recipe_of(name, stage, changed, seed, extra)
            recipe["output_dir"] = str(folder / table.name / f"row{row}-seed{seed}")
            stages = [each for each in stages_until(stage) if each in recipe]
            directories = shared_directories(recipe, stages, shared_folder(recipe, folder))
            runs.append(Run(label, seed, name, changed, recipe, stages, directories))
    return runs


def recipe_of(
    name: str, stage: str, changed: Mapping[str, Any], seed: int, extra: Iterable[str] = ()
) -> dict[str, Any]:
    """The recipe `name` with other settings, of the stages that lead to `stage`, under one seed."""
    plain = read_recipe(name)
    wanted = [one for one in stages_until(stage) if one in plain and changed.get(one) is not False]
    overrides = [f"{one}=false" for one in STAGES if one in plain and one not in wanted]
    for setting, value in changed.items():
        section = setting.partition(".")[0]
        if setting not in ("recipe", "stage") and (section in wanted or section not in STAGES):
            overrides.append(f"{setting}={json.dumps(value)}")
    overrides += [f"{one}.seed={seed}" for one in wanted if one != "demonstrations"]
    return read_recipe(name, [*overrides, *extra])


def shared_folder(recipe: Mapping[str, Any], folder: Path) -> Path:
    """Where the stages of all runs with the same frozen LVLM lie."""
    base = recipe.get("base_model")
    return folder / ("stages" if base is None else f"stages-{hashlib.sha256(str(base).encode()).hexdigest()[:8]}")


def shared_directories(recipe: dict[str, Any], stages: list[str], folder: Path) -> dict[str, Path]:
    """By stage, a directory whose name follows from all that its result depends on."""
    from .train import settings_of

    keys: dict[str, str] = {}
    for stage in stages:
        before = next((one for one in STAGES[stage].starts_from if one in keys), None)
        # a teacher reads the frozen LVLM: it does not matter what the autoencoder learned before
        source = STAGES[stage].learns_from
        depends = [] if stage == "demonstrations" else [keys.get(name) for name in (before, source) if name in keys]
        if stage == "tune" and before is None:  # it has the policy of the checkpoint, which may be another one later
            depends.append(digest_of_start(recipe.get("start_from") or recipe.get("base_model")))
        text = json.dumps([stage, settings_of(stage, recipe), depends], sort_keys=True)
        keys[stage] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return {stage: folder / f"{stage}-{key}" for stage, key in keys.items()}


@cache
def digest_of_start(name: str | None) -> str:
    """Of the weights of a checkpoint, its policy's too; that of the embedded one without a name."""
    from tprl_hf.loading import load_model
    from tprl_hf.training.fingerprint import fingerprint

    return fingerprint(load_model(name, "cpu", dtype="float32")[0])


def minutes_left(runs: Iterable[Run], folder: Path) -> float:
    """How long it takes to train what is missing, by what stages of the same kind took here, or else by ours."""
    took: dict[str, list[float]] = {}
    for path in folder.glob("stages*/*/training.json"):
        took.setdefault(path.parent.name.rpartition("-")[0], []).append(seconds_of(path.parent) / 60)
    known = yaml.safe_load((FOLDER / f"{MINUTES}.yaml").read_text(encoding="utf-8"))
    missing = {run.directories[stage] for run in runs for stage in run.missing()}
    total = 0.0
    for path in missing:
        stage = path.name.rpartition("-")[0]
        total += sum(took[stage]) / len(took[stage]) if stage in took else known[stage]
    return total
