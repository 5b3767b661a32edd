"""docs/photo.md says what was measured: its tables against docs/results/photo_llava."""

import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BUDGETS = ["1/3", "1/9", "1/18", "1/36"]


@pytest.fixture(scope="module")
def page():
    return " ".join((DOCS / "photo.md").read_text(encoding="utf-8").split())


def points(name):
    """The differences of each pruner from unpruned, as the page writes them: a row of cells."""
    found = {}
    for row in result(name)["rows"]:
        ends = [100 * row["difference"][end] for end in ("value", "low", "high")]
        found.setdefault(row["pruner"], {})[row["budget"]] = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*ends)
    return {
        pruner: " | ".join(cells[budget] for budget in BUDGETS) for pruner, cells in found.items() if len(cells) > 1
    }


def result(name):
    return json.loads((DOCS / "results" / "photo_llava" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "pruner", "title"),
    [
        ("h200_rules", "oracle", "oracle"),
        ("seeds", "learned", "**learned**, three seeds"),
        ("seeds_imitation", "learned", "learned, imitation alone, three seeds"),
        ("h200_rules", "vispruner", "VisPruner"),
        ("h200_rules", "divprune", "DivPrune"),
        ("h200_nearest_word", "query-similarity:reduce=max", "nearest word (`query-similarity:reduce=max`)"),
        ("h200_rules", "uniform", "uniform"),
        ("h200_rules", "random", "random"),
        ("h200_imitation", "learned", "learned, 12,000 demonstrations, three seeds"),
        ("h200_rules", "learned", "learned, 1,200 demonstrations"),
    ],
)
def test_rows_on_the_test_questions(page, file, pruner, title):
    found = {row["budget"]: row["percent"]["photo"] for row in result(file)["rows"] if row["pruner"] == pruner}
    cells = [found[budget] for budget in BUDGETS]
    count = {"h200_rules": 4480, "h200_nearest_word": 2240}.get(file, 3 * 4480)
    assert all(cell["count"] == count for cell in cells)
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
        ("similarity, boxes", 2000, "the same, step 2,000, where reinforcement learning started"),
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


def learned(file, budget, field="percent"):
    return next(row for row in result(file)["rows"] if (row["pruner"], row["budget"]) == ("learned", budget))[field][
        "photo"
    ]


def test_rows_of_each_seed(page):
    for file, title in (("seeds", ""), ("seeds_imitation", ", imitation alone")):
        halves = [learned(file, budget, "by_replicate") for budget in BUDGETS]  # each seed in two evaluations
        for seed in range(3):
            written = [f"{sum(one[2 * seed : 2 * seed + 2]) / 2:.1f}" for one in halves]
            name = f"seed {seed}{', shipped' if seed == 0 and not title else ''}{title}"
            assert f"| {name} | {' | '.join(written)} |" in page


def test_rows_by_type_of_question(page):
    files = {name: result(name)["accuracy by type, mean of the seeds"] for name in ("seeds", "seeds_imitation")}
    rows = {"unpruned": files["seeds"]["1"]}
    for budget in BUDGETS:
        rows |= {
            f"{budget}, imitation alone": files["seeds_imitation"][budget],
            f"{budget}, learned": files["seeds"][budget],
        }
    for title, row in rows.items():
        assert f"| {title} | {' | '.join(f'{value:.1f}' for value in row.values())} |" in page
    of_all = {name: sum(row[budget].values()) / len(row[budget]) for name, row in files.items() for budget in ["1/9"]}
    for name, value in of_all.items():  # seven types, equally many questions
        assert abs(value - 100 * learned(name, "1/9", "accuracy")) < 0.02


def test_what_is_said_of_tuning_and_of_the_best_rule(page):
    """Nothing is lost at 1/3 and 1/9, by intervals; above each rule and above imitation."""
    for budget in BUDGETS:
        tuned, before = learned("seeds", budget), learned("seeds_imitation", budget)
        assert tuned["value"] > before["value"]
        for row in result("h200_rules")["rows"]:
            if row["budget"] == budget != "1/3" and row["pruner"] not in ("oracle", "learned"):
                assert tuned["low"] > row["percent"]["photo"]["high"]
    closed = []
    for budget in BUDGETS[1:]:
        rows = {
            row["pruner"]: row["percent"]["photo"]["value"]
            for row in result("h200_rules")["rows"]
            if row["budget"] == budget
        }
        oracle, best_rule = rows.pop("oracle"), max(value for name, value in rows.items() if name != "learned")
        closed.append(round(100 * (learned("seeds", budget)["value"] - best_rule) / (oracle - best_rule)))
    assert "closes {}, {} and {} % of the gap".format(*closed) in page
    assert all(learned("seeds", budget)["low"] < 100 < learned("seeds", budget)["high"] for budget in ("1/3", "1/9"))
    rules = {(row["pruner"], row["budget"]): row["accuracy"]["photo"] for row in result("h200_rules")["rows"]}
    own = next(row["accuracy"]["photo"] for row in result("seeds")["rows"] if row["pruner"] == "none")
    lost = 100 * (own - learned("seeds", "1/18", "accuracy"))
    best = 100 * (
        rules["none", "1"] - max(rules[name, "1/18"] for name in ("divprune", "vispruner", "uniform", "random"))
    )
    readme = " ".join((DOCS.parent / "README.md").read_text(encoding="utf-8").split())
    said = f"with 14 it loses {lost:.1f} points, and the best published method {best:.1f}."
    assert f"with 28 of 256 tokens its policy loses nothing, {said}" in readme
    training = result("policy_training")["counterfactual"]
    assert training == {**training, "best_step": 450} and round(training["llm_passes"], -4) == 190_000
    assert round(training["seconds"] / 60) == 6 and "six minutes a seed" in page


@pytest.mark.parametrize(
    ("file", "pruner", "title"),
    [
        ("new_pictures", "learned", "new pictures, learned"),
        ("new_things", "learned", "new things, learned"),
        ("new_things_rules", "learned", "new things, imitation alone"),
        ("new_things_rules", "vispruner", "new things, VisPruner"),
        ("new_things_rules", "divprune", "new things, DivPrune"),
    ],
)
def test_rows_of_what_was_held_out(page, file, pruner, title):
    assert result(file)["num_samples"] == 1120 and f"| {title} | {points(file)[pruner]} |" in page
    unpruned = 100 * result(file)["rows"][0]["accuracy"]["value"]
    assert f"{unpruned:.1f} % of {file.removesuffix('_rules').replace('_', ' ')}" in page


@pytest.mark.parametrize(
    ("file", "title"),
    [("unlabelled", "without labels, imitation alone"), ("policy", "shipped, on the same questions")],
)
def test_rows_without_labels(page, file, title):
    assert f"| {title} | {points(file)['learned']} |" in page
    assert result(file)["questions"] == result("policy")["questions"]


def test_times_are_those_of_their_files(page):
    """Each number in the order of the table, and what a server and a user would notice."""

    def cell(one, digits=2):
        return f"{one['median']:.{digits}f} ({one['low']:.{digits}f} to {one['high']:.{digits}f})"

    found = [result("benchmark_third"), result("benchmark_ninth")]
    rows = {
        f"{name}, ms": [cell(one["milliseconds"][part], digits) for one in found]
        for name, part, digits in [
            ("prefill unpruned", "prefill unpruned", 0),
            ("prefill pruned", "prefill pruned", 0),
            ("floor", "prefill floor", 0),
            ("pruner", "pruner", 1),
            ("vision tower", "vision", 0),
        ]
    }
    rows["speed-up of the prefill"] = [cell(one["ratios"]["prefill speed-up"]) for one in found]
    rows["speed-up of whole answers, one at a time"] = [cell(one["load"][0]["speed_up"]) for one in found]
    rows["speed-up of whole answers, batches of 8"] = [cell(one["load"][1]["speed_up"]) for one in found]
    for way in ("unpruned", "pruned"):
        rows[f"answers in a second, batches of 8, {way}"] = [cell(one["load"][1][way]) for one in found]
    for title, cells in rows.items():
        assert f"| {title} | {' | '.join(cells)} |" in page
    assert [one["num_keep"] for one in found] == [85, 28] and all("2 threads" in one["device"] for one in found)
    assert all(one["ratios"]["prefill pruned / floor"]["median"] < 1.05 for one in found)
