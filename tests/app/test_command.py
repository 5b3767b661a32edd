"""`tprl app` says at once, in one line, what keeps it from showing the page."""

import socket
from pathlib import Path

import pytest

from tests.test_processors import run_without
from tprl_hf.cli.main import main

DOCS = Path(__file__).parents[2] / "docs"


def test_without_gradio_it_says_what_to_install():
    done = run_without("from tprl_hf.cli.main import main; sys.exit(main(['app']))", "gradio")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    # in a new environment pip does not know this package by its name
    assert last.startswith("tprl app: error: tprl app needs gradio (") and "pip" not in last
    assert last.endswith("docs/app.md says how.") and '-e ".[demo]"' in (DOCS / "app.md").read_text()


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys):
    pytest.importorskip("gradio", reason="without gradio there is no page: make test-app")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert f"Cannot listen at 127.0.0.1, port {port}" in err and "Loading" not in err
