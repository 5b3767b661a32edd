"""A comparison of pruners as rows, and the rows as text, Markdown, CSV and a plot."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tprl_hf.intervals import Estimate, bootstrap_mean
from tprl_hf.style import PALETTE, colour_of, name_of_type, repeats_colour

from .benchmark import Spread
from .compare_pruners import Record, Setting
from .confidence import Confidence, confidence_of
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
        milliseconds ([`~tprl_hf.evaluation.benchmark.Spread`], *optional*): From pixels to the first new token, for
            one question.
        group_a ([`Estimate`], *optional*): Mean score over the questions that are correct at full size and wrong when
            the picture is shrunk to the same budget; there where the comparison has the row `resize` of this budget.
        confidence ([`Confidence`], *optional*): What the probabilities of the answers are worth.
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
    milliseconds: Spread | None = None
    group_a: Estimate | None = None
    confidence: Confidence | None = None


def summarize(
    records: Sequence[Record],
    settings: Sequence[Setting],
    question_types: Sequence[str],
    units: Sequence[Any],
    confidence: float = 0.95,
    data_seeds: Sequence[int] | None = None,
    counted: Mapping[tuple[str, str], OperationCounts] | None = None,
    milliseconds: Mapping[tuple[str, str], Spread] | None = None,
    references: Sequence[Any] | None = None,
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
        counted, milliseconds (`Mapping`, *optional*): Operations and time for one question, by pruner and budget.
        references (`Sequence`, *optional*): The reference, or references, of each sample, for the confidences.
    """
    by_setting: dict[tuple, dict[int, Record]] = {setting.key: {} for setting in settings}
    for record in records:
        if record.key in by_setting:
            by_setting[record.key][record.sample] = record
    samples = range(len(question_types))
    unpruned = [by_setting[settings[0].key][sample].score for sample in samples]
    rows: dict[tuple[str, str], Row] = {}
    hard = {
        setting.budget: [n for n in samples if unpruned[n] >= 0.5 and by_setting[setting.key][n].score < 0.5]
        for setting in settings
        if setting.pruner == "resize"
    }
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
            milliseconds=(milliseconds or {}).get(name),
            group_a=bootstrap_mean([scores[n] for n in group], [units[n] for n in group], confidence)
            if (group := hard.get(setting.budget))
            else None,
            confidence=None
            if references is None
            else confidence_of([record for records in found for record in records], question_types, references),
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
    has_counts, has_times = all(row.counted for row in rows), all(row.milliseconds for row in rows)
    has_group = any(row.group_a for row in rows)
    spreads = {
        "sd, pruner seeds": [row.by_pruner_seed for row in rows],
        "sd, data seeds": [row.by_data_seed for row in rows],
    }
    several = {title: column for title, column in spreads.items() if any(len(by_seed) > 1 for by_seed in column)}
    costs = [*(["tower M", "pruner M", "prefill M"] if has_counts else []), *(["ms"] if has_times else [])]
    table = [[*header, *(["group A %"] if has_group else []), *several, *costs]]
    for number, row in enumerate(rows):
        kept = f"{row.mean_kept:.1f} of {row.mean_visual:.1f} ({row.min_kept}-{row.max_kept})"
        base = rows[0].accuracy.value
        relative = f"{100 * row.accuracy.value / base:.1f}" if base else "-"
        is_base = row is rows[0]
        difference = "-" if is_base else percent(row.difference, signed=True)
        cells = [row.pruner, row.budget, kept, percent(row.accuracy), difference, relative]
        if has_group:
            cells.append(f"{percent(row.group_a)} ({row.group_a.count})" if row.group_a else "-")
        cells += [spread(column[number]) for column in several.values()]
        if row.counted and has_counts:
            cells += [f"{part / 1e6:.4g}" for part in (row.counted.tower, row.counted.pruner, row.counted.prefill)]
        if row.milliseconds and has_times:
            one = row.milliseconds
            cells.append(f"{one.median:.1f} ({one.low:.1f} to {one.high:.1f})")
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
    header = [
        "pruner",
        "keep",
        *(f"{name_of_type(name, rows[0].by_type)} ({one.count})" for name, one in rows[0].by_type.items()),
    ]
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
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:], ""])


def as_csv(rows: Sequence[Row]) -> str:
    """One line a setting and question type ("all" for all of them), with plain numbers in [0, 1]."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        "pruner,keep,mean_kept,min_kept,max_kept,mean_visual,question_type,count,accuracy,low,high,"
        "difference,difference_low,difference_high,sd_pruner_seeds,sd_data_seeds,tower_flops,pruner_flops,"
        "prefill_flops,milliseconds,group_a".split(",")
    )
    for row in rows:
        head = [row.pruner, row.budget, row.mean_kept, row.min_kept, row.max_kept, row.mean_visual]
        types = [] if row.by_type.keys() == {"all"} else row.by_type.items()
        for name, one in (("all", row.accuracy), *((name_of_type(name, row.by_type), one) for name, one in types)):
            more: list[Any] = [""] * 10
            if one is row.accuracy:
                seeds = [stdev(by.values()) if len(by) > 1 else "" for by in (row.by_pruner_seed, row.by_data_seed)]
                counts: list[Any] = [""] * 3
                if row.counted:
                    counts = [row.counted.tower, row.counted.pruner, row.counted.prefill]
                rest = [row.milliseconds.median if row.milliseconds else "", row.group_a.value if row.group_a else ""]
                more = [row.difference.value, row.difference.low, row.difference.high, *seeds, *counts, *rest]
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
    from matplotlib.figure import Figure

    base = rows[0]
    has_times = all(row.milliseconds for row in rows)
    figure = Figure(figsize=(14 if has_times else 8, 5), dpi=150, layout="constrained")
    axes = figure.subplots(1, 1 + has_times, squeeze=False)[0]
    draw_accuracy(axes[0], rows, [row.mean_kept for row in rows], base.mean_visual)
    axes[0].set_xlabel(f"visual tokens kept (of {base.mean_visual:.0f}; equal numbers drawn side by side)")
    if has_times:
        times = [row.milliseconds.median for row in rows if row.milliseconds]
        draw_accuracy(axes[1], rows, times, 0)
        axes[1].set_xlabel("ms from pixels to the first new token, one question")
    axes[0].set_title(title, fontsize=10)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path)


def draw_accuracy(axes: Any, rows: Sequence[Row], places: Sequence[float], spread_over: float) -> None:
    """One panel: the accuracy of each row at its place on the x axis; `spread_over` sets apart what lies together."""
    base, *others = rows
    place_of = {(row.pruner, row.budget): place for row, place in zip(rows, places, strict=True)}
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
        shift = (number / max(len(names) - 1, 1) - 0.5) * 0.02 * spread_over
        axes.errorbar(
            [place_of[row.pruner, row.budget] + shift for row in points],
            heights,
            yerr=[below, above],
            label=name,
            color=PALETTE[colour_of(name, names)],
            marker=markers[number % len(markers)],
            markersize=5,
            linewidth=2 if name == "learned" else 1.2,
            linestyle=":" if name == "random" else "--" if repeats_colour(name, names) else "-",
            elinewidth=0.8,
            capsize=2,
        )
    axes.set_ylabel("accuracy, % of answers")
    axes.set_xlim(left=0)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
