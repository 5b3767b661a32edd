"""The arrows of docs/architecture.md: who may import whom, and how."""

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tprl_hf"
MAX_LINES = 500

# `modeling <- pruners, hub, visualization <- report <- training, serving <- evaluation <- app <- cli`; `data` and
# `model_cards` import nothing of ours, and only `cli` and `embedded_checkpoint` of the root use `test_bed`. A trainer
# publishes what it saves and draws what it logs: `hub` and `visualization` lie below `training`. So does `report`,
# which says how the files look that its pages are made of.
MAY_IMPORT: dict[str, set[str]] = {
    "modeling": set(),
    "data": set(),
    "model_cards": set(),
    "test_bed": {"", "modeling", "data"},
    "pruners": {"", "modeling"},
    "hub": {"", "modeling", "model_cards"},
    "training": {"", "modeling", "pruners", "hub", "data", "visualization", "report"},
    "serving": {"", "modeling", "pruners"},
    "evaluation": {"", "modeling", "pruners", "training", "data", "model_cards", "report"},
    "visualization": {"", "modeling", "pruners"},
    "report": {"", "modeling", "visualization"},
    # the root: `tprl_hf/__init__.py`, what it needs to offer our classes to transformers, and loading by name
    "": {"", "modeling", "pruners", "test_bed"},
}
MAY_IMPORT["app"] = {"", "modeling", "pruners", "data", "evaluation", "visualization"}
MAY_IMPORT["cli"] = {*MAY_IMPORT}
# What modeling may import from outside: it travels with the weights and must run where only these are.
MODELING_NEEDS = {"torch", "transformers", "huggingface_hub", "safetensors"}  # the last two come with transformers
MAY_NEED_PEFT = "modeling/peft_adapter.py"  # where a model has a LoRA


def room_of(module: str) -> str:
    """The room a dotted module name lies in: "tprl_hf.pruners.random" -> "pruners"; "" is the root."""
    parts = module.split(".")[1:]
    return parts[0] if parts and parts[0] in MAY_IMPORT else ""


def violations(package: Path) -> list[str]:
    """Every import of the package that the rules forbid, and every module that is too long, as "file:line: why"."""
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        room = room_of(".".join(["tprl_hf", *inside.with_suffix("").parts]))
        source = path.read_text(encoding="utf-8")
        problems: list[tuple[int, str]] = []
        lines = len(source.splitlines())
        if lines >= MAX_LINES:
            problems.append((lines, f"a module has fewer than {MAX_LINES} lines"))
        if len(inside.parts) > 1 and room == "":
            problems.append((1, f"the folder {inside.parts[0]} has no place among the arrows"))
        if room == "modeling" and len(inside.parts) > 2:
            problems.append((1, "modeling is flat"))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                if node.level > 1:
                    problems.append((node.lineno, "between folders import absolutely, not with two dots"))
                elif room_of(f"tprl_hf.{node.module}") and len(inside.parts) == 1:
                    problems.append((node.lineno, "between folders import absolutely, not with one dot"))
                continue
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                # `from tprl_hf import modeling` names a room as well
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for module in modules:
                top = module.split(".")[0]
                if top == "tprl_hf":
                    target = room_of(module)
                    if target == room:
                        if room and len(inside.parts) == 2:  # a deeper folder can only reach its room absolutely
                            problems.append((node.lineno, f"inside {room} import with one dot, not {module}"))
                    elif target not in MAY_IMPORT[room]:
                        problems.append((node.lineno, f"{room or 'the root'} must not import {module}"))
                elif top == "peft" and inside.as_posix() == MAY_NEED_PEFT and node.col_offset:  # inside a function
                    continue
                elif room == "modeling" and top not in MODELING_NEEDS | sys.stdlib_module_names:
                    problems.append((node.lineno, f"modeling imports torch and transformers only, not {top}"))
        found += [f"{inside.as_posix()}:{line}: {why}" for line, why in problems]
    return found


def test_the_package_keeps_its_arrows():
    assert violations(PACKAGE) == []


def test_the_page_has_the_same_arrows():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = page[: page.index("## The model")]
    drawn = {}
    for name, imports in re.findall(r"^\| (?:`(\w+)(?:/|\.py)`|root: .*) \| .* \| (.*) \|$", rooms, re.M):
        listed = {word.strip("`") for word in imports.split(", ")} - {"none"}
        drawn[name] = {"" if word == "root" else word for word in listed}
    assert any("all rooms" in words for words in drawn.pop("cli"))
    assert drawn == {room: targets - {room} for room, targets in MAY_IMPORT.items() if room != "cli"}


@pytest.mark.parametrize(
    ("file", "source", "why"),
    [
        ("modeling/a.py", "from tprl_hf.pruners import RandomPruner", "modeling must not import tprl_hf.pruners"),
        ("modeling/a.py", "import tprl_hf", "modeling must not import tprl_hf"),
        ("modeling/a.py", "def f():\n    import numpy", "modeling imports torch and transformers only, not numpy"),
        ("modeling/a.py", "def f():\n    import peft", "modeling imports torch and transformers only, not peft"),
        ("modeling/peft_adapter.py", "import peft", "modeling imports torch and transformers only, not peft"),
        ("modeling/a.py", "from ..pruners import random", "not with two dots"),
        ("modeling/a.py", "from tprl_hf.modeling.keep_mask import top_k", "inside modeling import with one dot"),
        ("modeling/deep/a.py", "", "modeling is flat"),
        ("pruners/a.py", "from tprl_hf.training import PPOConfig", "pruners must not import tprl_hf.training"),
        ("training/a.py", "import tprl_hf.evaluation.benchmark", "training must not import tprl_hf.evaluation"),
        ("evaluation/a.py", "from tprl_hf import visualization", "evaluation must not import tprl_hf.visualization"),
        ("visualization.py", "from tprl_hf.evaluation import benchmark", "visualization must not import"),
        ("visualization.py", "from .modeling import keep_mask", "not with one dot"),
        ("data/a.py", "from tprl_hf.modeling import keep_mask", "data must not import tprl_hf.modeling"),
        ("hub/a.py", "from tprl_hf.training import rewards", "hub must not import tprl_hf.training"),
        ("training/a.py", "from tprl_hf.test_bed import model", "training must not import tprl_hf.test_bed"),
        ("test_bed/a.py", "from tprl_hf import training", "test_bed must not import tprl_hf.training"),
        ("loading.py", "from tprl_hf.evaluation import by_name", "the root must not import tprl_hf.evaluation"),
        ("training/a.py", "from tprl_hf.cli.main import main", "training must not import tprl_hf.cli"),
        ("helpers/a.py", "", "the folder helpers has no place"),
        ("pruners/a.py", "x = 1\n" * MAX_LINES, "a module has fewer than 500 lines"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, source, why):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    found = violations(tmp_path)
    assert len(found) == 1 and found[0].startswith(f"{file}:") and why in found[0], found


def test_what_the_rules_allow_is_let_through(tmp_path):
    allowed = {
        "__init__.py": "from .auto_registration import register",
        "modeling/a.py": "import math\nimport torch\nimport transformers.utils\nfrom .keep_mask import f",
        "pruners/a.py": "import torch\nfrom tprl_hf.modeling.token_pruner import TokenPruner\nfrom .random import x",
        "cli/demo.py": "import tprl_hf\nfrom tprl_hf import visualization\nfrom tprl_hf.data import mosaic_vqa",
        "evaluation/metrics/anls/anls.py": "from tprl_hf.answer_rules import anls_score",
        "checkpoints/mosaic-llava/config.json": "{}",
    }
    for file, source in allowed.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(source)
    assert violations(tmp_path) == []
