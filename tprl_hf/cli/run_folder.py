"""The directory of a run of `tprl evaluate`: which one it is, and whose answers lie there. Imports no torch."""

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tprl_hf.whole_files import write

from .arguments import loading_words

RUNS = "tprl_output/evaluate"
# not the name of the data: a file may change under its name, or move
DEPENDS_ON = (
    *("questions", "split", "seed", "num_samples", "max_new_tokens", "score"),
    *("settings", "bounds", "generation", "processor", "weights", "dtype"),
)
PLOT = "results.png"
PAGE = "results.html"
WRITTEN = (
    *("run.json", "questions.json", "answers.jsonl", "broken.json"),
    *("results.json", "results.csv", "results.md", PLOT, PAGE),
)


def default_folder(arguments: argparse.Namespace) -> Path:
    """One for each model, data and way to ask, so that no command refuses the next one; pruners and budgets share."""
    names = ("model", "data", "include_path", "split", "seed", "num_samples", "max_new_tokens", "metric")
    asked = json.dumps([vars(arguments)[name] for name in names]) + loading_words(arguments)
    stems = (Path(arguments.model or "embedded").name, Path(arguments.data).stem)
    name = "-".join(re.sub(r"[^\w.]+", "-", stem) for stem in stems)
    return Path(RUNS) / f"{name}-{hashlib.sha256(asked.encode()).hexdigest()[:6]}"


def refuse_other_run(folder: Path, described: dict[str, Any]) -> None:
    """
    Args:
        folder (`Path`): Where a run is to write.
        described (`dict`): What its answers depend on, as far as it is known yet.

    Raises:
        `ValueError`: If the folder holds answers that depend on something else.
    """
    path = folder / "run.json"
    if not path.exists():
        return
    advice = f"pass another --output-dir, or --overwrite to delete what is in {folder}."
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: {advice}") from None
    own = {name: described[name] for name in DEPENDS_ON if name in described}
    other = [
        f"{name} {before[name]} instead of {value}"
        for name, value in own.items()
        if name in before and before[name] != value and value is not None  # the split of own data once was "test"
    ]
    if other:
        raise ValueError(f"{folder} holds the answers of another run ({', '.join(other)}): {advice}")


def claim_folder(folder: Path, described: dict[str, Any], overwrite: bool) -> None:
    """
    Notes in the folder what its answers depend on; with `overwrite` after an earlier run's files were deleted.

    Raises:
        `ValueError`: If it holds answers that depend on something else.
    """
    if overwrite:
        for name in WRITTEN:
            (folder / name).unlink(missing_ok=True)
    refuse_other_run(folder, described)
    own = {name: described[name] for name in DEPENDS_ON}
    write(folder / "run.json", json.dumps(own, indent=1) + "\n")
