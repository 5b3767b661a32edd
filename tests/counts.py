"""Counts of the code: how long, how branched, how many files one more of a kind takes.

python tests/counts.py             # of the working tree
python tests/counts.py c37bc01     # of a commit
"""

import ast
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = 5
COMPLEX = 10
LONG_SIGNATURE = 5
# One of each kind, by the names that code knows it by: these files must know that there is one more.
EXAMPLES = {
    "pruner": r"""["']cdpruner["']|(class |import |["'])CDPruner""",
    "algorithm": r"""["']grpo["']|TPRLGRPO|class GRPO""",
    "family": "qianfan_ocr",
}
CHECKLISTS = {
    "pruner": "Add a pruner",
    "family": "Add a family of LVLMs",
    "reward": "Add a reward",
    "algorithm": "Add an RL algorithm",
}


def functions(package: Path) -> list[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions and methods, with their files."""
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((path, node))
    return found


def longest(lengths: dict[str, int]) -> str:
    """The longest few, with their lines."""
    first = sorted(lengths.items(), key=lambda item: -item[1])[:SHOWN]
    return ", ".join(f"{name} {lines}" for name, lines in first)


def complex_functions(package: Path) -> list[str]:
    """Functions of complexity `COMPLEX` and more, as ruff finds them."""
    options = ["--isolated", "--select", "C901", "--config", f"lint.mccabe.max-complexity={COMPLEX - 1}"]
    command = [sys.executable, "-m", "ruff", "check", *options, "--output-format", "json", str(package)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    named = [re.search(r"`(\w+)` is too complex \((\d+)", each["message"]) for each in found]
    ranked = sorted(((int(match[2]), match[1]) for match in named if match), reverse=True)
    return [f"{name} {complexity}" for complexity, name in ranked]


def equal_signatures(package: Path) -> list[str]:
    """Names of functions with the same long list of parameters; a method and those that override it count once."""
    groups: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for _, node in functions(package):
        names = tuple(each.arg for each in node.args.args + node.args.kwonlyargs if each.arg not in ("self", "cls"))
        if len(names) >= LONG_SIGNATURE:
            groups[names].add(node.name)
    return [" = ".join(sorted(names)) for names in groups.values() if len(names) > 1]


def named_files(checklist: str) -> list[str]:
    """Files that a checklist of CONTRIBUTING.md names; tests and docs without a file name do not count."""
    return sorted(set(re.findall(r"[\w/<>]+\.(?:py|md)\b", checklist)))


def report(root: Path) -> None:
    """Prints the counts of the checkout at `root`."""
    package = root / "tprl_hf"
    sources = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    print("lines of the package:", sum(len(text.splitlines()) for text in sources.values()))
    print("longest files:", longest({path.name: len(text.splitlines()) for path, text in sources.items()}))
    lengths = {f"{p.stem}.{n.name}": (n.end_lineno or n.lineno) - n.lineno + 1 for p, n in functions(package)}
    print("longest functions, docstrings included:", longest(lengths))
    complexity = complex_functions(package)
    print(f"functions of complexity {COMPLEX} or more: {len(complexity)}; {', '.join(complexity[:SHOWN])}")
    print("type: ignore:", sum(text.count("# type: ignore") for text in sources.values()))
    equal = equal_signatures(package)
    print(f"equal signatures of {LONG_SIGNATURE} parameters or more: {len(equal)}; {', '.join(equal)}")
    contributing = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for kind, heading in CHECKLISTS.items():
        files = named_files(contributing.split(f"## {heading}\n")[1].split("\n## ")[0])
        print(f"files that CONTRIBUTING names for one more {kind}: {len(files)}; {', '.join(files)}")
    for kind, pattern in EXAMPLES.items():
        names = sorted(path.name for path, text in sources.items() if re.search(pattern, text))
        print(f"files of the package that know one {kind}: {len(names)}; {', '.join(names)}")


def main() -> None:
    if len(sys.argv) == 1:
        report(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "archive", sys.argv[1], "tprl_hf", "CONTRIBUTING.md"]
        archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
        tarfile.open(fileobj=io.BytesIO(archive)).extractall(folder, filter="data")
        report(Path(folder))


if __name__ == "__main__":
    main()
