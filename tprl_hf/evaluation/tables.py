"""A comparison of pruners as rows, and the rows as text, Markdown, CSV and a plot."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .compare_pruners import Record, Setting
from .intervals import Estimate, bootstrap_mean
from .operation_counts import OperationCounts


@dataclass(frozen=True)
class Row:
    """
    What one setting came to.

    Args:
        pruner, budget (`str`): Those of the [`Setting`].
        mean_kept, min_kept, max_kept (`float`, `int`, `int`): Visual tokens a sample that the LLM saw.
        mean_visual (`float`): Visual tokens a sample that there were.
        accuracy ([`Estimate`]): Mean score over all samples, in [0, 1].
        difference ([`Estimate`]): Mean over the samples of the score minus the unpruned model's score on
            the same sample.
        by_type (`dict[str, Estimate]`): Mean score by question type.
        by_pruner_seed (`dict[str, float]`): Mean score by the pruner's seed, of methods that have one.
        by_data_seed (`dict[str, float]`): Mean score by the seed of the data.
        counted ([`OperationCounts`], *optional*): Operations for one question.
    """

    pruner: str
    budget: str
    mean_kept: float
    min_kept: int
    max_kept: int
    mean_visual: float
    accuracy: Estimate
    difference: Estimate
    by_type: dict[str, Estimate]
    by_pruner_seed: dict[str, float] = field(default_factory=dict)
    by_data_seed: dict[str, float] = field(default_factory=dict)
    counted: OperationCounts | None = None


def summarize(
    records: Sequence[Record],
    settings: Sequence[Setting],
    question_types: Sequence[str],
    units: Sequence[Any],
    confidence: float = 0.95,
    data_seeds: Sequence[int] | None = None,
    counted: Mapping[tuple[str, str], OperationCounts] | None = None,
) -> list[Row]:
    """
    One row a setting, in their order. Settings that differ by the pruner's seed alone are one row: a sample's score is
    then the mean over these seeds.

    Args:
        records (`Sequence[Record]`): All answers; the first setting's are the unpruned ones.
        settings (`Sequence[Setting]`): The settings.
        question_types (`Sequence[str]`): Of each sample.
        units (`Sequence`): The image of each sample, see [`bootstrap_mean`].
        confidence (`float`, *optional*, defaults to 0.95): Of all intervals.
        data_seeds (`Sequence[int]`, *optional*): The seed that each sample was drawn with.
        counted (`Mapping`, *optional*): Operations for one question, by pruner and budget.
    """
    by_setting: dict[tuple, dict[int, Record]] = {setting.key: {} for setting in settings}
    for record in records:
        if record.key in by_setting:
            by_setting[record.key][record.sample] = record
    samples = range(len(question_types))
    unpruned = [by_setting[settings[0].key][sample].score for sample in samples]
    rows: dict[tuple[str, str], Row] = {}
    for setting in settings:
        name = (setting.pruner, setting.budget)
        if name in rows:
            continue
        seeds = [other.seed for other in settings if (other.pruner, other.budget) == name]
        found = [[by_setting[(*name, seed)][sample] for sample in samples] for seed in seeds]
        scores = [fmean(record.score for record in records) for records in zip(*found, strict=True)]
        kept = [record.num_kept for records in found for record in records]
        rows[name] = Row(
            *name,
            mean_kept=fmean(kept),
            min_kept=min(kept),
            max_kept=max(kept),
            mean_visual=fmean(record.num_visual for record in found[0]),
            accuracy=bootstrap_mean(scores, units, confidence),
            difference=bootstrap_mean(
                [one - base for one, base in zip(scores, unpruned, strict=True)], units, confidence
            ),
            by_type=_by_type(scores, units, question_types, confidence),
            by_pruner_seed={
                str(seed): fmean(record.score for record in records)
                for seed, records in zip(seeds, found, strict=True)
                if seed is not None
            },
            by_data_seed={
                str(seed): fmean(score for score, of in zip(scores, data_seeds, strict=True) if of == seed)
                for seed in sorted(set(data_seeds))
            }
            if data_seeds is not None
            else {},
            counted=(counted or {}).get(name),
        )
    return list(rows.values())


def _by_type(
    scores: Sequence[float], units: Sequence[Any], question_types: Sequence[str], confidence: float
) -> dict[str, Estimate]:
    by_type = {}
    for question_type in sorted(set(question_types)):
        where = [sample for sample, own in enumerate(question_types) if own == question_type]
        by_type[question_type] = bootstrap_mean(
            [scores[sample] for sample in where], [units[sample] for sample in where], confidence
        )
    return by_type


def accuracy_table(rows: Sequence[Row]) -> list[list[str]]:
    """Header and rows of the main table, as texts. Spreads over seeds have a column where there are several."""
    header = ["pruner", "keep", "tokens kept (min-max)", "accuracy %", "vs. unpruned (pp)", "relative to unpruned (%)"]
    has_counts = all(row.counted for row in rows)
    spreads = {
        "sd, pruner seeds": [row.by_pruner_seed for row in rows],
        "sd, data seeds": [row.by_data_seed for row in rows],
    }
    several = {title: column for title, column in spreads.items() if any(len(by_seed) > 1 for by_seed in column)}
    table = [[*header, *several, *(["pruner M", "prefill M"] if has_counts else [])]]
    for number, row in enumerate(rows):
        kept = f"{row.mean_kept:.1f} of {row.mean_visual:.1f} ({row.min_kept}-{row.max_kept})"
        base = rows[0].accuracy.value
        relative = f"{100 * row.accuracy.value / base:.1f}" if base else "-"
        is_base = row is rows[0]
        difference = "-" if is_base else percent(row.difference, signed=True)
        cells = [row.pruner, row.budget, kept, percent(row.accuracy), difference, relative]
        cells += [spread(column[number]) for column in several.values()]
        if row.counted and has_counts:
            cells += [f"{part / 1e6:.4g}" for part in (row.counted.pruner, row.counted.prefill)]
        table.append(cells)
    return table


def spread(by_seed: Mapping[str, float]) -> str:
    """
    Standard deviation over seeds, in percentage points.

    Example:

    ```python
    >>> spread({"7": 0.5, "8": 0.52, "9": 0.54}), spread({"7": 0.5})
    ('2.0 (3)', '-')
    ```
    """
    return f"{100 * stdev(by_seed.values()):.1f} ({len(by_seed)})" if len(by_seed) > 1 else "-"


def type_table(rows: Sequence[Row]) -> list[list[str]]:
    """Header and rows of the accuracies by question type, as texts."""
    header = ["pruner", "keep", *(f"{name} ({one.count})" for name, one in rows[0].by_type.items())]
    return [header, *([row.pruner, row.budget, *map(percent, row.by_type.values())] for row in rows)]


def percent(estimate: Estimate, signed: bool = False) -> str:
    """
    Example:

    ```python
    >>> percent(Estimate(0.5, 0.425, 0.5761, 200))
    '50.0 [42.5, 57.6]'
    ```
    """
    sign = "+" if signed else ""
    return f"{100 * estimate.value:{sign}.1f} [{100 * estimate.low:{sign}.1f}, {100 * estimate.high:{sign}.1f}]"


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    """A GitHub table."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:], ""])


def as_csv(rows: Sequence[Row]) -> str:
    """One line a setting and question type ("all" for all of them), with plain numbers in [0, 1]."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        "pruner,keep,mean_kept,min_kept,max_kept,mean_visual,question_type,count,accuracy,low,high,"
        "difference,difference_low,difference_high,sd_pruner_seeds,sd_data_seeds,pruner_flops,prefill_flops".split(",")
    )
    for row in rows:
        head = [row.pruner, row.budget, row.mean_kept, row.min_kept, row.max_kept, row.mean_visual]
        for name, one in {"all": row.accuracy, **row.by_type}.items():
            more: list[Any] = [""] * 7
            if name == "all":
                seeds = [stdev(by.values()) if len(by) > 1 else "" for by in (row.by_pruner_seed, row.by_data_seed)]
                counts = [row.counted.pruner, row.counted.prefill] if row.counted else ["", ""]
                more = [row.difference.value, row.difference.low, row.difference.high, *seeds, *counts]
            writer.writerow([*head, name, one.count, one.value, one.low, one.high, *more])
    return buffer.getvalue()


def plot_accuracy(rows: Sequence[Row], path: str | Path, title: str) -> None:
    """
    Draws accuracy against tokens kept, one line a pruner, with intervals; the unpruned model is a dashed line.

    Args:
        rows (`Sequence[Row]`): The rows; the first is the unpruned one.
        path (`str` or `Path`): The PNG file to write.
        title (`str`): The line above.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    base, *others = rows
    axes.axhspan(100 * base.accuracy.low, 100 * base.accuracy.high, color="0.9", zorder=0)
    axes.axhline(100 * base.accuracy.value, color="0.4", linestyle="--", linewidth=1, label="none (unpruned)")
    names = list(dict.fromkeys(row.pruner for row in others))
    markers = "osD^vPX*<>ph"
    for number, name in enumerate(names):
        points = sorted((row for row in others if row.pruner == name), key=lambda row: row.mean_kept)
        heights = [100 * row.accuracy.value for row in points]
        below = [100 * (row.accuracy.value - row.accuracy.low) for row in points]
        above = [100 * (row.accuracy.high - row.accuracy.value) for row in points]
        # side by side, as many pruners keep the same number of tokens
        shift = (number / max(len(names) - 1, 1) - 0.5) * 0.02 * base.mean_visual
        axes.errorbar(
            [row.mean_kept + shift for row in points],
            heights,
            yerr=[below, above],
            label=name,
            color="black" if name == "learned" else colormaps["tab20"](number * 2 % 20 + number * 2 // 20),
            marker=markers[number % len(markers)],
            markersize=5,
            linewidth=2 if name == "learned" else 1.2,
            linestyle=":" if name == "random" else "-",
            elinewidth=0.8,
            capsize=2,
        )
    axes.set_xlabel(f"visual tokens kept (of {base.mean_visual:.0f}; equal numbers drawn side by side)")
    axes.set_ylabel("accuracy %")
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize=10)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path)
