"""The tests that docs/reliability.md and SECURITY.md name are there."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def named_tests(page: str) -> list[tuple[str, str]]:
    """File and function, or file and nothing, of each test that a page names; `...::` is the file before."""
    text = (TESTS.parent / page).read_text(encoding="utf-8")
    found, file = [], ""
    for name, function in re.findall(r"`((?:\w+/)*\w+\.py|\.\.\.|(?:\w+/)+(?=`))(?:::(\w+))?`", text):
        file = file if name == "..." else name
        found.append((file, function))
    return [(file, function) for file, function in found if file != "tests/"]


@pytest.mark.parametrize(("page", "at_least"), [("docs/reliability.md", 30), ("SECURITY.md", 8)])
def test_a_promise_has_its_test(page, at_least):
    found = named_tests(page)
    assert len(found) >= at_least
    for file, function in found:
        path = TESTS / file
        assert path.exists(), file
        if function:
            names = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
            assert function in names, f"{file}::{function}"
        else:
            assert path.is_file() or list(path.glob("test_*.py")), file
