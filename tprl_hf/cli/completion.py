"""Print the script that lets a shell complete `tprl`. For bash: tprl completion bash > FILE, then source FILE in
~/.bashrc."""

import argparse

from tprl_hf.missing_packages import require

NAME = "completion"
HELP = "print what lets bash, zsh or tcsh complete commands and options"
SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="your shell")


def run(arguments: argparse.Namespace) -> int:
    require("shtab")
    import shtab

    from .main import make_parser

    print(shtab.complete(make_parser(), arguments.shell))
    return 0
