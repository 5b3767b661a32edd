"""
Makes the notebooks of the examples that have pictures: runs the cells of NAME.py in order and writes NAME.ipynb.

    python examples/make_notebooks.py                    # all
    python examples/make_notebooks.py 01_generate        # one

A script is the only source of its notebook. `# %%` begins a cell, `# %% [markdown]` one of text.
"""

import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
NOTEBOOKS = ("01_generate", "02_compare_pruners", "04_train_small")
CELL = re.compile(r"^# %%( \[markdown\])?\n", re.M)


def cells_of(source: str) -> list[tuple[str, str]]:
    """Kind, `markdown` or `code`, and text of each cell of a script."""
    _, *parts = CELL.split(source)
    cells = []
    for is_text, body in zip(parts[::2], parts[1::2], strict=True):
        text = re.sub(r"^# ?", "", body, flags=re.M) if is_text else body
        cells.append(("markdown" if is_text else "code", text.strip("\n")))
    return cells


def shown(value: Any) -> list[dict[str, Any]]:
    """What a notebook shows of the value that a cell ends with."""
    if value is None:
        return []
    data: dict[str, Any] = {"text/plain": [re.sub(r" at 0x\w+", "", repr(value))]}
    if hasattr(value, "_repr_png_"):
        data["image/png"] = base64.b64encode(value._repr_png_()).decode()
    return [{"output_type": "execute_result", "metadata": {}, "data": data}]


def run_cell(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs a cell among `names`; its outputs: what it prints, and the value of an expression at its end."""
    body = ast.parse(source).body
    last = ast.Expression(body.pop().value) if body and isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        if last is not None:
            value = eval(compile(last, "cell", "eval"), names)
    lines = printed.getvalue().splitlines(keepends=True)
    stream = [{"output_type": "stream", "name": "stdout", "text": lines}] if lines else []
    return [*stream, *shown(value)]


def make(name: str) -> dict[str, Any]:
    """The notebook of the script `name`, without its ending; as `json.load` reads one."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells: list[dict[str, Any]] = []
    for kind, text in cells_of((FOLDER / f"{name}.py").read_text(encoding="utf-8")):
        lines = text.splitlines(keepends=True)
        cell = {"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": lines}
        if kind == "code":
            number = sum(one["cell_type"] == "code" for one in cells) + 1
            cell |= {"execution_count": number, "outputs": run_cell(text, names)}
            for output in cell["outputs"]:
                if output["output_type"] == "execute_result":
                    output["execution_count"] = number
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def main(names: list[str]) -> None:
    here = Path.cwd()
    for name in names or NOTEBOOKS:
        with tempfile.TemporaryDirectory() as scratch:  # for what the cells write
            os.chdir(scratch)
            notebook = make(name)
            os.chdir(here)
        path = FOLDER / f"{name}.ipynb"
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
