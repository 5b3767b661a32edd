"""Everything a checkout needs, with nothing but Python: a virtual environment in `.venv`, the demo, the tests.

    python3 dev.py demo           sets up, then runs `tprl demo` on the embedded model
    python3 dev.py test           sets up, then runs ruff, mypy, bandit and pytest
    python3 dev.py test-newest    runs the short suite with the newest releases that setup.py allows, in `.venv-newest`
    python3 dev.py test-floors    runs the short suite with the oldest releases that it allows, in `.venv-floors`
    python3 dev.py format         sets up, then lets ruff rewrite what it can
    python3 dev.py setup          only sets up

What follows the command is handed on: `python3 dev.py demo --num-samples 3`, `python3 dev.py test tests/cli -x`.
"""

# Annotations stay texts, so that an old Python comes as far as the line that tells it is too old.
from __future__ import annotations

import hashlib
import math
import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_PYTHON = (3, 11)
DAY = 24 * 60 * 60.0


def run(*command: str | Path, **environment: str) -> int:
    """Runs a command in the checkout, with `environment` for the variables that the user has not set."""
    shown = (part.relative_to(ROOT) if isinstance(part, Path) else part for part in command)
    print("$ " + " ".join(map(str, shown)), flush=True)
    return subprocess.run([str(part) for part in command], cwd=ROOT, env={**environment, **os.environ}).returncode


def pins() -> dict[str, str]:
    """The releases that the tests pass with, by name."""
    return dict(re.findall(r"^([\w\-]+)==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))


def newest() -> dict[str, str]:
    """No pins, but for torch: where a CPU build is offered, it is that of the pinned release."""
    return {"torch": pins()["torch"]}


def floors() -> dict[str, str]:
    """The oldest releases that setup.py allows; torch as above."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    return {**dict(re.findall(r'"([\w\-]+)(?:\[\w+\])?>=([\w.]+)', setup)), **newest()}


@dataclass(frozen=True)
class Environment:
    """
    A virtual environment of the checkout.

    Args:
        folder (`str`): where it lies.
        releases (`Callable`): gives the releases that it is made of; others are the newest.
        max_age (`float`): after so many seconds it is made anew.
    """

    folder: str
    releases: Callable[[], dict[str, str]]
    max_age: float = math.inf

    @property
    def path(self) -> Path:
        return ROOT / self.folder

    @property
    def bin(self) -> Path:
        return self.path / ("Scripts" if os.name == "nt" else "bin")

    @property
    def python(self) -> Path:
        return self.bin / "python"

    @property
    def unfinished(self) -> Path:
        return self.path / "install-unfinished"

    def python_works(self) -> bool:
        if not self.python.exists():
            return False
        return subprocess.run([str(self.python), "-m", "pip", "--version"], capture_output=True).returncode == 0


PINNED = Environment(".venv", pins)
NEWEST = Environment(".venv-newest", newest, max_age=DAY)
FLOORS = Environment(".venv-floors", floors)


def digest(environment: Environment, extra: str) -> str:
    """What the environment was made from: it is brought up to date when this changes."""
    parts = [extra, sys.version, (ROOT / "setup.py").read_text(encoding="utf-8"), str(environment.releases())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def stamp(environment: Environment, extra: str) -> Path:
    return environment.path / f"installed-{extra or 'base'}"


def is_outdated(environment: Environment) -> bool:
    made = environment.path / "pyvenv.cfg"
    return made.exists() and time.time() - made.stat().st_mtime > environment.max_age


def is_installed(environment: Environment, extra: str) -> bool:
    path = stamp(environment, extra)
    is_current = path.is_file() and path.read_text() == digest(environment, extra)
    return is_current and not is_outdated(environment) and not environment.unfinished.exists()


def set_up(environment: Environment = PINNED, extra: str = "") -> None:
    """
    Installs the package in place, with the environment's releases; does nothing where that has been done.

    Args:
        environment (`Environment`, *optional*): which one; `.venv` with the pinned releases by default.
        extra (`str`, *optional*, defaults to `""`):
            The extra of setup.py to install with it. "dev" holds all that the base holds.
    """
    if sys.version_info < OLDEST_PYTHON:
        wanted, found = (".".join(map(str, version)) for version in (OLDEST_PYTHON, sys.version_info[:3]))
        sys.exit(f"Python {wanted} or newer is needed, this is {found}. Call dev.py with a newer one.")
    if is_installed(environment, extra) and environment.python_works():
        return
    started = time.monotonic()
    # pip takes a package that it was writing when it was cut off for an installed one: start over.
    # And it keeps what it finds installed: the newest releases come into an empty environment only.
    if environment.unfinished.exists() or is_outdated(environment) or not environment.python_works():
        print(f"Making {environment.folder} ...", flush=True)
        try:
            venv.EnvBuilder(clear=True, with_pip=True).create(environment.path)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"No virtual environment could be made ({error}). On Debian: apt install python3-venv")
    environment.unfinished.touch()
    releases = environment.path / "constraints.txt"
    releases.write_text("".join(f"{name}=={release}\n" for name, release in environment.releases().items()))
    target = f".[{extra}]" if extra else "."
    print("Installing; the first time takes some minutes and 2 GB or more ...", flush=True)
    code = run(environment.python, "-m", "pip", "install", "--quiet", "-e", target, "-c", releases)
    if code:
        sys.exit(f"pip failed with exit code {code}; its message is above. The next call starts over.")
    for done in {"", extra}:
        stamp(environment, done).write_text(digest(environment, done))
    environment.unfinished.unlink()
    print(f"Set up in {time.monotonic() - started:.0f} s", flush=True)


def demo(arguments: list[str]) -> int:
    set_up()
    return run(PINNED.bin / "tprl", "demo", *arguments)


def run_pytest(environment: Environment, arguments: list[str]) -> int:
    workers = min(os.cpu_count() or 1, 4)
    parallel = ["-n", str(workers)] if workers > 1 else []
    # One thread for each worker; and whoever needs a download should fail here rather than at a user's.
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return run(environment.python, "-m", "pytest", "-q", *parallel, *arguments, **variables)


def test(arguments: list[str]) -> int:
    """All checks are made, whatever the first ones say; pytest comes last, so that its closing line does."""
    set_up(extra="dev")
    codes = [
        run(PINNED.python, "-m", "ruff", "check", "."),
        run(PINNED.python, "-m", "ruff", "format", "--check", "."),
        run(PINNED.python, "-m", "mypy"),
        run(PINNED.python, "-m", "bandit", "-q", "-r", "-c", "pyproject.toml", "tprl_hf", "dev.py", "setup.py"),
        run_pytest(PINNED, arguments),
    ]
    if any(codes[:-1]):
        print("ruff, mypy or bandit found something: see above, before pytest's output", file=sys.stderr)
    return next((code for code in reversed(codes) if code), 0)


def test_short(environment: Environment, arguments: list[str]) -> int:
    """What users do first, with other releases than the pinned ones."""
    set_up(environment, "dev")
    return run_pytest(environment, ["-m", "short", *arguments])


def test_newest(arguments: list[str]) -> int:
    return test_short(NEWEST, arguments)


def test_floors(arguments: list[str]) -> int:
    return test_short(FLOORS, arguments)


def format_code(arguments: list[str]) -> int:
    set_up(extra="dev")
    check = run(PINNED.python, "-m", "ruff", "check", "--fix", ".", *arguments)
    return check | run(PINNED.python, "-m", "ruff", "format", ".")


def setup(arguments: list[str]) -> int:
    set_up(extra=arguments[0] if arguments else "dev")
    return 0


COMMANDS = {
    "demo": demo,
    "test": test,
    "test-newest": test_newest,
    "test-floors": test_floors,
    "format": format_code,
    "setup": setup,
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 2
    return COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
