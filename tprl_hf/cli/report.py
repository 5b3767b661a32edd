"""Write one page about a training run, about an evaluation, or about two of one kind over each other. The page loads
nothing from elsewhere. A training run that was cut off, or still runs, has one too."""

import argparse
import time
from pathlib import Path

from tprl_hf.whole_files import write

from .arguments import check_writable, positive_int

NAME = "report"
HELP = "write a page about a training run or an evaluation"
PAGE = "report.html"
EVERY = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="the output_dir of a recipe, of a stage or of a trainer, or what tprl evaluate wrote; or two of one kind",
    )
    parser.add_argument(
        "--output", metavar="FILE", help=f"the page (default: {PAGE} in the directory, of two in the first)"
    )
    parser.add_argument(
        "--live",
        nargs="?",
        const=EVERY,
        type=positive_int,
        metavar="SECONDS",
        help=f"write the page again every so many seconds until Ctrl-C, and let the browser follow (default: {EVERY})",
    )


def run(arguments: argparse.Namespace) -> int:
    folders = [Path(folder) for folder in arguments.folders]
    output = Path(arguments.output or folders[0] / PAGE)
    if output.is_dir():
        raise ValueError(f"{output} is a directory: --output is the file to write, such as {output / PAGE}.")
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"There is no directory {folder}.")
    check_writable(output.parent)
    page = page_of(folders, arguments.live)  # what cannot be read is told before anything is written
    output.parent.mkdir(parents=True, exist_ok=True)
    write(output, page)
    print(f"Written: {output}", flush=True)
    try:
        while arguments.live:
            time.sleep(arguments.live)
            write(output, page_of(folders, arguments.live))
    finally:
        if arguments.live:
            write(output, page_of(folders, None))  # which browsers do not load again
    return 0


def page_of(folders: list[Path], refresh: int | None) -> str:
    """The page of directories that exist; raises `ValueError` for those that hold something else, or too many."""
    from tprl_hf.report.evaluation_page import evaluation_page, is_evaluation
    from tprl_hf.report.runs import read_training
    from tprl_hf.report.training_page import training_page
    from tprl_hf.report.two_evaluations import two_evaluations_page

    named = [folder.name if folder.is_absolute() else str(folder) for folder in folders]  # no place of this machine
    command = f"tprl report {' '.join(named)}"
    evaluations = [folder for folder in folders if is_evaluation(folder)]
    if len(folders) > 2:
        more = "; `tprl table` joins more" if evaluations else ""
        raise ValueError(f"At most two are drawn over each other, got {len(folders)}{more}.")
    if evaluations and refresh:
        raise ValueError(f"{evaluations[0]} is an evaluation, whose page is not live: leave out --live.")
    if len(evaluations) == 2:
        return two_evaluations_page(folders, command)
    if evaluations and len(folders) == 2:
        (training,) = set(folders) - set(evaluations)
        raise ValueError(f"{evaluations[0]} is an evaluation and {training} is not: pass two of one kind.")
    if evaluations:
        return evaluation_page(evaluations[0])
    return training_page([read_training(folder) for folder in folders], command, refresh)
