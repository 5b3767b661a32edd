"""One page of an evaluation: accuracy against what it costs, by question type, and which questions pruning broke."""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tprl_hf.json_files import COUNT, read_json
from tprl_hf.style import colour_of, html_page, name_of_type, repeats_colour

from .charts import CHART_CSS, DASHES, Series, bar_cell, cell, line_chart, table
from .shown import HATCH_SVG, SAMPLE_SHAPE, SHOWN_CSS, ShownPictures, ShownSample, fits

AGAIN = "run the command of this evaluation again, which keeps the answers."
RESULTS, BROKEN = "results.json", "broken.json"
ESTIMATE = {"value": float, "low": float, "high": float}
RESULTS_SHAPE = {
    **dict.fromkeys(("command", "device", "data", "questions", "score", "weights"), str),
    "?policy_weights": (str, None),
    "?lora": (str, None),
    "versions": {...: str},
    "split": (str, None),
    "seed": (int, [int]),
    "num_samples": COUNT,
    "?notes": [str],
    "rows": [
        {
            **dict.fromkeys(("pruner", "budget"), str),
            **dict.fromkeys(("mean_kept", "mean_visual"), float),
            "accuracy": ESTIMATE,
            "difference": ESTIMATE,
            "by_type": {...: {**ESTIMATE, "count": int}},
            "?milliseconds": ({"median": float}, None),
            "?counted": ({...: float}, None),
        }
    ],
}
BROKEN_SHAPE = {
    "counts": [{"pruner": str, "budget": str, "by_type": {...: [int]}}],
    "cases": [
        {
            **dict.fromkeys(("pruner", "budget", "unpruned", "answer"), str),
            **dict.fromkeys(("sample", "num_kept", "num_visual"), int),
            "?shown": str,
            "?keep_mask": str,
        }
    ],
    "samples": {...: SAMPLE_SHAPE},
}
CSS = """
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 0 1.4rem; }
.cases .shown { grid-template-columns: repeat(2, minmax(0, 11rem)); }
"""
Row = Mapping[str, Any]


def is_evaluation(folder: Path) -> bool:
    """Whether `tprl evaluate` wrote in this directory."""
    return (folder / "run.json").exists() and (folder / "answers.jsonl").exists()


def read_results(folder: Path) -> dict[str, Any]:
    """What `tprl evaluate` came to; raises `ValueError` if it is not finished."""
    if not (folder / RESULTS).exists():
        raise ValueError(f"{folder} has no {RESULTS} yet: let its command finish; it keeps the answers.")
    return read_json(folder / RESULTS, RESULTS_SHAPE, AGAIN)


def read_broken(folder: Path) -> dict[str, Any]:
    """Which questions pruning broke; empty where it was not noted."""
    if not (folder / BROKEN).exists():
        return {}
    broken = read_json(folder / BROKEN, BROKEN_SHAPE, AGAIN)
    triples = all(len(three) == 3 for row in broken["counts"] for three in row["by_type"].values())
    shown = [case for case in broken["cases"] if "shown" in case]
    there = all({case["shown"], str(case["sample"])} <= broken["samples"].keys() for case in shown)
    if not (
        triples and there and all("keep_mask" in case for case in shown) and all(map(fits, broken["samples"].values()))
    ):
        raise ValueError(f"{folder / BROKEN} is damaged (its parts do not fit each other): {AGAIN}")
    return broken


def evaluation_page(folder: Path) -> str:
    """
    The page of a directory that `tprl evaluate` wrote.

    Raises:
        `ValueError`: If the evaluation is not finished.
    """
    results = read_results(folder)
    rows = results["rows"]
    broken, pictures = read_broken(folder), ShownPictures()
    title = ", ".join(filter(None, (Path(results["data"]).name, results["split"])))
    notes = results.get("notes") or [
        f"{results['num_samples']} questions, seed {results['seed']}. Accuracy: {results['score']}.",
        f"Device: {results['device']}.",
        f"Command: {results['command']}",
    ]
    parts = [HATCH_SVG, section("All pruners", accuracy_table(rows))]
    parts.append(section("What accuracy costs", f'<div class="charts">{"".join(cost_charts({"": rows}))}</div>'))
    parts.append(section("By question type", type_tables({"": rows})))
    parts.append(section("What pruning broke", broken_html(broken, pictures)))
    said = "".join(f'<p class="note">{html.escape(without_places(note))}</p>' for note in notes)
    parts.append(section("How this was measured", said))
    css = CHART_CSS + SHOWN_CSS + CSS + pictures.css
    subtitle = f"{results['num_samples']} questions; accuracy with 95 % intervals over images."
    return html_page(f"Evaluation: {title}", [subtitle], "\n".join(parts), css)


def without_places(text: str) -> str:
    """
    A text in which paths of this machine are their last part.

    Example:

    ```python
    >>> without_places("--data /data/own.jsonl --keep-ratios 1/3")
    '--data own.jsonl --keep-ratios 1/3'
    ```
    """
    return re.sub(r"(?<!\S)/(?:[^\s/]+/)*([^\s/]+)", r"\1", text)


def section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def accuracy_table(rows: Sequence[Row]) -> str:
    """All rows; the bars are the accuracies, from 0 to 100 %."""
    base = rows[0]["accuracy"]["value"]
    has_times = all(row.get("milliseconds") for row in rows)
    header = ["pruner", "kept", "tokens", "accuracy %", "compared with unpruned (pp)", "of unpruned (%)"]
    lines = []
    for row in rows:
        accuracy, difference = row["accuracy"], row["difference"]
        tokens = f"{row['mean_kept']:.0f} of {row['mean_visual']:.0f}"
        cells = [cell(row["pruner"], "number"), cell(row["budget"]), cell(tokens, "number")]
        cells.append(bar_cell(percent(accuracy), accuracy["value"]))
        cells.append(cell("-" if row is rows[0] else percent(difference, "+"), "number"))
        cells.append(cell(f"{100 * accuracy['value'] / base:.1f}" if base else "-"))
        if has_times:
            cells.append(cell(f"{row['milliseconds']['median']:.1f}"))
        lines.append(cells)
    return table([*header, *(["ms"] if has_times else [])], lines)


def percent(estimate: Mapping[str, float], sign: str = "") -> str:
    """
    Example:

    ```python
    >>> percent({"value": 0.5, "low": 0.425, "high": 0.576})
    '50.0 [42.5, 57.6]'
    ```
    """
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def cost_charts(runs: Mapping[str, Sequence[Row]]) -> list[str]:
    """
    Accuracy against tokens, against milliseconds and against operations, as far as all runs measured them.

    Args:
        runs (`Mapping[str, Sequence[Row]]`): By name, the rows of each evaluation, one or two.
    """
    every = [row for rows in runs.values() for row in rows]
    totals = dict.fromkeys(f"{rows[0]['mean_visual']:.0f}" for rows in runs.values())
    label = f"visual tokens kept, of {' or '.join(totals)}"
    drawn = [cost_chart(runs, "Accuracy and tokens", label, lambda row: row["mean_kept"])]
    if all(row.get("milliseconds") for row in every):
        label = "ms from pixels to the first new token, one question"
        drawn.append(cost_chart(runs, "Accuracy and time", label, lambda row: row["milliseconds"]["median"]))
    if all(row.get("counted") for row in every):
        label = "10⁹ operations of tower, pruner and prefill, one question"
        counted = "Accuracy and operations"
        drawn.append(cost_chart(runs, counted, label, lambda row: sum(row["counted"].values()) / 1e9))
    return drawn


def cost_chart(runs: Mapping[str, Sequence[Row]], title: str, x_label: str, place: Callable[[Row], float]) -> str:
    """Accuracy of each pruner at its budgets; the unpruned model is a level. Of two runs the second is dashed."""
    names = list(dict.fromkeys(row["pruner"] for rows in runs.values() for row in rows[1:]))
    found, levels = [], {}
    for run, two_dash in zip(runs, DASHES, strict=False):
        base = runs[run][0]["accuracy"]
        levels[run] = tuple(100 * base[name] for name in ("low", "value", "high"))
        for number, name in enumerate(names):
            own = sorted((row for row in runs[run][1:] if row["pruner"] == name), key=place)
            points = [(place(row), 100 * row["accuracy"]["value"]) for row in own]
            intervals = [(100 * row["accuracy"]["low"], 100 * row["accuracy"]["high"]) for row in own]
            one_dash = "2 3" if name == "random" else "7 3" if repeats_colour(name, names) else ""
            dash, tip = (two_dash, f"{name}, {run}") if len(runs) > 1 else (one_dash, name)
            found.append(Series(tip, points, colour_of(name, names), number, dash, intervals, name, bool(two_dash)))
    same = len(set(levels.values())) == 1
    bands = [(*level, "unpruned" if same else f"unpruned, {run}") for run, level in levels.items()]
    return line_chart(title, found, x_label, "accuracy, % of answers", bands=bands[:1] if same else bands)


def type_tables(runs: Mapping[str, Sequence[Row]]) -> str:
    """A table for each budget: bars from 0 to 100 %, a column for each question type."""
    headers = {
        run: tuple(f"{name_of_type(kind, by_type)} ({one['count']})" for kind, one in by_type.items())
        for run, by_type in ((run, rows[0]["by_type"]) for run, rows in runs.items())
    }
    if len(set(headers.values())) > 1:  # of other questions
        return "\n".join(f"<h3>{html.escape(run)}</h3>{type_tables({run: rows})}" for run, rows in runs.items())
    header = ["pruner", *(["evaluation"] if len(runs) > 1 else []), *next(iter(headers.values()))]
    parts = []
    for budget in dict.fromkeys(row["budget"] for rows in runs.values() for row in rows[1:]):
        shown = [(run, row) for run, rows in runs.items() for row in rows if row is rows[0] or row["budget"] == budget]
        names = list(dict.fromkeys(row["pruner"] for _, row in shown))
        lines = []
        for run, row in sorted(shown, key=lambda one: names.index(one[1]["pruner"])):
            bars = [bar_cell(f"{100 * one['value']:.1f}", one["value"]) for one in row["by_type"].values()]
            lines.append([cell(row["pruner"], "number"), *([cell(run, "number")] if len(runs) > 1 else []), *bars])
        parts.append(f"<h3>{html.escape(budget)} of the tokens kept; accuracy %</h3>{table(header, lines)}")
    return "\n".join(parts)


def broken_html(broken: Mapping[str, Any], pictures: ShownPictures) -> str:
    """How many questions each pruner broke and mended, and some of the broken ones."""
    if not broken:
        return "<p>Not noted here: run the command of this evaluation once more, which keeps its answers.</p>"
    kinds = list(dict.fromkeys(kind for row in broken["counts"] for kind in row["by_type"]))
    header = ["pruner", "kept", "broken", "mended", *(f"broken: {kind}" for kind in kinds)]
    lines = []
    for row in broken["counts"]:
        lost, won, asked = (sum(one[place] for one in row["by_type"].values()) for place in range(3))
        cells = [cell(row["pruner"], "number"), cell(row["budget"])]
        cells += [bar_cell(f"{number} of {asked}", number / max(asked, 1)) for number in (lost, won)]
        for kind in kinds:
            one = row["by_type"].get(kind, [0, 0, 0])
            cells.append(bar_cell(f"{one[0]} of {one[2]}", one[0] / max(one[2], 1)))
        lines.append(cells)
    parts = [
        '<p class="note">Broken: correct with all tokens, wrong with a part of them. Mended: the reverse.</p>',
        table(header, lines),
        '<p class="note">Below, the first broken questions of each pruner and budget; question types take turns, and '
        "none was chosen by hand. The LLM does not see hatched patches.</p>",
    ]
    for name in dict.fromkeys(case["pruner"] for case in broken["cases"]):
        cases = "".join(
            case_html(case, broken["samples"], pictures) for case in broken["cases"] if case["pruner"] == name
        )
        parts.append(f'<h3>{html.escape(name)}</h3><div class="cases">{cases}</div>')
    return "\n".join(parts)


def case_html(case: Mapping[str, Any], samples: Mapping[str, Any], pictures: ShownPictures) -> str:
    """One question: its picture with both answers."""
    title = f"{case['budget']}: {case['num_kept']} of {case['num_visual']}"
    if "shown" not in case:
        asked = f"question {case['sample']}, without a picture"
        said = html.escape(f"{asked}: {case['unpruned']} → {case['answer']}")
        return f'<div><p class="question">{said}</p></div>'
    whole, pruned = (ShownSample.from_json(samples[name]) for name in (str(case["sample"]), case["shown"]))
    panels = pictures.panel(whole, None, f"all {case['num_visual']} tokens", case["unpruned"], True)
    panels += pictures.panel(pruned, case["keep_mask"], title, case["answer"], False)
    reference = html.escape(whole.reference or "-")
    return (
        f'<div><p class="question">{html.escape(whole.question)} <span>({reference})</span></p>'
        f'<div class="shown">{panels}</div></div>'
    )
