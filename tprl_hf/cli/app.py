"""Show a model in the browser: ask about your picture, and see which visual tokens are kept. See docs/app.md."""

import argparse
import sys

from .arguments import add_loading_arguments, add_model_argument, port, positive_int
from .serve import LOOPBACK, bind

NAME = "app"
HELP = "try pruners in the browser, on your pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument(
        "--host", default=LOOPBACK[0], help=f"address to listen at (default: {LOOPBACK[0]}, this machine only)"
    )
    parser.add_argument("--port", type=port, default=7860, help="0 takes a free one (default: 7860)")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=64, metavar="N", help="longest answer (default: 64)"
    )
    parser.add_argument(
        "--space", metavar="DIR", help="write the folder of a Space on the Hub with this page, instead of showing it"
    )
    add_loading_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.space is not None:
        from tprl_hf.app.space import write_space

        for path in write_space(arguments.space, arguments.model):
            print(path)
        return 0
    try:
        from tprl_hf.app.page import launch, make_page
    except ImportError as error:
        raise ValueError(
            f"tprl app needs gradio ({error}), which wants an environment of its own: docs/app.md says how."
        ) from error
    from tprl_hf.app.asking import Asker

    from .loading import load_named_model

    # looked at before the model is loaded, so that a port that is taken is told at once
    with bind(arguments.host, arguments.port) as free:
        port = free.getsockname()[1]
    model, processor = load_named_model(arguments)
    asker = Asker(model, processor, arguments.model or "The embedded model", arguments.max_new_tokens)
    page = make_page(asker)
    if arguments.host not in LOOPBACK:
        print(f"tprl app: whoever reaches {arguments.host} can ask; nobody is asked who they are.", file=sys.stderr)
    address = launch(page, arguments.host, port)
    print(f"{asker.name} at {address} (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0
