"""CONTRIBUTING's checklists, walked through in a copy of the checkout: what a contributor adds is found everywhere.

A reward needs no file, and an algorithm is a pair and one row: `training/test_train_command.py` adds a toy of each.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families.more import OTHERS
from tprl_hf.modeling.family_adapters import ADAPTERS, SUPPORTED

ROOT = Path(__file__).parents[1]
FAMILY = "qianfan_ocr"

CENTER = '''"""Keeps the tokens in the middle of their image. Reads: places."""

from torch import Tensor

from tprl_hf.modeling.token_pruner import PruningInputs, TokenPruner


class CenterPruner(TokenPruner):
    """Scores each token by how near it is to the center of its image."""

    def score(self, inputs: PruningInputs) -> Tensor:
        return -(inputs.layout.positions() - 0.5).abs().amax(-1)
'''


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Package, tests and docs, to be changed; the embedded checkpoints are only linked."""
    for name in ("tprl_hf", "tests", "docs"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints", "results", "__pycache__")
        )
    (tmp_path / "tprl_hf" / "checkpoints").symlink_to(ROOT / "tprl_hf" / "checkpoints")
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "dev.py", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


# One process for all: what takes time is importing torch.
WALK = """
import sys
from pathlib import Path

import pytest

from tprl_hf.cli.main import main

page, matrix, row = sys.argv[1:4]
assert pytest.main([page]) == pytest.ExitCode.TESTS_FAILED, "the docs check must miss the row"
pruners = Path("docs/pruners.md")
first = "| `divprune` |"
pruners.write_text(pruners.read_text(encoding="utf-8").replace(first, f"{row}\\n{first}"), encoding="utf-8")
assert main(["evaluate", *sys.argv[4:]]) == 0
assert pytest.main(["-v", page, matrix]) == 0
"""


def test_a_pruner_is_one_file_one_line_and_one_row(checkout):
    (checkout / "tprl_hf" / "pruners" / "center.py").write_text(CENTER, encoding="utf-8")
    table = checkout / "tprl_hf" / "pruners" / "__init__.py"
    line = '        "center": "CenterPruner",\n        "divprune":'
    table.write_text(table.read_text(encoding="utf-8").replace('        "divprune":', line), encoding="utf-8")
    words = [
        "tests/evaluation/test_docs.py::test_every_pruner_has_its_line",
        "tests/pruners/test_pruners.py::test_budgets_are_exact_per_sample[center]",
        "| `center` | `CenterPruner` |  | the middle of the image | places | |",
        *("--pruners", "center", "--keep-ratios", "1/9", "--num-samples", "2", "--output-dir", "out"),
    ]
    seen = {**os.environ, "PYTHONPATH": str(checkout)}  # this copy, and no other
    done = subprocess.run([sys.executable, "-c", WALK, *words], cwd=checkout, env=seen, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    rows = json.loads((checkout / "out" / "results.json").read_text())["rows"]
    assert {row["pruner"] for row in rows} == {"none", "random", "center"}


def test_a_family_that_the_default_serves_is_two_lines():
    files = [path for room in ("tprl_hf", "tests/families", "tests/modeling") for path in (ROOT / room).rglob("*.py")]
    named = [path.name for path in files for line in path.read_text(encoding="utf-8").splitlines() if FAMILY in line]
    assert sorted(named) == ["family_adapters.py", "more.py"]
    assert FAMILY in SUPPORTED and FAMILY in OTHERS and FAMILY not in ADAPTERS
