"""docs/reproduction.md: its numbers are those of the files that it names, and its tables are all there."""

import json
import re
from pathlib import Path

from tprl_hf.cli.paper_tables import table_names

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "docs" / "results" / "mosaic_llava" / "policy.json").read_text(encoding="utf-8"))


def lost(way: str, budget: str, with_interval: bool = False) -> str:
    """Points that a variant loses, as the page writes them."""
    row = next(row for row in RESULTS["rows"] if (row["way"], row["budget"]) == (way, budget))
    value, low, high = (-100 * row["difference"][end] for end in ("value", "high", "low"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]" if with_interval else f"{value:.2f}"


def test_the_numbers_are_those_of_the_results():
    assert (
        f"{100 * RESULTS['unpruned']['value']:.2f} %" in PAGE and f"{RESULTS['num_samples']:,} test questions" in PAGE
    )
    assert f"loses {lost('ppo', '1/3', True)} points at 1/3, LLM frozen" in PAGE
    assert (
        f"recipe loses {lost('paper', '1/3', True)} points at 1/3, VisPruner {lost('vispruner', '1/3', True)}" in PAGE
    )
    budgets = ("1/3", "1/9", "1/18")
    lfd, shipped, scratch = ([lost(way, budget) for budget in budgets] for way in ("lfd", "ppo", "scratch"))
    assert "LfD loses {}, {} and {} points at 1/3".format(*lfd) in PAGE
    assert "credit {}, {} and {}; three seeds".format(*shipped) in PAGE
    assert "| {}, {} and {} points; one seed |".format(*scratch) in PAGE


def test_each_table_has_its_row():
    rows = re.findall(r"^\| (`\w+`.*?) \|", PAGE.split("| table |")[1].split("## Claims")[0], re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(table_names())
