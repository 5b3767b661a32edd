"""Everything a checkout needs, with nothing but Python: a virtual environment in `.venv`, the demo, the tests.

    python3 dev.py demo      sets up, then runs `tprl demo` on the embedded model
    python3 dev.py test      sets up, then runs ruff, mypy and pytest
    python3 dev.py format    sets up, then lets ruff rewrite what it can
    python3 dev.py setup     only sets up

What follows the command is handed on: `python3 dev.py demo --num-samples 3`, `python3 dev.py test tests/cli -x`.
"""

# Annotations stay texts, so that an old Python comes as far as the line that tells it is too old.
from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / "python"
UNFINISHED = VENV / "install-unfinished"
OLDEST_PYTHON = (3, 11)


def run(*command: str | Path, **environment: str) -> int:
    """Runs a command in the checkout, with `environment` for the variables that the user has not set."""
    print("$ " + " ".join(Path(part).name if part == PYTHON else str(part) for part in command), flush=True)
    return subprocess.run([str(part) for part in command], cwd=ROOT, env={**environment, **os.environ}).returncode


def digest(extra: str) -> str:
    """What the environment was made from: it is brought up to date when this changes."""
    parts = [
        extra,
        sys.version,
        *((ROOT / name).read_text(encoding="utf-8") for name in ("setup.py", "constraints.txt")),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def stamp(extra: str) -> Path:
    return VENV / f"installed-{extra or 'base'}"


def is_installed(extra: str) -> bool:
    return stamp(extra).is_file() and stamp(extra).read_text() == digest(extra) and not UNFINISHED.exists()


def python_works() -> bool:
    if not PYTHON.exists():
        return False
    return subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True).returncode == 0


def set_up(extra: str = "") -> None:
    """
    Installs the package in place into `.venv`, with the pinned versions; does nothing where that has been done.

    Args:
        extra (`str`, *optional*, defaults to `""`):
            The extra of setup.py to install with it. "dev" holds all that the base holds.
    """
    if sys.version_info < OLDEST_PYTHON:
        wanted, found = (".".join(map(str, version)) for version in (OLDEST_PYTHON, sys.version_info[:3]))
        sys.exit(f"Python {wanted} or newer is needed, this is {found}. Call dev.py with a newer one.")
    if is_installed(extra) and python_works():
        return
    started = time.monotonic()
    # pip takes a package that it was writing when it was cut off for an installed one: start over.
    if UNFINISHED.exists() or not python_works():
        print(f"Making {VENV.name} ...", flush=True)
        try:
            venv.EnvBuilder(clear=True, with_pip=True).create(VENV)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"No virtual environment could be made ({error}). On Debian: apt install python3-venv")
    UNFINISHED.touch()
    target = f".[{extra}]" if extra else "."
    print("Installing; the first time takes some minutes and 2 GB or more ...", flush=True)
    code = run(PYTHON, "-m", "pip", "install", "--quiet", "-e", target, "-c", "constraints.txt")
    if code:
        sys.exit(f"pip failed with exit code {code}; its message is above. The next call starts over.")
    for done in {"", extra}:
        stamp(done).write_text(digest(done))
    UNFINISHED.unlink()
    print(f"Set up in {time.monotonic() - started:.0f} s", flush=True)


def demo(arguments: list[str]) -> int:
    set_up()
    return run(BIN / "tprl", "demo", *arguments)


def test(arguments: list[str]) -> int:
    """All checks are made, whatever the first ones say; pytest comes last, so that its closing line does."""
    set_up("dev")
    codes = [
        run(PYTHON, "-m", "ruff", "check", "."),
        run(PYTHON, "-m", "ruff", "format", "--check", "."),
        run(PYTHON, "-m", "mypy"),
    ]
    workers = min(os.cpu_count() or 1, 4)
    parallel = ["-n", str(workers)] if workers > 1 else []
    # One thread for each worker; and whoever needs a download should fail here rather than at a user's.
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    codes.append(run(PYTHON, "-m", "pytest", "-q", *parallel, *arguments, **environment))
    if any(codes[:-1]):
        print("ruff or mypy found something: see above, before pytest's output", file=sys.stderr)
    return next((code for code in reversed(codes) if code), 0)


def format_code(arguments: list[str]) -> int:
    set_up("dev")
    return run(PYTHON, "-m", "ruff", "check", "--fix", ".", *arguments) | run(PYTHON, "-m", "ruff", "format", ".")


def setup(arguments: list[str]) -> int:
    set_up(arguments[0] if arguments else "dev")
    return 0


COMMANDS = {"demo": demo, "test": test, "format": format_code, "setup": setup}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 2
    return COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
