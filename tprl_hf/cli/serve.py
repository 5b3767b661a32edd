"""Serve a model over HTTP by the OpenAI protocol, with a budget for each request. See docs/serving.md."""

import argparse
import socket
import sys
from pathlib import Path

from tprl_hf.missing_packages import of_another_build

from .arguments import (
    add_budget_arguments,
    add_loading_arguments,
    add_model_argument,
    add_pruner_arguments,
    positive_int,
)

NAME = "serve"
HELP = "answer over HTTP, by the OpenAI protocol"
MAX_CONNECTIONS = 64  # more get 503 at once instead of a place in a queue that fills the memory
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument(
        "--name", metavar="NAME", help="what clients call it (default: MODEL, of a directory the last part)"
    )
    parser.add_argument(
        "--host", default=LOOPBACK[0], help=f"address to listen at (default: {LOOPBACK[0]}, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    add_budget_arguments(parser)
    add_pruner_arguments(parser)
    parser.add_argument(
        "--max-request-mb", type=positive_int, default=20, metavar="MB", help="larger ones get 413 (default: 20)"
    )
    parser.add_argument(
        "--allow-remote-images",
        action="store_true",
        help="fetch images from the http addresses in requests; clients can then make this machine ask any address "
        "that it can reach",
    )
    add_loading_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    try:
        import uvicorn

        from tprl_hf.serving.server import build_app
    except ImportError as error:
        needs = f"tprl serve needs more packages ({error}): pip install 'tprl_hf[serve]'"
        raise ValueError(of_another_build(error) or needs) from error
    import tprl_hf
    from tprl_hf.serving.chat_requests import Limits

    from .loading import load_named_model, pruner_and_budget, using_pruner

    # bound before the model is loaded, so that a port that is taken is told at once
    listener = bind(arguments.host, arguments.port)
    model, processor = load_named_model(arguments)
    pruner_name, pruner, budget = pruner_and_budget(model, arguments)
    path = arguments.model or tprl_hf.embedded_checkpoint()
    name = arguments.name or (Path(path).resolve().name if Path(path).is_dir() else path)
    limits = Limits(arguments.max_request_mb * 1_000_000, arguments.allow_remote_images)
    app = build_app(model, processor, name, limits, budget)
    if arguments.host not in LOOPBACK:
        print(f"tprl serve: whoever reaches {arguments.host} can ask; nobody is asked who they are.", file=sys.stderr)
    host, port = listener.getsockname()[:2]
    words = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in budget.items()]
    default = ", ".join(words) or "as the checkpoint says"
    print(
        f"Serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 ({pruner_name}, {default})",
        flush=True,
    )
    config = uvicorn.Config(app, log_level="warning", limit_concurrency=MAX_CONNECTIONS)
    with using_pruner(model, pruner):
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket at an address, not listening yet. Raises `ValueError` where it cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(f"Cannot listen at {host}, port {port} ({error}): pass another --host or --port.") from error
    return listener
