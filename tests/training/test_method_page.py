"""docs/method.md: each equation has its row, and the code and the test that it names are there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "method.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d", line)
]


def names_in(path: Path) -> set[str]:
    """Functions and classes of a module, methods as CLASS.METHOD."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def test_each_equation_has_one_row():
    numbers: list[int] = []
    for equations, *_ in ROWS:
        for part in equations.split(","):
            first, _, last = part.strip().partition("–")
            numbers += range(int(first), int(last or first) + 1)
    assert numbers == list(range(1, 25))


def test_the_code_and_the_test_of_a_row_are_there():
    for equations, _, code, test in ROWS:
        file, name = re.fullmatch(r"`(\S+)` `(\S+)`", code).groups()
        assert name in names_in(ROOT / "tprl_hf" / file), equations
        file, name = re.fullmatch(r"`(\S+)::(\S+)`", test).groups()
        assert name in names_in(ROOT / "tests" / file), equations
