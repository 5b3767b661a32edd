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
    port,
    positive_int,
)

NAME = "serve"
HELP = "answer over HTTP, by the OpenAI protocol"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument(
        "--name", metavar="NAME", help="what clients call it (default: MODEL, of a directory the last part)"
    )
    parser.add_argument(
        "--host", default=LOOPBACK[0], help=f"address to listen at (default: {LOOPBACK[0]}, this machine only)"
    )
    parser.add_argument("--port", type=port, default=8000, help="0 takes a free one (default: 8000)")
    add_budget_arguments(parser)
    add_pruner_arguments(parser)
    parser.add_argument(
        "--max-request-mb", type=positive_int, default=20, metavar="MB", help="larger ones get 413 (default: 20)"
    )
    parser.add_argument(
        "--max-images", type=positive_int, default=16, metavar="N", help="images of a request (default: 16)"
    )
    parser.add_argument(
        "--max-tokens", type=positive_int, default=4096, metavar="N", help="longest answer (default: 4096)"
    )
    parser.add_argument(
        "--max-image-tokens",
        type=positive_int,
        metavar="N",
        help="keep at most N visual tokens for each image, whatever a request asks (default: no limit)",
    )
    parser.add_argument(
        "--max-batch",
        type=positive_int,
        default=8,
        metavar="N",
        help="waiting requests that the model answers together; 1 answers one after the other (default: 8)",
    )
    parser.add_argument(
        "--max-waiting", type=positive_int, default=64, metavar="N", help="requests that wait (default: 64)"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a host name by which clients ask, besides addresses and localhost; can be repeated",
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
        from tprl_hf.serving.connections import make_server
        from tprl_hf.serving.server import App
    except ImportError as error:
        needs = f"tprl serve needs more packages ({error}): pip install 'tprl_hf[serve]'"
        raise ValueError(of_another_build(error) or needs) from error
    import tprl_hf
    from tprl_hf.serving.limits import Limits

    from .loading import load_named_model, pruner_and_budget, using_pruner
    from .progress import is_quiet

    # bound before the model is loaded, so that a port that is taken is told at once
    listener = bind(arguments.host, arguments.port)
    model, processor = load_named_model(arguments)
    pruner_name, pruner, budget = pruner_and_budget(model, arguments)
    path = arguments.model or tprl_hf.embedded_checkpoint()
    name = arguments.name or (Path(path).resolve().name if Path(path).is_dir() else path)
    limits = Limits(
        max_bytes=arguments.max_request_mb * 1_000_000,
        max_images=arguments.max_images,
        max_tokens=arguments.max_tokens,
        max_image_tokens=arguments.max_image_tokens,
        max_batch=arguments.max_batch,
        max_waiting=arguments.max_waiting,
        allow_remote_images=arguments.allow_remote_images,
    )
    app = App(model, processor, name, limits, budget, [arguments.host, *arguments.allow_host])
    app.metrics.quiet = is_quiet()
    if arguments.host not in LOOPBACK:
        print(f"tprl serve: whoever reaches {arguments.host} can ask; nobody is asked who they are.", file=sys.stderr)
    listener.listen()  # whoever reads the line below can ask
    host, port = listener.getsockname()[:2]
    words = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in budget.items()]
    default = ", ".join(words) or "as the checkpoint says"
    print(
        f"Serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 ({pruner_name}, {default})",
        flush=True,
    )
    with using_pruner(model, pruner):
        make_server(app, app.end_answers).run(sockets=[listener])
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket at an address, not listening yet. Raises `ValueError` where it cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError, ValueError, TypeError) as error:  # the last two for names that cannot be one
        listener.close()
        raise ValueError(f"Cannot listen at {host}, port {port} ({error}): pass another --host or --port.") from error
    return listener
