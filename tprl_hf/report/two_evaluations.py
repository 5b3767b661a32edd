"""One page of two evaluations over each other: what differs, and which questions only one of them answered."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tprl_hf.answer_rules import CORRECT
from tprl_hf.intervals import Estimate, bootstrap_mean
from tprl_hf.json_files import read_json
from tprl_hf.style import html_page

from .charts import CHART_CSS, bar_cell, cell, table
from .evaluation_page import (
    AGAIN,
    CSS,
    Row,
    cost_charts,
    percent,
    read_broken,
    read_results,
    section,
    type_tables,
    without_places,
)
from .runs import distinct_names, flattened, json_lines
from .shown import HATCH_SVG, SHOWN_CSS, ShownPictures, ShownSample

Name = tuple[str, str]  # of a row: pruner and budget
NOT_SETTINGS = ("rows", "notes", "questions", "pruners")
ANSWER = {**dict.fromkeys(("pruner", "budget", "answer"), str), "sample": int, "score": float}
MOST_SHOWN = 3  # of a pruner at a budget


@dataclass(frozen=True)
class Answers:
    """
    The answers of a row to all questions.

    Args:
        scores (`list[float]`): In [0, 1]; of a pruner with several seeds the mean over them.
        texts (`list[str]`): What was said; of several seeds under the first one.
    """

    scores: list[float]
    texts: list[str]


@dataclass(frozen=True)
class Evaluation:
    """
    What `tprl evaluate` wrote in a directory.

    Args:
        name (`str`): On the page.
        results (`dict`): Rows and what they depend on.
        broken (`dict`): Which questions pruning broke; empty where it was not noted.
        units (`list[str]`): The image of each question; empty where it was not noted.
        answers (`dict`): By row.
    """

    name: str
    results: Mapping[str, Any]
    broken: Mapping[str, Any]
    units: list[str]
    answers: dict[Name, Answers]

    @property
    def rows(self) -> dict[Name, Row]:
        return {(row["pruner"], row["budget"]): row for row in self.results["rows"]}


def two_evaluations_page(folders: Sequence[Path], command: str) -> str:
    """
    The page of two directories that `tprl evaluate` wrote.

    Args:
        folders (`Sequence[Path]`): The first and the second.
        command (`str`): That which makes the page.

    Raises:
        `ValueError`: If one of them is not finished.
    """
    first, second = (
        read_evaluation(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)
    )
    paired = asked_the_same(first, second)
    notes = [
        f"Whole lines and filled marks are {first.name}, dashed lines and hollow marks {second.name}.",
        f"Command: {command}",
    ]
    if not paired:
        notes.insert(0, "They asked different questions, so that their answers cannot be compared one by one.")
    runs = {one.name: one.results["rows"] for one in (first, second)}
    pictures = ShownPictures()
    parts = [HATCH_SVG, section("All pruners", accuracy_table(first, second, paired))]
    parts.append(section("What accuracy costs", f'<div class="charts">{"".join(cost_charts(runs))}</div>'))
    parts.append(section("By question type", type_tables(runs)))
    if paired:
        parts.append(section("Questions that only one answered", differences_html(first, second, pictures)))
    parts.append(section("How they were measured", settings_html(first, second)))
    title = f"Evaluations {first.name} and {second.name}"
    return html_page(title, notes, "\n".join(parts), CHART_CSS + SHOWN_CSS + CSS + pictures.css)


def read_evaluation(folder: Path, name: str) -> Evaluation:
    """A finished directory; see [`two_evaluations_page`]."""
    results = read_results(folder)
    units = []
    if (folder / "questions.json").exists():
        units = read_json(folder / "questions.json", {"units": [str]}, AGAIN)["units"]
    found: dict[Name, dict[int, list[tuple[float, str]]]] = {}
    seeds = {(row["pruner"], row["budget"]): row.get("by_pruner_seed") for row in results["rows"]}
    for line in json_lines(folder / "answers.jsonl", ANSWER):
        own = seeds.get((line["pruner"], line["budget"]))
        if own and str(line.get("seed")) not in own:
            continue  # of an earlier command with more seeds
        by_sample = found.setdefault((line["pruner"], line["budget"]), {})
        by_sample.setdefault(line["sample"], []).append((line["score"], line["answer"]))
    answers = {
        row: Answers(
            [fmean(score for score, _ in by_sample[number]) for number in range(len(by_sample))],
            [by_sample[number][0][1] for number in range(len(by_sample))],
        )
        for row, by_sample in found.items()
        if by_sample.keys() == set(range(results["num_samples"]))
    }
    return Evaluation(name, results, read_broken(folder), units, answers)


def asked_the_same(first: Evaluation, second: Evaluation) -> bool:
    """Whether their scores can be compared question by question."""
    return all(first.results[name] == second.results[name] for name in ("questions", "score"))


def difference(first: Evaluation, second: Evaluation, row: Name) -> Estimate | None:
    """How much better the second one is, with an interval over images; `None` where answers are not there."""
    if row not in first.answers or row not in second.answers:
        return None
    scores = zip(first.answers[row].scores, second.answers[row].scores, strict=True)
    return bootstrap_mean([after - before for before, after in scores], first.units or None)


def accuracy_table(first: Evaluation, second: Evaluation, paired: bool) -> str:
    """All rows of both; the bars are the accuracies, from 0 to 100 %."""
    pair = (first, second)
    header = ["pruner", "kept", *(f"tokens, {one.name}" for one in pair), *(f"accuracy %, {one.name}" for one in pair)]
    lines = []
    for name in dict.fromkeys([*first.rows, *second.rows]):
        own = [one.rows.get(name) for one in pair]
        cells = [cell(name[0], "number"), cell(name[1])]
        for row in own:
            tokens = "-" if row is None else f"{row['mean_kept']:.0f} of {row['mean_visual']:.0f}"
            cells.append(cell(tokens, "number"))
        for row in own:
            accuracy = None if row is None else row["accuracy"]
            cells.append(cell("-") if accuracy is None else bar_cell(percent(accuracy), accuracy["value"]))
        if paired:
            better = difference(first, second, name)
            cells.append(cell("-" if better is None else percent(vars(better), "+"), "number"))
        lines.append(cells)
    note = ""
    if paired:
        header.append(f"{second.name} compared with {first.name} (pp)")
        note = (
            '<p class="note">The last column is the mean of paired differences on the same questions, in percentage '
            "points, with 95 % bootstrap intervals over images.</p>"
        )
    return table(header, lines) + note


def differences_html(first: Evaluation, second: Evaluation, pictures: ShownPictures) -> str:
    """How many questions each one alone answered correctly, row by row, and some of those that pruning broke."""
    rows = [row for row in first.answers if row in second.answers]
    if not rows:
        return "<p>The answers are not there.</p>"
    header = ["pruner", "kept", f"correct in {first.name} alone", f"correct in {second.name} alone"]
    lines = []
    for row in rows:
        correct = [[score >= CORRECT for score in one.answers[row].scores] for one in (first, second)]
        pairs = list(zip(*correct, strict=True))
        cells = [cell(row[0], "number"), cell(row[1])]
        for wanted in ((True, False), (False, True)):
            number = pairs.count(wanted)
            cells.append(bar_cell(f"{number} of {len(pairs)}", number / len(pairs)))
        lines.append(cells)
    parts = [table(header, lines)]
    for one, other in ((first, second), (second, first)):
        for row in rows:
            if cases := cases_html(one, other, row, pictures):
                title = f"{row[0]}, {row[1]} kept: broken in {one.name}, answered in {other.name}"
                parts.append(f'<h3>{html.escape(title)}</h3><div class="cases">{cases}</div>')
    if len(parts) > 1:
        parts.insert(
            1,
            '<p class="note">Below, questions that pruning broke in one, as far as its directory has their pictures, '
            "and that the other answered. The kept tokens are those of the one that broke them.</p>",
        )
    return "\n".join(parts)


def cases_html(one: Evaluation, other: Evaluation, row: Name, pictures: ShownPictures) -> str:
    """Questions that pruning broke in `one` and not in `other`, with the picture and mask of `one`."""
    cases = [
        case
        for case in one.broken.get("cases", [])
        if (case["pruner"], case["budget"]) == row
        and "shown" in case
        and other.answers[row].scores[case["sample"]] >= CORRECT
    ]
    drawn = []
    for case in cases[:MOST_SHOWN]:
        sample = ShownSample.from_json(one.broken["samples"][case["shown"]])
        kept = f"{one.name}: {case['num_kept']} of {case['num_visual']}"
        panel = pictures.panel(sample, case["keep_mask"], kept, case["answer"], False)
        said = html.escape(other.answers[row].texts[case["sample"]])
        reference = html.escape(sample.reference or "-")
        drawn.append(
            f'<div><p class="question">{html.escape(sample.question)} <span>({reference})</span></p>'
            f'<div class="shown">{panel}<p><b>{html.escape(other.name)}</b><br>'
            f'<span class="correct">{said}</span></p></div></div>'
        )
    return "".join(drawn)


def settings_html(first: Evaluation, second: Evaluation) -> str:
    """What differs in how they were measured, and what both have alike."""
    pair = (first, second)
    flat = [flattened({key: one.results[key] for key in one.results if key not in NOT_SETTINGS}) for one in pair]
    keys = sorted({key for settings in flat for key in settings})
    different = [key for key in keys if len({settings.get(key) for settings in flat}) > 1]

    def rows(names: Sequence[str]) -> list[list[str]]:
        return [
            [cell(key), *(cell(without_places(settings.get(key, "-")), "words") for settings in flat)] for key in names
        ]

    header = ["", first.name, second.name]
    alike = [key for key in keys if key not in different]
    return (
        f"<h3>What differs</h3>{table(header, rows(different)) if different else '<p>Nothing.</p>'}"
        f"<details><summary>What is alike</summary>{table(header, rows(alike))}</details>"
    )
