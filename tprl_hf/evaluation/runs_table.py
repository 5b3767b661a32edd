"""Several evaluations as one table: pruners and budgets against tasks, in percent of the unpruned model."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from tprl_hf.intervals import Estimate
from tprl_hf.json_files import COUNT, read_json
from tprl_hf.pruners import PRUNERS
from tprl_hf.pruners.by_name import split_settings
from tprl_hf.pruners.llm_attention import LLMAttentionPruner

from .compare_pruners import Record, parse_lines

# What `tprl evaluate` notes of its questions beside `answers.jsonl`.
QUESTIONS = "questions.json"
ASKED = {"data": str, "split": (str, None), "units": [str], "llm_layers": COUNT}
NUM_RESAMPLES = 2000
Name = tuple[str, str]  # of a row: pruner and budget


@dataclass(frozen=True)
class Run:
    """
    The answers of one evaluation.

    Args:
        folder (`Path`): Where it lies.
        task (`str`): Name of the data.
        questions (`str`): Digest of the questions; runs with the same one asked the same.
        units (`list[str]`): The image of each question.
        num_layers (`int`): Layers of the LLM.
        scores (`dict`): By row, for each seed of the pruner, the score of each question, float `[S, N]`.
        kept (`dict`): By row, mean number of tokens that the LLM saw.
        num_visual (`float`): Mean number of visual tokens that there were.
        unfinished (`dict`): By row, how many answers are missing; such rows have no scores.
        data (`str`): The data as its command named them, such as the path of a file.
    """

    folder: Path
    task: str
    questions: str
    units: list[str]
    num_layers: int
    scores: dict[Name, np.ndarray]
    kept: dict[Name, float]
    num_visual: float
    unfinished: dict[Name, int]
    data: str

    @property
    def unpruned(self) -> float:
        """Mean score of the unpruned model."""
        return float(self.scores["none", "1"].mean())


@dataclass(frozen=True)
class Cell:
    """
    A row on a task.

    Args:
        percent ([`Estimate`]): Of the unpruned model's mean score, in percent, with a paired interval over images.
        accuracy (`float`): Mean score.
        by_replicate (`list[float]`): The same percentage for each run and each seed of the pruner.
        resampled (`np.ndarray`): The percentage in each resample.
    """

    percent: Estimate
    accuracy: float
    by_replicate: list[float]
    resampled: np.ndarray


@dataclass(frozen=True)
class Line:
    """
    One row of the table.

    Args:
        pruner, budget (`str`): Its names.
        first_layer, mean_layers (`float`, *optional*): Visual tokens that enter the LLM's first layer, and the mean
            over its layers; not of a pruner within the LLM that reads a smaller picture, whose tokens nobody noted.
        cells (`dict[str, Cell]`): By task; where the row is not finished there is none.
        mean ([`Estimate`], *optional*): Mean of the percentages, if there is one of every task.
    """

    pruner: str
    budget: str
    first_layer: float | None
    mean_layers: float | None
    cells: dict[str, Cell]
    mean: Estimate | None


def read_run(folder: Path) -> Run:
    """
    An evaluation's directory, finished or not.

    Raises:
        `ValueError`: If it is none, or was written by a version that noted less.
    """
    if not (folder / "run.json").exists():
        raise ValueError(f"{folder} has no run.json: pass directories that `tprl evaluate --output-dir` wrote.")
    if not (folder / QUESTIONS).exists():
        raise ValueError(
            f"{folder} has no {QUESTIONS}: run its command once more with the same --output-dir, which keeps the "
            "answers."
        )
    cure = f"run its command once more with --output-dir {folder}, which keeps the answers."
    asked = read_json(folder / QUESTIONS, ASKED, cure)
    cure = "whose answers these are is not known; run its command once more, and pass another --output-dir."
    described = read_json(folder / "run.json", {"questions": str, "num_samples": COUNT}, cure)
    num_samples = described["num_samples"]
    if len(asked["units"]) != num_samples:
        raise ValueError(
            f"{folder / QUESTIONS} has {len(asked['units'])} units and not {num_samples}: leave {folder} out."
        )
    seeds = seeds_in(folder / "results.json", cure)
    found: dict[Name, dict[int | None, dict[int, Record]]] = {}
    for _, record in parse_lines(folder / "answers.jsonl")[0]:  # its command may still be running
        if str(record.seed) not in seeds.get((record.pruner, record.budget), [str(record.seed)]):
            continue  # of an earlier command with more seeds
        by_seed = found.setdefault((record.pruner, record.budget), {})
        if record.sample < num_samples:
            by_seed.setdefault(record.seed, {})[record.sample] = record
    missing = {name: sum(num_samples - len(one) for one in by_seed.values()) for name, by_seed in found.items()}
    whole = {name: by_seed for name, by_seed in found.items() if not missing[name]}
    if ("none", "1") not in whole:
        raise ValueError(
            f"{folder} has no unpruned answers to all questions yet: let its command finish, or run it again."
        )
    records = {
        name: [one[n] for one in by_seed.values() for n in range(num_samples)] for name, by_seed in whole.items()
    }
    data = Path(asked["data"]).stem
    return Run(
        folder,
        data if asked["split"] in ("test", None) else f"{data} {asked['split']}",
        described["questions"],
        asked["units"],
        asked["llm_layers"],
        {name: np.array([r.score for r in own]).reshape(-1, num_samples) for name, own in records.items()},
        {name: fmean(record.num_kept for record in own) for name, own in records.items()},
        fmean(record.num_visual for record in records["none", "1"]),
        {name: number for name, number in missing.items() if number},
        asked["data"],
    )


def seeds_in(path: Path, cure: str) -> dict[Name, list[str]]:
    """The seeds of the rows of `results.json` that have some."""
    if not path.exists():
        return {}
    rows = read_json(path, {"rows": [{"pruner": str, "budget": str}]}, cure)["rows"]
    return {(row["pruner"], row["budget"]): [*row["by_pruner_seed"]] for row in rows if row.get("by_pruner_seed")}


def by_task(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by their task. Files of one name with other questions are tasks of their own, called by their paths."""
    tasks: dict[str, list[Run]] = {}
    for run in runs:
        tasks.setdefault(run.task, []).append(run)
    found: dict[str, list[Run]] = {}
    for task, own in tasks.items():
        paths: dict[str, str] = {}  # of the same questions one, as a file may move
        for run in own:
            paths.setdefault(run.questions, run.data)
        is_one = len(set(paths.values())) == 1
        for run in own:
            found.setdefault(task if is_one else paths[run.questions], []).append(run)
    return found


def join_runs(runs: Sequence[Run], confidence: float = 0.95) -> list[Line]:
    """
    One line for each pruner and budget of the runs, the unpruned model first and then by budget.

    Runs of one task are replicates, such as policies trained under several seeds: percentages are of all their answers
    together. The resamples of a task draw images, the same ones for all rows, so that intervals are paired.

    Args:
        runs (`Sequence[Run]`): The evaluations.
        confidence (`float`, *optional*, defaults to 0.95): Of the intervals.
    """
    tasks = by_task(runs)
    names = list(dict.fromkeys(name for run in runs for name in run.scores))
    kept = {name: fmean(run.kept[name] for run in runs if name in run.scores) for name in names}
    budgets = sorted({budget for _, budget in names}, key=lambda budget: -share_of(budget))
    names.sort(key=lambda name: budgets.index(name[1]))  # stable: pruners stay in their order
    cells = {task: cells_of(task, own, names, confidence) for task, own in tasks.items()}
    lines = []
    for name in names:
        own = {task: by_name[name] for task, by_name in cells.items() if name in by_name}
        mean = None
        if len(own) == len(tasks):
            resampled = np.mean([cell.resampled for cell in own.values()], axis=0)
            mean = estimate(fmean(cell.percent.value for cell in own.values()), resampled, confidence, len(own))
        early = early_layers(name[0])
        visual = fmean(run.num_visual for run in runs if name in run.scores)
        passes = fmean(early * run.num_visual / run.num_layers for run in runs if name in run.scores)
        first: float | None = visual if early else kept[name]
        whole: float | None = kept[name] + passes
        if early and name[0].startswith("resize+"):
            first = whole = None
        lines.append(Line(*name, first, whole, own, mean))
    return lines


def first_places(run: Run) -> list[int]:
    """Of each question, the number of the first one about the same image."""
    first: dict[str, int] = {}
    return [first.setdefault(unit, number) for number, unit in enumerate(run.units)]


def cells_of(task: str, runs: Sequence[Run], names: Sequence[Name], confidence: float) -> dict[Name, Cell]:
    """The cells of a task's column."""
    units: dict[tuple[str, int], int] = {}
    # the questions of a digest have one order, and the names of their images may be paths, typed differently
    places = [[units.setdefault((run.questions, place), len(units)) for place in first_places(run)] for run in runs]
    generator = np.random.default_rng(zlib.crc32(task.encode()))
    drawn = generator.multinomial(len(units), np.full(len(units), 1 / len(units)), size=NUM_RESAMPLES)
    cells = {}
    for name in names:
        having = [(run, place) for run, place in zip(runs, places, strict=True) if name in run.scores]
        if not having:
            continue
        own, base = np.zeros(len(units)), np.zeros(len(units))
        by_replicate = []
        for run, place in having:
            unpruned = run.scores["none", "1"].mean(0)
            own += np.bincount(place, run.scores[name].mean(0), len(units))
            base += np.bincount(place, unpruned, len(units))
            by_replicate += [100 * float(scores.mean() / unpruned.mean()) for scores in run.scores[name]]
        if not base.sum():
            raise ValueError(f"{task}: the unpruned model has no correct answer, so there is nothing to compare with.")
        # a resample without any correct answer says nothing
        resampled = 100 * (drawn @ own) / np.maximum(drawn @ base, 1e-9)
        count = sum(len(run.units) for run, _ in having)
        percent = estimate(100 * float(own.sum() / base.sum()), resampled, confidence, count)
        accuracy = fmean(float(run.scores[name].mean()) for run, _ in having)
        cells[name] = Cell(percent, accuracy, by_replicate, resampled)
    return cells


def estimate(value: float, resampled: np.ndarray, confidence: float, count: int) -> Estimate:
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high), count)


def share_of(budget: str) -> float:
    """A budget as a number: "1/3", "0.25" or "1"."""
    over, _, under = budget.partition("/")
    return float(over) / float(under or 1)


def early_layers(pruner: str) -> int:
    """How many layers of the LLM a pruner runs on all visual tokens before it chooses."""
    name, settings = split_settings(pruner.removeprefix("resize+").rstrip("*"))
    made = PRUNERS[name](**settings) if name in PRUNERS else None
    return made.layer if isinstance(made, LLMAttentionPruner) else 0


def as_texts(lines: Sequence[Line]) -> list[list[str]]:
    """Header and rows."""
    tasks = list(dict.fromkeys(task for line in lines for task in line.cells))
    table = [["pruner", "keep", "tokens, first layer", "mean of layers", *tasks, "mean"]]
    for line in lines:
        read = ["-" if one is None else f"{one:.1f}" for one in (line.first_layer, line.mean_layers)]
        row = [line.pruner, line.budget, *read]
        for task in tasks:
            cell = line.cells.get(task)
            if cell is None:
                row.append("-")
            elif line.pruner == "none":
                row.append(f"100 ({100 * cell.accuracy:.1f})")
            else:
                several = f" ± {stdev(cell.by_replicate):.1f}" if len(cell.by_replicate) > 1 else ""
                row.append(f"{cell.percent.value:.1f}{several} {bracketed(cell.percent)}")
        whole = "-" if line.mean is None else f"{line.mean.value:.1f} {bracketed(line.mean)}"
        table.append([*row, "100" if line.pruner == "none" else whole])
    return table


def bracketed(one: Estimate) -> str:
    return f"[{one.low:.1f}, {one.high:.1f}]"


def as_latex(table: Sequence[Sequence[str]]) -> str:
    """A `tabular` with the rules of the package booktabs, a thin one between budgets."""
    special = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$", "*": r"$^{*}$"}

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(special.get(letter, letter) for letter in cell) for cell in cells) + r" \\"

    rows = [rf"\begin{{tabular}}{{ll{'r' * (len(table[0]) - 2)}}}", r"\toprule", line(table[0]), r"\midrule"]
    for number, row in enumerate(table[1:], start=1):
        if number > 1 and row[1] != table[number - 1][1]:
            rows.append(r"\midrule")
        rows.append(line(row))
    return "\n".join([*rows, r"\bottomrule", r"\end{tabular}", ""])


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The numbers of the table."""

    def plain(one: Estimate | None) -> Mapping[str, float] | None:
        return None if one is None else vars(one)

    return [
        {
            **{name: getattr(line, name) for name in ("pruner", "budget", "first_layer", "mean_layers")},
            "percent": {task: plain(cell.percent) for task, cell in line.cells.items()},
            "accuracy": {task: cell.accuracy for task, cell in line.cells.items()},
            "by_replicate": {task: cell.by_replicate for task, cell in line.cells.items()},
            "mean": plain(line.mean),
        }
        for line in lines
    ]
