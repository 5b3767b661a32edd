"""docs/hub.md is true: its Python runs from top to bottom against the stand-in, and its commands are understood."""

import re
import shlex
from pathlib import Path

from tests.families.tiny_models import build
from tests.families.tiny_processor import make_processor
from tprl_hf.cli.main import make_parser

PAGE = Path(__file__).parents[2] / "docs" / "hub.md"


def test_the_python_of_the_page_runs(hub, run, tmp_path):
    build("llava").save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    hub.put("llava-hf/llava-1.5-7b-hf", {**files, "README.md": b"---\nlicense: llama2\n---\n"})
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 4
    run("\n".join(blocks))
    assert b"license: llama2" in hub.files("me/llava-tprl")["README.md"]
    assert hub.repo("me/llava-tprl-merged").private
    assert b"| rows | 4 |" in hub.files("me/demonstrations", "datasets")["README.md"]


def test_the_commands_of_the_page_are_understood():
    commands = re.findall(r"^tprl (.*)$", PAGE.read_text(), re.M)
    assert len(commands) == 5
    for command in commands:
        make_parser().parse_args(shlex.split(command))
