"""`tprl`: finds the command, and turns a user's mistake into one line."""

import argparse
import os
import sys
from collections.abc import Sequence

import tprl_hf
from tprl_hf.missing_packages import explain, is_ours

from . import (
    app,
    benchmark,
    compare,
    completion,
    count,
    demo,
    evaluate,
    flops,
    generate,
    push,
    report,
    reproduce,
    serve,
    table,
    train,
    trajectory,
)
from .arguments import check_arguments
from .progress import note, set_quiet

# Each has NAME, HELP, add_arguments(parser) and run(arguments) -> exit code, and imports torch only in `run`.
COMMANDS = (
    *(
        demo,
        app,
        generate,
        compare,
        count,
        trajectory,
        evaluate,
        table,
        flops,
        benchmark,
        train,
        report,
        reproduce,
        push,
        serve,
    ),
    completion,
)


class OneLineParser(argparse.ArgumentParser):
    """argparse, without the whole usage in front of each error."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of `tprl` and all its commands. Imports neither torch nor transformers."""
    parser = OneLineParser(
        prog="tprl", description="Prune the visual tokens of any vision-language model with a learned policy."
    )
    parser.add_argument("--version", action="version", version=f"tprl_hf {tprl_hf.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    parser.set_defaults(quiet=False)
    quiet = OneLineParser(add_help=False, argument_default=argparse.SUPPRESS)
    quiet.add_argument("--quiet", action="store_true", help="print results and errors only")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(command.NAME, help=command.HELP, description=command.__doc__, parents=[quiet])
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv (`Sequence[str]`, *optional*):
            The words after `tprl`. Defaults to those of this process.

    Returns:
        `int`: 0; 2 where the user has to change something: a file, a value, an option, a package; 130 after Ctrl-C.
    """
    arguments = make_parser().parse_args(argv)
    set_quiet(arguments.quiet)
    try:
        check_arguments(arguments)
        # which takes many seconds on a busy machine
        if "torch" not in sys.modules and arguments.run not in (completion.run, report.run):
            note(f"tprl {arguments.command}: importing PyTorch and transformers ...")
        return arguments.run(arguments)
    except BrokenPipeError:  # as in `tprl demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, FloatingPointError) as error:  # the last one of a loss that is not finite
        if arguments.traceback:
            raise
        return mistake(arguments.command, said_plainly(error))
    except ImportError as error:
        if arguments.traceback or is_ours(error):
            raise
        return mistake(arguments.command, explain(error))


def said_plainly(error: Exception) -> str:
    """Its message; of an error of the system, the file first and no number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    return str(error)


def mistake(command: str, message: str) -> int:
    """Prints what the user has to change on one line, and gives the exit code."""
    print(f"tprl {command}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
