"""docs/prune_or_shrink.md says what was measured: its tables against docs/results."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BUDGETS = ["1/3", "1/9", "1/18"]
BEDS = {"Photo-LLaVA": "photo_llava", "Mosaic-LLaVA": "mosaic_llava"}


@pytest.fixture(scope="module")
def page():
    return (DOCS / "prune_or_shrink.md").read_text(encoding="utf-8")


def result(bed, name):
    return json.loads((DOCS / "results" / BEDS[bed] / f"{name}.json").read_text(encoding="utf-8"))


def row_of(content, pruner, budget):
    return next(row for row in content["rows"] if (row["pruner"], row["budget"]) == (pruner, budget))


def section(page, title):
    """The text below a heading, up to the next one."""
    return re.split(r"^#+ ", page.split(f"\n### {title}", 1)[1], maxsplit=1, flags=re.M)[0]


def accuracy(row):
    group = f" ({100 * row['group_a']['value']:.0f})" if row["group_a"] else ""
    return f"{100 * row['accuracy']['value']:.1f}{group}"


@pytest.mark.parametrize("bed", BEDS)
def test_rows_of_twin_and_shipped_model(page, bed):
    twin, shipped = result(bed, "prune_or_shrink_twin"), result(bed, "prune_or_shrink")
    table = section(page, f"{bed}: ")
    for pruner in dict.fromkeys(row["pruner"] for row in twin["rows"] if row["pruner"] != "none"):
        cells = [accuracy(row_of(content, pruner, budget)) for content in (twin, shipped) for budget in BUDGETS]
        assert f"| `{pruner}` | {' | '.join(cells)} |" in table, pruner
    for content in (twin, shipped):
        found = row_of(content, "none", "1")["accuracy"]
        low, high = 100 * found["low"], 100 * found["high"]
        assert f"{100 * found['value']:.1f} ({low:.1f} to {high:.1f})" in " ".join(table.split())
    assert {twin["questions"]} == {shipped["questions"]}
    assert f"{twin['num_samples']:,} questions" in " ".join(table.split())


@pytest.mark.parametrize(
    ("bed", "unit", "files", "rows"),
    [
        (
            "Photo-LLaVA",
            1e9,
            ["prune_or_shrink_twin"],
            "none@1 oracle@1/9 learned@1/9 vispruner@1/9 divprune@1/9 learned@1/18 divprune@1/18 "
            "resize@1/3 resize@1/9",
        ),
        (
            "Mosaic-LLaVA",
            1e6,
            ["prune_or_shrink_twin", "prune_or_shrink_twin_equal_cost"],
            "none@1 learned@1/9 divprune@1/9 learned@1/18 resize@2/3 resize@9/16 resize@1/3 resize@1/9",
        ),
    ],
)
def test_operations(page, bed, unit, files, rows):
    table = section(page, "At equal cost")
    contents = [result(bed, name) for name in files]
    for pruner, budget in (name.split("@") for name in rows.split()):
        content = next(one for one in contents if budget in {row["budget"] for row in one["rows"]})
        row = row_of(content, pruner, budget)
        parts = [row["counted"][name] / unit for name in ("tower", "pruner", "prefill")]
        written = [f"{part:.{int(unit == 1e9)}f}" for part in [*parts, sum(parts)]]
        cells = [f"{row['mean_kept']:.0f}", f"{100 * row['accuracy']['value']:.1f}", *written]
        name = "unpruned" if pruner == "none" else f"`{pruner}`, {budget}"
        assert f"| {name} | {' | '.join(cells)} |" in table, name


def test_milliseconds_of_the_shipped_model(page):
    table = section(page, "At equal cost")
    files = {
        "prune_or_shrink": "none@1 learned@1/9 divprune@1/9 resize@1/9",
        "prune_or_shrink_equal_time": "resize@2/3",
    }
    for name, rows in files.items():
        for pruner, budget in (row.split("@") for row in rows.split()):
            row = row_of(result("Mosaic-LLaVA", name), pruner, budget)
            found = row["milliseconds"]
            title = "unpruned" if pruner == "none" else f"`{pruner}`, {budget}"
            times = f"{found['median']:.1f} ({found['low']:.1f} to {found['high']:.1f})"
            assert f"| {title} | {row['mean_kept']:.0f} | {times} |" in table


@pytest.mark.parametrize(("bed", "module"), [("Photo-LLaVA", "photo_train"), ("Mosaic-LLaVA", "train")])
def test_twins_were_trained_as_the_page_says(page, bed, module):
    command = re.search(rf"^python -m tprl_hf\.test_bed\.{module} (.*)$", page, re.M)[1].split()
    said = dict(zip(command[::2], command[1::2], strict=True))
    config = result(bed, "prune_or_shrink_twin_training")["config"]
    for name, value in said.items():
        if name != "--output-dir":
            recorded = config[name.removeprefix("--").replace("-", "_")]
            assert type(recorded)(value) == recorded, name


def test_what_is_said_of_photographs(page):
    text = " ".join(section(page, "Photo-LLaVA: ").split())
    twin, shipped = result("Photo-LLaVA", "prune_or_shrink_twin"), result("Photo-LLaVA", "prune_or_shrink")

    def lost(pruner, budget, sign=-1):
        found = row_of(twin, pruner, budget)["difference"]
        ends = sorted((sign * 100 * found["low"], sign * 100 * found["high"]))
        return f"{sign * 100 * found['value']:.1f}", f"[{ends[0]:.1f}, {ends[1]:.1f}]"

    def of_all(content, pruner, budget):
        return f"{100 * row_of(content, pruner, budget)['accuracy']['value']:.1f}"

    words = [
        f"{title} {' '.join(lost(name, '1/9'))}" for title, name in (("loses", "resize"), ("DivPrune", "divprune"))
    ]
    words += [f"VisPruner {' '.join(lost('vispruner', '1/9'))}", f"gains {' '.join(lost('learned', '1/9', 1))}"]
    for budget in ("1/3", "1/9"):
        words.append(f"from {of_all(shipped, 'resize', budget)} to {of_all(twin, 'resize', budget)} %")
    words.append(f"far above: {of_all(twin, 'enlarged', '1/9')} %")
    words.append(f"loses {lost('enlarged', '1/9')[0]} points at 1/9 and {lost('enlarged', '1/18')[0]} at 1/18")
    words.append(f"DivPrune loses {lost('divprune', '1/9')[0]} and {lost('divprune', '1/18')[0]} there")
    words.append(f"the policy gains {lost('learned', '1/9', 1)[0]} and loses {lost('learned', '1/18')[0]}")
    words.append(f"the twin has {of_all(twin, 'none', '1')} %, the shipped model {of_all(shipped, 'none', '1')}")
    for said in words:
        assert said in text, said
    for budget in BUDGETS:
        assert (
            row_of(twin, "learned", budget)["accuracy"]["value"]
            > row_of(twin, "enlarged", budget)["accuracy"]["value"]
        )
