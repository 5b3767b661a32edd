"""`make api` writes the reference of all public names, and nothing of this machine."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import tprl_hf
from tprl_hf import modeling, pruners, training

ROOT = Path(__file__).parents[1]


def test_the_reference_has_every_public_name(tmp_path):
    pytest.importorskip("pdoc")
    words = [sys.executable, str(ROOT / "docs" / "make_api.py"), str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "Warn" not in done.stderr, done.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    modules = runpy.run_path(str(ROOT / "docs" / "make_api.py"), run_name="listed")["MODULES"]
    assert {f"{name.replace('.', '/')}.html" for name in modules} <= pages.keys()
    for module in (tprl_hf, modeling, pruners, training):
        page = pages[f"{module.__name__.replace('.', '/')}.html"]
        missing = [name for name in module.__all__ if not name.startswith("_") and f'id="{name}"' not in page]
        assert missing == []
    assert not [name for name, page in pages.items() if str(ROOT) in page]
