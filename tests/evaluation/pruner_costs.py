"""
The table in docs/pruners.md of what each pruner costs, from the file that `tprl benchmark` wrote:

    tprl benchmark --pruners all --rounds 15 --json > docs/results/mosaic_llava/pruner_costs.json
    python -m tests.evaluation.pruner_costs
"""

import json
import textwrap
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
RESULTS, PAGE = DOCS / "results" / "mosaic_llava" / "pruner_costs.json", DOCS / "pruners.md"
BEGIN, END = "<!-- written by tests/evaluation/pruner_costs.py -->\n", "<!-- up to here -->\n"


def section(found: dict[str, Any]) -> str:
    """The table, and what it was measured with."""
    rows = [
        "| pruner | vision tower, relative to plain | choosing, ms | extra time, % of an unpruned prefill |",
        "|---|---|---|---|",
    ]
    for one in found["pruners"]:
        tower, choosing = one["tower_ratio"]["median"], one["choose_ms"]["median"]
        rows.append(f"| `{one['pruner']}` | {tower:.2f} | {choosing:.1f} | {100 * one['of_prefill']['median']:.0f} |")
    noise = [abs(one["tower_ratio"][end] - 1) for one in found["pruners"][:2] for end in ("low", "high")]
    clock = {"cpu": "processor time of the process", "cuda": "the GPU's clock", "wall": "wall-clock"}[found["clock"]]
    versions = ", ".join(f"{name} {number.split('+')[0]}" for name, number in sorted(found["versions"].items()))
    text = (
        f"Medians of {clock}, pruners in turns; {found['num_keep']} of {found['num_visual']} tokens kept. "
        f"Device: {found['device']}, {found['machine']}; {versions}. The tower takes "
        f"{found['tower_ms']['median']:.1f} ms without a pruner, and the LLM {found['prefill_ms']['median']:.1f} ms "
        "for an unpruned prefill. The first two rows show what the call itself costs, and how far runs of the same "
        f"tower lie apart (middle halves: at most {100 * max(noise):.0f} %)."
    )
    return "\n".join([*rows, "", *textwrap.wrap(text, 125)]) + "\n"


def main() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    text = section(json.loads(RESULTS.read_text()))
    PAGE.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
