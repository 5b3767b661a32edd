import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub.stand_in import HubStandIn

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


@pytest.fixture(scope="session")
def hub() -> Iterator[HubStandIn]:
    with HubStandIn(dict(USERS)) as server:
        yield server


@pytest.fixture
def environment(hub, tmp_path) -> dict[str, str]:
    """That of a process whose Hub is the stand-in, with caches of its own and no token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    return {
        **kept,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def run(environment, tmp_path) -> Callable[..., str]:
    """Runs Python code in a fresh process and returns what it prints."""

    def run(
        code: str,
        *arguments: object,
        token: str | None = "hf_mine",
        installed: bool = True,
        home: str = "hf_home",
        fails: bool = False,
        **variables: str,
    ) -> str:
        """
        Args:
            code: with `sys.argv[1:]` = `arguments`; sees `tests` if `installed`.
            token: `HF_TOKEN`.
            installed: whether `tprl_hf` can be imported.
            home: folder of the caches below the test's own; another one is empty.
            fails: whether an error is expected; stderr is returned then.
        """
        env = {**environment, "HF_HOME": str(tmp_path / home), **variables}
        if token is not None:
            env["HF_TOKEN"] = token
        script = code if installed else NOT_INSTALLED + code
        command = [sys.executable, "-c", script, *map(str, arguments)]
        folder = ROOT if installed else tmp_path
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    return run
