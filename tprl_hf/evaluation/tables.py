"""A comparison of pruners as rows, and the rows as text, Markdown, CSV and a plot."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compare_pruners import Record, Setting
from .intervals import Estimate, bootstrap_mean


@dataclass(frozen=True)
class Row:
    """
    What one setting came to.

    Args:
        pruner, budget (`str`): Those of the [`Setting`].
        mean_kept, min_kept, max_kept (`float`, `int`, `int`): Visual tokens a sample that the LLM saw.
        mean_visual (`float`): Visual tokens a sample that there were.
        accuracy ([`Estimate`]): Mean score over all samples, in [0, 1].
        difference ([`Estimate`]): Mean over the samples of the score less the unpruned model's on the same sample.
        by_type (`dict[str, Estimate]`): Mean score by question type.
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


def summarize(
    records: Sequence[Record],
    settings: Sequence[Setting],
    question_types: Sequence[str],
    units: Sequence[Any],
    confidence: float = 0.95,
) -> list[Row]:
    """
    One row a setting, in their order.

    Args:
        records (`Sequence[Record]`): All answers; the first setting's are the unpruned ones.
        settings (`Sequence[Setting]`): The settings.
        question_types (`Sequence[str]`): Of each sample.
        units (`Sequence`): The image of each sample, see [`bootstrap_mean`].
        confidence (`float`, *optional*, defaults to 0.95): Of all intervals.
    """
    by_setting: dict[tuple[str, str], dict[int, Record]] = {setting.key: {} for setting in settings}
    for record in records:
        if (record.pruner, record.budget) in by_setting:
            by_setting[record.pruner, record.budget][record.sample] = record
    samples = range(len(question_types))
    unpruned = [by_setting[settings[0].key][sample].score for sample in samples]
    types = sorted(set(question_types))
    rows = []
    for setting in settings:
        found = [by_setting[setting.key][sample] for sample in samples]
        scores = [record.score for record in found]
        kept = [record.num_kept for record in found]
        by_type = {}
        for question_type in types:
            where = [sample for sample in samples if question_types[sample] == question_type]
            by_type[question_type] = bootstrap_mean(
                [scores[sample] for sample in where], [units[sample] for sample in where], confidence
            )
        differences = [one - base for one, base in zip(scores, unpruned, strict=True)]
        rows.append(
            Row(
                *setting.key,
                mean_kept=sum(kept) / len(kept),
                min_kept=min(kept),
                max_kept=max(kept),
                mean_visual=sum(record.num_visual for record in found) / len(found),
                accuracy=bootstrap_mean(scores, units, confidence),
                difference=bootstrap_mean(differences, units, confidence),
                by_type=by_type,
            )
        )
    return rows


def accuracy_table(rows: Sequence[Row]) -> list[list[str]]:
    """Header and rows of the main table, as texts."""
    table = [["pruner", "keep", "tokens kept (min-max)", "accuracy %", "less unpruned", "of unpruned %"]]
    for row in rows:
        kept = f"{row.mean_kept:.1f} of {row.mean_visual:.1f} ({row.min_kept}-{row.max_kept})"
        base = rows[0].accuracy.value
        relative = f"{100 * row.accuracy.value / base:.1f}" if base else "-"
        is_base = row is rows[0]
        difference = "-" if is_base else percent(row.difference, signed=True)
        table.append([row.pruner, row.budget, kept, percent(row.accuracy), difference, relative])
    return table


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
        "difference,difference_low,difference_high".split(",")
    )
    for row in rows:
        head = [row.pruner, row.budget, row.mean_kept, row.min_kept, row.max_kept, row.mean_visual]
        for name, one in {"all": row.accuracy, **row.by_type}.items():
            difference = [row.difference.value, row.difference.low, row.difference.high] if name == "all" else [""] * 3
            writer.writerow([*head, name, one.count, one.value, one.low, one.high, *difference])
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
