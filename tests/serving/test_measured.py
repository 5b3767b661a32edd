"""The figures of docs/serving.md are those of the committed run."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = {"tprl_hf": "`tprl serve`", "vllm": "`vllm serve`"}
BUDGETS = {"1": "unpruned", "0.333": "1/3", "0.111": "1/9"}


def lines() -> list[str]:
    rows = json.loads((ROOT / "docs/results/mosaic_llava/servers.json").read_text())["rows"]
    table = []
    for row in rows:
        budget = f"{row['budget'].get('keep_ratio', 1):.3g}"
        rate = row["requests_per_second"]
        unpruned = next(
            other["requests_per_second"]["median"]
            for other in rows
            if other["budget"] == {"prune": False}
            and all(other[name] == row[name] for name in ("model", "server", "clients"))
        )
        cells = [
            row["model"], NAMES[row["server"]], str(row["clients"]), BUDGETS[budget],
            f"{rate['median']:.2f} ({rate['least']:.2f} to {rate['most']:.2f})", f"{rate['median'] / unpruned:.2f}",
            f"{row['first_token_ms']['median']:.0f}",
        ]  # fmt: skip
        table.append(f"| {' | '.join(cells)} |")
    return table


def test_the_table_is_that_of_the_run():
    text = (ROOT / "docs/serving.md").read_text()
    assert [line for line in text.splitlines() if line in lines()] == lines()
