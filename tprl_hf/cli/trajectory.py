"""Draw which visual tokens the policy keeps after each of its steps, and what the model answers with them."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .arguments import (
    DEFAULT_KEEP_RATIO,
    add_budget_arguments,
    add_loading_arguments,
    add_model_argument,
    budget_of,
    positive_int,
    question,
)
from .progress import note

if TYPE_CHECKING:
    from tprl_hf.evaluation.trajectory import TrajectoryStep
    from tprl_hf.modeling import PrunePlan
    from tprl_hf.visualization import Figure

NAME = "trajectory"
HELP = "see the policy prune your image step by step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="the image")
    parser.add_argument("question", type=question, metavar="QUESTION", help="the question")
    add_model_argument(parser)
    add_budget_arguments(parser)
    parser.add_argument("--steps", type=positive_int, metavar="T", help="default: num_steps of the checkpoint")
    parser.add_argument("--answer", metavar="TEXT", help="the reference (default: the answer to the unpruned prompt)")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=64, metavar="N", help="longest answer (default: 64)"
    )
    parser.add_argument(
        "--output-dir", default="tprl_output/trajectory", metavar="DIR", help="for the pictures (default: %(default)s)"
    )
    add_loading_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from tprl_hf.pictures import open_picture

    if arguments.no_prune:
        raise ValueError("--no-prune leaves no steps to draw: name a budget, such as --keep-ratio 1/9.")
    image = open_picture(arguments.image)

    from tprl_hf.evaluation.answers import chat_inputs
    from tprl_hf.evaluation.trajectory import trajectory_of
    from tprl_hf.modeling.budget import Budget

    from .loading import load_named_model
    from .pictures import write_pictures
    from .tables import format_table

    model, processor = load_named_model(arguments)
    config = model.config
    own = {name: getattr(config, name) for name in ("keep_ratio", "num_keep", "threshold")}
    budget: dict[str, Any] = budget_of(arguments) or {name: value for name, value in own.items() if value is not None}
    budget = budget or {"keep_ratio": DEFAULT_KEEP_RATIO}
    sample = {"images": [image], "prompt": arguments.question, "answer": arguments.answer}
    steps = trajectory_of(
        model, processor, sample, Budget(**budget), arguments.steps, max_new_tokens=arguments.max_new_tokens
    )

    reference = arguments.answer or steps[0].answer
    table = [["step", "tokens kept", "score", "answer"]]
    for number, step in enumerate(steps):
        table.append([str(number), f"{step.num_kept} of {steps[0].num_kept}", f"{step.score:.3f}", step.answer])
    print(format_table(table))
    note(f"score: mean log-probability of the tokens of {reference!r}, in nats; 0 is certain")

    inputs = chat_inputs(processor, [sample], model.device)
    plan = model.prune(**inputs, keep_mask=steps[-1].keep_mask)
    figures = figures_of(steps, plan, processor, sample)
    notes = [f"Score: mean log-probability of the tokens of {reference!r}, in nats; 0 is certain."]
    for path in write_pictures(figures, arguments.output_dir, "Kept visual tokens, step by step", notes):
        note(str(path))
    return 0


def figures_of(
    steps: "Sequence[TrajectoryStep]", plan: "PrunePlan", processor: Any, sample: Mapping[str, Any]
) -> "list[Figure]":
    """The picture of `sample` before the first step and after each; `plan` is one of this picture alone."""
    from tprl_hf.evaluation.answers import chat_inputs
    from tprl_hf.visualization import Panel

    from .pictures import make_figures

    panels = [
        Panel(
            f"t = {number}: {step.num_kept} kept, score {step.score:.2f}",
            step.answer,
            None if number == 0 else step.keep_mask,
            step.probs,
        )
        for number, step in enumerate(steps)
    ]
    inputs = chat_inputs(processor, [dict(sample)])
    title = f"{sample['prompt']}  ({sample['answer']})" if sample.get("answer") else str(sample["prompt"])
    return make_figures(sample["images"][0], processor, inputs, plan, panels, title, sample.get("boxes", ()))
