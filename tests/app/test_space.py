"""The folder of a Space: it needs what setup.py says, the Hub understands it, and its code is its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import tprl_hf
from tprl_hf.app.space import write_space
from tprl_hf.cli.main import main

ROOT = Path(__file__).parents[2]
APP = Path(tprl_hf.__file__).parent / "app" / "space"


def listed(block: str) -> set[str]:
    return set(re.findall(r'"([^"]+)"', block))


def test_it_needs_what_setup_py_says():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    base = re.search(r"^INSTALL = \[(.*?)^\]", setup, re.M | re.S)[1]
    demo = re.search(r'^    "demo": \[(.*?)\],$', setup, re.M | re.S)[1]
    lines = (APP / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {line for line in lines if not line.startswith("#")} == listed(base) | listed(demo)


def test_its_first_lines_are_those_of_a_space():
    _, front, _ = (APP / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["sdk"] == "gradio" and (APP / front["app_file"]).is_file()
    requirement = next(line for line in (APP / "requirements.txt").read_text().splitlines() if "gradio" in line)
    assert Requirement(requirement).specifier.contains(front["sdk_version"])
    assert f'python_requires=">={front["python_version"]}"' in (ROOT / "setup.py").read_text()
    # as the Hub checks them
    assert len(front["title"]) <= 60 and len(front["emoji"]) == 1
    assert {front["colorFrom"], front["colorTo"]} <= {
        *("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
    }


def test_the_command_writes_a_folder_whose_code_is_its_own(tmp_path, capsys):
    assert main(["app", "me/llava-tprl", "--space", str(tmp_path / "space")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "space" / name) for name in ("README.md", "app.py", "requirements.txt")
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["space"]
    assert "MODEL = 'me/llava-tprl'  # a TPRL" in (tmp_path / "space" / "app.py").read_text()
    code = "import tprl_hf, tprl_hf.app.space as a; print(tprl_hf.__file__, a.__file__, tprl_hf.embedded_checkpoint())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "space", env={"PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(Path(place).is_relative_to(tmp_path / "space") for place in done.stdout.split())


def test_what_a_space_cannot_be_is_refused(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="a Space is written into a new folder"):
        write_space(tmp_path / "there")
    with pytest.raises(ValueError, match="lies on this machine, where a Space cannot read it: tprl push it"):
        write_space(tmp_path / "space", str(tmp_path / "there"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
