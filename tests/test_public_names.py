"""Every public name is on docs/api.md, under its module, and the page names nothing else."""

import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import tprl_hf

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
TASKS_OF_LMMS_EVAL = "tprl_hf.evaluation.lmms_eval"  # needs an environment of its own


def public_names() -> dict[str, set[str]]:
    """What the package and its rooms offer, by their names."""
    packages = [info.name for info in pkgutil.walk_packages(tprl_hf.__path__, "tprl_hf.") if info.ispkg]
    names = {}
    for name in ("tprl_hf", *packages):
        if name == TASKS_OF_LMMS_EVAL:
            continue
        module = importlib.import_module(name)
        found = getattr(module, "__all__", [])
        assert len(set(found)) == len(found) and all(hasattr(module, public) for public in found), name
        if found:
            names[name] = set(found)
    return names


def names_on_the_page() -> dict[str, set[str]]:
    sections = re.split(r"^## `([\w.]+)`$", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    rows = {
        module: re.findall(r"^\| (`.*?) \|", text, re.M)
        for module, text in zip(sections[::2], sections[1::2], strict=True)
    }
    return {module: set(re.findall(r"`(\w+)`", " ".join(found))) for module, found in rows.items()}


def test_every_public_name_is_on_the_page_of_public_names():
    expected, found = public_names(), names_on_the_page()
    found["tprl_hf.modeling"] |= found["tprl_hf"] - {"embedded_checkpoint", "__version__"}  # as the page says
    assert found == expected and sum(map(len, found.values())) > 80


def test_help_says_something_of_every_public_name():
    for module, names in public_names().items():
        for name in names - {"__version__"}:
            public = getattr(importlib.import_module(module), name)
            if callable(public):
                assert public.__doc__, f"{module}.{name}"  # not that of its base


@pytest.mark.parametrize(
    ("old", "names"),
    [
        ("tprl_hf.evaluation.by_name", {"load_model": "tprl_hf.loading", "make_pruner": "tprl_hf.pruners.by_name"}),
        ("tprl_hf.evaluation.jsonl_samples", {"jsonl_samples": "tprl_hf.data.jsonl"}),
    ],
)
def test_names_that_moved_work_and_say_where_they_are_now(monkeypatch, old, names):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {'.* and '.join(names.values())}"):
        module = importlib.import_module(old)
    for name, place in names.items():
        assert getattr(module, name) is getattr(importlib.import_module(place), name)
