import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.stand_ins.hub import HubStandIn

ROOT = Path(__file__).parents[2]
USERS = {"hf_mine": "me", "hf_others": "other"}
# As if tprl_hf had never been installed, whatever way the package is on the path here.
NOT_INSTALLED = """
import sys
class NotInstalled:
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "tprl_hf":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
sys.meta_path.insert(0, NotInstalled())
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    with HubStandIn(dict(USERS)) as server:
        yield server


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory) -> Callable[..., str]:
    """Runs Python code, or a command, in a fresh process whose Hub is the stand-in, and returns what it prints."""

    def run(
        code: str | list[str],
        *arguments: object,
        token: str | None = "hf_mine",
        home: Path | None = None,
        installed: bool = True,
        fails: bool = False,
        **variables: str,
    ) -> str:
        """
        Args:
            code: Python, with `sys.argv[1:]` = `arguments`, or the words of a command.
            token: the `HF_TOKEN`; none is known without.
            home: where the caches lie; empty ones when `None`.
            installed: whether `tprl_hf` (and `tests`) can be imported.
            fails: an error is expected, and stderr returned.
        """
        folder = tmp_path_factory.mktemp("process")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment = {
            **kept,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home or folder),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            **({} if token is None else {"HF_TOKEN": token}),
            **variables,
        }
        if isinstance(code, str):
            code = [sys.executable, "-c", code if installed else NOT_INSTALLED + code]
        done = subprocess.run(
            [*code, *map(str, arguments)],
            cwd=ROOT if installed else folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    return run
