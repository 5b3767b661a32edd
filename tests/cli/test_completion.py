import os
import shutil
import subprocess

import pytest

from tests.test_processors import run_without
from tprl_hf.cli.main import COMMANDS, main
from tprl_hf.pruners import PRUNERS

COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
$(complete -p tprl | sed 's/.*-F \\([^ ]*\\) .*/\\1/') tprl "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_bash_completes_commands_options_and_choices(tmp_path, capsys):
    pytest.importorskip("shtab")
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "tprl.bash"
    script.write_text(capsys.readouterr().out)

    def complete(*words: str) -> set[str]:
        command = ["bash", "-c", COMPLETE, "bash", str(script), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
        return {line.strip() for line in done.stdout.splitlines()}

    assert {command.NAME for command in COMMANDS} <= complete("tprl", "")
    assert complete("tprl", "gen") == {"generate"}
    assert complete("tprl", "generate", "--thr") == {"--threshold"}
    assert {name for name in PRUNERS if name.startswith("vis")} == complete("tprl", "generate", "--pruner", "vis")


def test_without_its_package_it_is_one_line():
    code = "from tprl_hf.cli.main import main; sys.exit(main(['completion', 'zsh']))"
    done = run_without(code, "shtab")
    assert done.returncode == 2
    assert done.stderr == "tprl completion: error: No module named 'shtab': pip install 'tprl_hf[completion]'.\n"
