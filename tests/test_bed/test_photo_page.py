"""docs/photo.md says what was measured: its tables against docs/results/photo_llava."""

import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BUDGETS = ["1/3", "1/9", "1/18", "1/36"]


@pytest.fixture(scope="module")
def page():
    return " ".join((DOCS / "photo.md").read_text(encoding="utf-8").split())


def result(name):
    return json.loads((DOCS / "results" / "photo_llava" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "pruner", "title"),
    [
        ("h200_rules", "oracle", "oracle"),
        ("h200_imitation", "learned", "learned, 12,000 demonstrations, three seeds"),
        ("h200_rules", "learned", "learned, 1,200 demonstrations"),
        ("h200_rules", "vispruner", "VisPruner"),
        ("h200_rules", "divprune", "DivPrune"),
        ("h200_rules", "uniform", "uniform"),
        ("h200_rules", "random", "random"),
    ],
)
def test_rows_on_the_test_questions(page, file, pruner, title):
    found = {row["budget"]: row["percent"]["photo"] for row in result(file)["rows"] if row["pruner"] == pruner}
    cells = [found[budget] for budget in BUDGETS]
    assert all(cell["count"] == 4480 * (3 if file == "h200_imitation" else 1) for cell in cells)
    written = [f"{cell['value']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]" for cell in cells]
    assert f"| {title} | {' | '.join(written)} |" in page


@pytest.mark.parametrize(
    ("part", "step", "title"),
    [
        ("input norm, gradient", 600, "1,200 gradient demonstrations, step 600"),
        ("input norm, boxes", 800, "6,000 demonstrations of boxes, step 800"),
        ("input norm, boxes", 2400, "the same, step 2,400"),
        ("similarity left out, boxes", 1500, "input norm, step 1,500"),
        ("similarity, boxes", 1000, "input norm and similarity, step 1,000"),
        ("similarity, boxes", 2000, "the same, step 2,000, shipped"),
    ],
)
def test_rows_with_the_input_norm(page, part, step, title):
    found = next(one for one in result("question")[part]["lfd"] if one["step"] == step)
    names = [f"@{share}" for share in ("0.333", "0.111", "0.056", "0.028")]
    written = [f"{found['accuracy' + name]:.1f} ({found['question_effect' + name]:.0f})" for name in names]
    assert f"| {title} | {' | '.join(written)} |" in page


def test_imitation_stops_early_whatever_the_seed_and_the_network():
    found = result("question")["imitation on an H200"]
    for run in [*found["seeds"].values(), found["a larger network"]]:
        losses = run["lfd, loss"]
        early, late = ([losses[str(step)] for step in steps] for steps in ((250, 300, 350), (1100, 1150, 1200)))
        assert sum(late) / sum(early) > 0.9


@pytest.mark.parametrize(
    ("file", "pruner", "title"),
    [
        ("rules", "oracle", "oracle"),
        ("policy", "learned", "**learned**"),
        ("nearest_word", "query-similarity:reduce=max", "nearest word (`query-similarity:reduce=max`)"),
        ("rules", "learned", "learned, 1,200 demonstrations, without similarity"),
        ("rules", "divprune", "DivPrune"),
        ("rules", "vispruner", "VisPruner"),
    ],
)
def test_points_of_the_shipped_policy(page, file, pruner, title):
    found = {row["budget"]: row["difference"] for row in result(file)["rows"] if row["pruner"] == pruner}
    cells = [
        "–"
        if cell is None
        else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * cell[end] for end in ("value", "low", "high")))
        for cell in (found.get(budget) for budget in BUDGETS)
    ]
    assert result(file)["num_samples"] == 1120 and f"| {title} | {' | '.join(cells)} |" in page


def test_what_is_said_of_the_gap(page):
    points = {
        (row["pruner"], row["budget"]): 100 * row["difference"]["value"]
        for file in ("rules", "nearest_word", "policy")  # the rules' policy is the earlier one
        for row in result(file)["rows"]
    }
    rules = ("divprune", "vispruner", "uniform", "cdpruner", "query-similarity", "query-similarity:reduce=max")
    best = {budget: max(points[rule, budget] for rule in rules) for budget in ("1/9", "1/18")}
    closed = [
        100 * (points["learned", budget] - rule) / (points["oracle", budget] - rule) for budget, rule in best.items()
    ]
    assert (
        "closes {:.0f} % of the gap between the best rule and the oracle at 1/9, and {:.0f} %".format(*closed) in page
    )
    readme = " ".join((DOCS.parent / "README.md").read_text(encoding="utf-8").split())
    said = f"loses {-points['learned', '1/18']:.1f} points, and the best published method {-best['1/18']:.1f}."
    assert f"with 14 of 256 tokens its policy {said}" in readme
    counting = {
        row["budget"]: row["by_type"]["counting"]["value"]
        for row in result("policy")["rows"]
        if row["pruner"] in ("none", "learned")
    }
    assert f"counting ({100 * counting['1']:.1f} % unpruned, {100 * counting['1/9']:.1f} at 1/9)" in page


def test_rows_of_the_shipped_policys_three_seeds(page):
    rows = {row["budget"]: row for row in result("seeds")["rows"] if row["pruner"] == "learned"}
    cells = [rows[budget]["percent"]["photo"] for budget in BUDGETS]
    assert all(cell["count"] == 3 * 1120 for cell in cells)
    mean = [f"{cell['value']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]" for cell in cells]
    assert f"| mean | {' | '.join(mean)} |" in page
    for seed, title in enumerate(("seed 0, shipped", "seed 1", "seed 2")):
        written = [f"{rows[budget]['by_replicate']['photo'][seed]:.1f}" for budget in BUDGETS]
        assert f"| {title} | {' | '.join(written)} |" in page
