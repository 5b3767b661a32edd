"""Publish a trained policy, or demonstrations, on the Hub: weights, config, processor, our code and a card made of
what was measured. The directory stays as it is, and what others wrote on the card stays too."""

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tprl_hf.json_files import COUNT, read_json

from .progress import note

NAME = "push"
HELP = "publish a checkpoint or demonstrations on the Hub"
RESULTS_CURE = "pass the results.json that tprl evaluate wrote."
LATENCY = {
    **dict.fromkeys(("command", "device", "pruner"), str),
    **dict.fromkeys(("num_keep", "num_visual", "batch", "new_tokens", "rounds"), COUNT),
    "milliseconds": {...: {"median": float, "low": float, "high": float}},
}
LATENCY_CURE = "pass what tprl benchmark --json printed."
FLOPS = {
    "command": str,
    **dict.fromkeys(("num_visual", "text_tokens", "new_tokens"), COUNT),
    "rows": [{"num_kept": COUNT, "conventions": {...: float}}],
}
FLOPS_CURE = "pass what tprl flops --json printed."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="a checkpoint, or demonstrations, as `tprl train` left them")
    parser.add_argument("repo", type=repository, metavar="REPO", help="NAME or USER/NAME; made when missing")
    parser.add_argument(
        "--merged",
        action="store_true",
        help="with the base model's weights, for a base model that is not on the Hub",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FILE",
        help="results.json of `tprl evaluate`, for the card's tables",
    )
    parser.add_argument(
        "--lmms-eval", nargs="+", default=[], metavar="FILE", help="results files of lmms-eval with the model tprl"
    )
    parser.add_argument("--latency", metavar="FILE", help="what `tprl benchmark --json` printed")
    parser.add_argument("--flops", metavar="FILE", help="what `tprl flops --json` printed")
    parser.add_argument(
        "--benchmark",
        nargs="+",
        default=[],
        type=benchmark,
        metavar="FILE=DATASET:TASK",
        help="results of a benchmark that is on the Hub, by its dataset and task there: for its leaderboard, too",
    )
    parser.add_argument("--base-model", metavar="NAME", help="the base model's name on the Hub, where a path is noted")
    parser.add_argument("--license", metavar="NAME", help="default: that of the base model's card")
    parser.add_argument("--private", action="store_true", default=None, help="if the repository is made")
    parser.add_argument("--revision", metavar="BRANCH", help="default: main")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="list the files and print the card; push nothing")


def repository(text: str) -> str:
    """A repository's name on the Hub."""
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME or USER/NAME")
    return text


def benchmark(text: str) -> tuple[str, str, str]:
    """File, dataset and task of `FILE=DATASET:TASK`."""
    path, _, name = text.rpartition("=")
    dataset, _, task = name.rpartition(":")
    if not path or "/" not in dataset or not task:
        raise argparse.ArgumentTypeError(f"{text!r} is not FILE=OWNER/DATASET:TASK")
    return path, dataset, task


def run(arguments: argparse.Namespace) -> int:
    directory = Path(arguments.directory)
    if not directory.is_dir():
        raise OSError(f"There is no directory {directory}.")
    named = [*arguments.results, *arguments.lmms_eval, *(path for path, _, _ in arguments.benchmark)]
    for path in filter(None, [*named, arguments.latency, arguments.flops]):
        if not Path(path).is_file():
            raise OSError(f"There is no file {path}.")

    from tprl_hf.evaluation.lmms_eval.results import lmms_eval_results
    from tprl_hf.hub.publishing import publish, push_demonstrations
    from tprl_hf.loading import config_of
    from tprl_hf.modeling.checkpoint_checks import refuse_untrained
    from tprl_hf.modeling.configuration_tprl import TPRLConfig
    from tprl_hf.modeling.saved_files import finish_saving
    from tprl_hf.report.evaluation_page import RESULTS_SHAPE
    from tprl_hf.training.training_record import recorded_stages

    finish_saving(directory)
    options = {
        "private": arguments.private,
        "revision": arguments.revision,
        "commit_message": arguments.message,
        "licence": arguments.license,
    }
    if any((directory / name).exists() for name in ("dataset/state.json", "state.json")):
        if arguments.dry_run:
            raise ValueError("--dry-run is for checkpoints; demonstrations are pushed at once.")
        commit = push_demonstrations(directory, arguments.repo, base_model=arguments.base_model, **options)
    else:
        config = config_of(str(directory)) if (directory / "config.json").is_file() else None
        if config is not None and config.model_type == TPRLConfig.model_type and config.pruner is None:
            refuse_untrained(config)
        paths = [*arguments.results, *(path for path, _, _ in arguments.benchmark)]
        results = [read_json(Path(path), RESULTS_SHAPE, RESULTS_CURE) for path in paths]
        facts = {
            "results": results,
            "benchmarks": {
                len(arguments.results) + number: (dataset, task)
                for number, (_, dataset, task) in enumerate(arguments.benchmark)
            },
            "benchmark_results": [entry for path in arguments.lmms_eval for entry in lmms_eval_results(path)],
            "latency": read_json(Path(arguments.latency), LATENCY, LATENCY_CURE) if arguments.latency else None,
            "flops": read_json(Path(arguments.flops), FLOPS, FLOPS_CURE) if arguments.flops else None,
            "base_model": arguments.base_model,
            "stages": recorded_stages(directory),
        }
        if config is not None and config.model_type == TPRLConfig.model_type:
            refuse_results_of_others(directory, dict(zip(paths, results, strict=True)))
        with tempfile.TemporaryDirectory() as scratch:
            folder = merge(directory, Path(scratch)) if arguments.merged else directory
            if arguments.dry_run:
                return show(folder, arguments.repo, {**facts, "licence": arguments.license})
            commit = publish(folder, arguments.repo, **facts, **options)
    print(commit.commit_url)
    return 0


def refuse_results_of_others(directory: Path, results: dict[str, dict[str, Any]]) -> None:
    """
    The card calls the numbers those of this policy. A line names files that do not say of which they are.

    Args:
        directory (`Path`): The checkpoint.
        results (`dict`): By path, what `tprl evaluate` wrote.

    Raises:
        `ValueError`: If one was measured with another policy.
    """
    from tprl_hf.training.fingerprint import lora_in_checkpoint, policy_in_checkpoint

    if not results:
        return
    own, own_lora = policy_in_checkpoint(directory), lora_in_checkpoint(str(directory))
    unknown = [path for path, result in results.items() if result.get("policy_weights") is None]
    for path, result in results.items():
        if path not in unknown and result["policy_weights"] != own:
            raise ValueError(
                f"{path} was measured with another policy (policy_weights {result['policy_weights']}) than that of "
                f"{directory} ({own or 'none that is trained'}): run tprl evaluate {directory}, and pass its "
                "results.json."
            )
        if result.get("lora", own_lora) != own_lora:
            raise ValueError(
                f"{path} was measured with another LoRA of the LLM ({result['lora'] or 'none'}) than that of "
                f"{directory} ({own_lora or 'none'}): run tprl evaluate {directory}, and pass its results.json."
            )
    if unknown and own is not None:
        note(f"{', '.join(unknown)} names no policy: whether it was measured with that of {directory} is not known.")


def merge(directory: Path, folder: Path) -> Path:
    """The checkpoint of `directory`, with its base model's weights, in `folder`; processor and card are copied."""
    from tprl_hf import TPRLForConditionalGeneration
    from tprl_hf.hub.publishing import PROCESSOR_FILES

    note("Merging the base model and the policy ...")
    model = TPRLForConditionalGeneration.from_pretrained(directory, dtype="auto")
    model.save_pretrained(folder, save_base_model=True)
    for path in [found for pattern in (*PROCESSOR_FILES, "README.md") for found in directory.glob(pattern)]:
        copy = folder / path.relative_to(directory)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    return folder


def show(directory: Path, repo: str, facts: dict[str, Any]) -> int:
    """Prints what `publish` would push to a repository that is new."""
    from huggingface_hub import HfApi

    from tprl_hf.hub.publishing import files_to_publish

    files = files_to_publish(directory, repo, HfApi(), **facts)
    for name, content in sorted(files.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"{size:>12}  {name}")
    card = files["README.md"]
    assert isinstance(card, bytes)
    print(f"\n{card.decode()}")
    return 0
