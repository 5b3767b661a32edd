"""A directory of `tprl train`, or of one trainer, as it is: finished, running, or cut off in the middle."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tprl_hf.json_files import Shape, misfit

from .shown import SAMPLE_SHAPE, ShownSample, fits

NUMBERS = ("accuracy", "logprob", "agreement", "kl", "reward", "explained_variance")
ROW = {
    **dict.fromkeys(("?step", "?llm_passes"), int),
    "?time": float,
    **dict.fromkeys([f"?eval_{name}" for name in NUMBERS], float),
}
LOG_ROW = {**ROW, "?start": {"time": float, "?step": int, "?max_steps": (int, None), "?settings": {}, "?versions": {}}}
MASKS_ROW = {"step": int, "keep_ratios": [float], "masks": [[str]], "?kept_by_type": [{...: [float]}]}
STATE = {"?global_step": int, "?max_steps": (int, None), "?log_history": [ROW]}
DONE = {
    "?stage": str,
    "?seconds": float,
    "?metrics": {...: float},
    "?best_step": (int, None),
    "?log_history": [ROW],
}
LOG, SHOWN, MASKS = "log.jsonl", "watched.json", "watched_masks.jsonl"
NOT_FACTS = (
    "stage",
    "begun_from",
    "seconds",
    "ended",
    "metrics",
    "best_step",
    "log_history",
)  # of training.json: they have fields of their own


@dataclass(frozen=True)
class StageRun:
    """
    One stage.

    Args:
        name (`str`): Its name in recipes, or that of its directory.
        folder (`Path`): Where it lies.
        is_finished (`bool`): Whether it wrote its end.
        history (`list[dict]`): Rows of the log, in their order.
        settings (`dict`): What it was told.
        starts (`list[dict]`): For each time it was started: when, at which step, with which versions, on what.
        metrics (`dict`): What was measured at the end.
        facts (`dict`): What else its end says, such as the teacher of demonstrations.
        best_step (`int`, *optional*): Whose weights it ended with.
        max_steps (`int`, *optional*): Where it ends.
        seconds (`float`, *optional*): How long it has run, all starts together where they are known.
        num_bytes (`dict[str, int]`): On the disk: of checkpoints, and of all else.
        samples (`list[ShownSample]`): The pictures that are watched.
        masks (`list[dict]`): Their keep masks, each time that the policy was measured.
    """

    name: str
    folder: Path
    is_finished: bool
    history: list[dict[str, Any]]
    settings: dict[str, Any]
    starts: list[dict[str, Any]]
    metrics: dict[str, float]
    facts: dict[str, Any]
    best_step: int | None
    max_steps: int | None
    seconds: float | None
    num_bytes: dict[str, int]
    samples: list[ShownSample]
    masks: list[dict[str, Any]]

    @property
    def step(self) -> int | None:
        """The last step that the log has."""
        return max((row["step"] for row in self.history if "step" in row), default=None)

    def state(self, now: float | None = None) -> str:
        """Whether it is finished, or how far it came and how long ago."""
        if self.is_finished:
            return "finished" + ("" if self.best_step is None else f", best at step {self.best_step}")
        if self.step is None:
            return "begun"
        of = f" of {self.max_steps}" if self.max_steps else ""
        last = max((row["time"] for row in self.history if "time" in row), default=None)
        ago = "" if last is None else f", last log {duration((time.time() if now is None else now) - last)} ago"
        return f"not finished: step {self.step}{of}{ago}"


@dataclass(frozen=True)
class TrainingRun:
    """
    A directory of stages.

    Args:
        name (`str`): For titles.
        folder (`Path`): Where it lies.
        stages (`list[StageRun]`): In the order in which they were begun.
    """

    name: str
    folder: Path
    stages: list[StageRun]

    def stage(self, name: str) -> StageRun | None:
        return next((stage for stage in self.stages if stage.name == name), None)


def is_stage(folder: Path) -> bool:
    """Whether a trainer or a stage of `tprl train` wrote in this directory."""
    return any((folder / name).exists() for name in ("settings.json", "training.json", LOG)) or bool(
        list(folder.glob("checkpoint-*/trainer_state.json"))
    )


def read_training(folder: Path) -> TrainingRun:
    """
    All that is known of a run.

    Args:
        folder (`Path`): The `output_dir` of a recipe, or the directory of one stage or trainer.

    Raises:
        `ValueError`: If no training wrote there.
    """
    if is_stage(folder):
        folders = [folder]
    else:
        folders = [path for path in folder.iterdir() if path.is_dir() and is_stage(path)] if folder.is_dir() else []
        folders.sort(key=lambda path: (begun(path), path.name))
    if not folders:
        raise ValueError(
            f"{folder} holds no training: pass the output_dir of a recipe, of a stage, or of `tprl evaluate`."
        )
    return TrainingRun(folder.resolve().name, folder, [read_stage(path) for path in folders])


def begun(folder: Path) -> float:
    """When a stage was begun, as far as its files say: settings are written first, and renewed at each start."""
    starts = [row["start"]["time"] for row in json_lines(folder / LOG, LOG_ROW) if "start" in row]
    if starts:
        return float(starts[0])
    first = next((name for name in ("data.json", "settings.json", "training.json") if (folder / name).exists()), None)
    return (folder if first is None else folder / first).stat().st_mtime


def read_stage(folder: Path) -> StageRun:
    """One stage; see [`read_training`]."""
    done = checked_object(folder / "training.json", DONE)
    # by the name of a link: those of `tprl reproduce` lead to directories of other names
    name = done.get("stage", Path(os.path.abspath(folder)).name)
    lines = json_lines(folder / LOG, LOG_ROW)
    starts, rows = [row["start"] for row in lines if "start" in row], [row for row in lines if "start" not in row]
    state = newest_state(folder)
    if not rows:
        rows = done.get("log_history") or state.get("log_history", [])
    settings = checked_object(folder / "settings.json", {})
    own = settings.get(name) if isinstance(settings.get(name), dict) else None
    if not settings and starts:
        own = starts[-1].get("settings", {})
    rest = {key: value for key, value in settings.items() if key != name}
    seconds = done.get("seconds")
    if starts:
        seconds = sum(last - first for first, last in sessions(lines))
    samples = samples_in(folder / SHOWN)
    max_steps = starts[-1].get("max_steps") if starts else state.get("max_steps")
    return StageRun(
        name=name,
        folder=folder,
        # a stage of a recipe says so itself, a trainer of its own ends its log with its time
        is_finished=bool(done) or (not settings and any("train_runtime" in row for row in rows)),
        history=rows,
        settings={**(own or {}), **rest},
        starts=starts,
        metrics=done.get("metrics", {}),
        facts={key: value for key, value in done.items() if key not in NOT_FACTS},
        best_step=done.get("best_step"),
        max_steps=max_steps,
        seconds=seconds,
        num_bytes=disk_of(folder),
        samples=samples,
        # measured again at the end, they are of the weights that were best
        masks=list({line["step"]: line for line in reversed(masks_in(folder / MASKS, samples))}.values())[::-1],
    )


def sessions(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Of each start, when it was and when it last said something."""
    found: list[tuple[float, float]] = []
    for line in lines:
        if "start" in line:
            found.append((line["start"]["time"], line["start"]["time"]))
        elif found and "time" in line:
            found[-1] = (found[-1][0], max(found[-1][1], line["time"]))
    return found


def newest_state(folder: Path) -> dict[str, Any]:
    """What transformers noted in the newest checkpoint that can be read."""
    found = [json_object(path) for path in folder.glob("checkpoint-*/trainer_state.json")]
    found = [state for state in found if misfit(state, STATE) is None]
    return max(found, key=lambda state: state.get("global_step", -1), default={})


def disk_of(folder: Path) -> dict[str, int]:
    """Bytes by what they are; files that a run deletes at the same time do not count."""
    found = {"checkpoints": 0, "else": 0}
    for inside, _, names in os.walk(folder):  # rglob ends with an error where a directory is deleted meanwhile
        for name in names:
            path = Path(inside, name)
            try:
                size = path.lstat().st_size
            except FileNotFoundError:
                continue
            part = path.relative_to(folder).parts[0]
            found["checkpoints" if part.startswith("checkpoint-") else "else"] += size
    return found


def samples_in(path: Path) -> list[ShownSample]:
    """The pictures that are watched; none where there is no such file. Raises `ValueError` for a damaged one."""
    found = checked_object(path, {"?samples": [SAMPLE_SHAPE]}).get("samples", [])
    if not all(map(fits, found)):
        raise ValueError(f"{path} is damaged (its parts do not fit each other): delete it, or {path.parent}.")
    return [ShownSample.from_json(one) for one in found]


def masks_in(path: Path, samples: Sequence[ShownSample]) -> list[dict[str, Any]]:
    """The lines of a file of keep masks that fit the pictures which are watched; others are not whole."""
    counts = [sample.num_visual for sample in samples]
    found = []
    for line in json_lines(path, MASKS_ROW):
        budgets = len(line["keep_ratios"])
        boxes = [box for by_type in line.get("kept_by_type", []) for box in by_type.values()]
        masks = [[len(bits) for bits in of_sample] for of_sample in line["masks"]]
        if masks != [[count] * budgets for count in counts] or any(len(box) != 5 for box in boxes):
            continue
        if len(line.get("kept_by_type", [])) in (0, budgets) and budgets:
            found.append(line)
    return found


def checked_object(path: Path, shape: Shape) -> dict[str, Any]:
    """As [`json_object`], for a file whose shape is known. Raises `ValueError` for one that holds something else."""
    found = json_object(path)
    reason = misfit(found, shape) if found else None
    if reason is not None:
        raise ValueError(f"{path} is damaged ({reason}): delete it, or {path.parent} to run this stage again.")
    return found


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; empty where there is none, or it is half written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def json_lines(path: Path, shape: Shape = None) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; a line that is not whole, as while it is written, or of another shape is left
    out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and (shape is None or misfit(row, shape) is None):
            found.append(row)
    return found


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Names that tell directories apart: with folders above them where the last ones are alike."""
    for depth in range(1, 10):
        names = ["/".join(folder.resolve().parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{folder.resolve().name} ({number})" for number, folder in enumerate(folders, start=1)]


def flattened(settings: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Settings of sections as `section.name`, values as text."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def duration(seconds: float) -> str:
    """
    Example:

    ```python
    >>> duration(42), duration(600), duration(9000)
    ('42 s', '10 min', '2.5 h')
    ```
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
