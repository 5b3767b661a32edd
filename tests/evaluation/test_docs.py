"""What docs/pruners.md and docs/evaluation.md promise."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.evaluation import pruner_costs
from tprl_hf.cli.evaluate import METRICS
from tprl_hf.cli.main import make_parser
from tprl_hf.evaluation import metrics
from tprl_hf.evaluation.flops import CONVENTIONS
from tprl_hf.pruners import PRUNERS, TokenPruner

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["pruners.md", "evaluation.md", "prune_or_shrink.md"])
def test_every_command_is_understood(page):
    for line in re.findall(r"^tprl (\w.*?)(?: > \S+)?(?:  +#.*)?$", (DOCS / page).read_text(), re.M):
        make_parser().parse_args(shlex.split(line))


def test_every_pruner_has_its_line():
    rows = re.findall(r"^\| `([\w-]+)` \| `(\w+)` \|", (DOCS / "pruners.md").read_text(), re.M)
    classes = {name: PRUNERS[name].__name__ for name in PRUNERS}
    assert dict(rows) == {**classes, "learned": "LearnedPruner", "oracle": "OraclePruner"}


def test_the_costs_of_pruners_are_those_of_the_file():
    found = json.loads(pruner_costs.RESULTS.read_text())
    assert {one["pruner"] for one in found["pruners"]} == {*PRUNERS, "learned"} and not found["refused"]
    make_parser().parse_args(shlex.split(found["command"])[1:])
    assert pruner_costs.section(found) in pruner_costs.PAGE.read_text()
    # as the page says of the default
    cost = {one["pruner"]: one["of_prefill"]["median"] for one in found["pruners"]}
    tower = {one["pruner"]: one["tower_ratio"]["median"] for one in found["pruners"]}
    rivals = ("cdpruner", "tome", "visionzip", "prumerge", "vispruner", "fastv", "sparsevlm")
    assert cost["divprune"] < min(cost[name] for name in rivals) and tower["divprune"] < 1.1


def test_every_metric_and_convention_has_its_line():
    text = (DOCS / "evaluation.md").read_text()
    modules = {Path(cls.__module__.replace(".", "/")).name for cls in (getattr(metrics, n) for n in metrics.__all__)}
    assert set(re.findall(r"^\| (?:`[\w-]+`)? ?\| `(\w+)` \|", text, re.M)) == modules
    assert set(re.findall(r"^\| `([\w-]+)` \| `\w+` \|", text, re.M)) == METRICS.keys()
    assert set(re.findall(r"^- `([\w-]+)`: ", text, re.M)) == set(CONVENTIONS)


def test_your_own_pruner_of_the_page_works():
    source = re.findall(r"^```python\n(.*?)^```", (DOCS / "pruners.md").read_text(), re.M | re.S)[-1]
    names: dict = {}
    exec(compile(source, "pruners.md", "exec"), names)
    assert issubclass(names["Brightest"], TokenPruner)
