"""Evaluations of several tasks, budgets and seeds as one table, in Markdown and LaTeX."""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path

from tprl_hf.whole_files import write

NAME = "table"
HELP = "join evaluations into one table: percent of the unpruned model, by task"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="output directories of tprl evaluate, finished or not; those of the same data are replicates",
    )
    parser.add_argument(
        "--output-dir",
        default="tprl_output/table",
        metavar="DIR",
        help="for table.md, table.tex and table.json (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    from tprl_hf.evaluation.runs_table import as_json, as_latex, as_texts, join_runs, read_run
    from tprl_hf.evaluation.tables import as_markdown

    from .tables import format_table

    runs = [read_run(Path(folder)) for folder in arguments.folders]
    table = as_texts(lines := join_runs(runs))
    unfinished = [
        f"{run.folder}: {' '.join(name)} lacks {number} answers and is left out; run its command again."
        for run in runs
        for name, number in run.unfinished.items()
    ]
    others = [
        f"{one.folder} and {other.folder} ask the same questions, and {100 * one.unpruned:.1f} and "
        f"{100 * other.unpruned:.1f} % of their unpruned answers are right. They are read as replicates of one model; "
        "for two models make two tables."
        for one, other in pairwise(sorted(runs, key=lambda run: run.questions))
        if one.questions == other.questions and abs(one.unpruned - other.unpruned) > 0.005
    ]
    notes = [
        "Numbers: mean score in percent of the unpruned model's on the same questions (its own accuracy in "
        "parentheses); ±: standard deviation over seeds and runs; in brackets paired 95 % bootstrap intervals over "
        "images (2000 resamples); mean: of the tasks' percentages.",
        "tokens, first layer: visual tokens that enter the LLM; mean of layers: over its layers. fastv and sparsevlm "
        "run the first layers on all tokens before they choose, which counts in both.",
        f"Command: tprl table {' '.join(arguments.folders)}",
    ]
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "table.md", "\n".join([as_markdown(table), *notes, *others, *unfinished]) + "\n")
    write(folder / "table.tex", as_latex(table))
    write(folder / "table.json", json.dumps({"command": notes[-1], "rows": as_json(lines)}, indent=1) + "\n")
    print(format_table(table))
    print("\n".join(notes))
    for line in (*others, *unfinished):
        print(line, file=sys.stderr)
    print(f"Written: {folder}/table.md, table.tex and table.json")
    return 0
