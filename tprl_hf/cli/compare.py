"""Ask your question about your image under every pruner, at one budget, and see what each of them keeps."""

import argparse
from typing import Any

from .arguments import (
    A_MODEL,
    DEFAULT_KEEP_RATIO,
    add_loading_arguments,
    keep_ratio,
    method_names,
    positive_int,
    pruner_names,
    question,
    seed,
)
from .progress import bar, note

NAME = "compare"
HELP = "see every pruner on your image, with its answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="the image")
    parser.add_argument("question", type=question, metavar="QUESTION", help="the question")
    parser.add_argument("--model", metavar="MODEL", help=A_MODEL)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--keep-ratio",
        type=keep_ratio,
        default=DEFAULT_KEEP_RATIO,
        metavar="FRACTION",
        help="fraction of visual tokens to keep, in (0, 1] (default: 1/3)",
    )
    budget.add_argument("--num-keep", type=positive_int, metavar="K", help="number of visual tokens to keep")
    parser.add_argument(
        "--pruners",
        type=pruner_names,
        metavar="NAME,...",
        help="default: all that the model can have; the unpruned model is always there",
    )
    parser.add_argument("--answer", metavar="TEXT", help="the reference: marks the answers that are wrong")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the random pruner (default: 0)")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=64, metavar="N", help="longest answer (default: 64)"
    )
    parser.add_argument(
        "--output-dir", default="tprl_output/compare", metavar="DIR", help="for the pictures (default: %(default)s)"
    )
    add_loading_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from tprl_hf.pictures import open_picture

    image = open_picture(arguments.image)

    from tprl_hf.answer_rules import is_correct
    from tprl_hf.evaluation.answers import chat_inputs
    from tprl_hf.loading import unknown_words_note
    from tprl_hf.modeling.generation_tprl import GREEDY
    from tprl_hf.visualization import Panel

    from .loading import load_named_model, using_pruner
    from .pictures import make_figures, name_of_model, write_pictures
    from .tables import format_table

    model, processor = load_named_model(arguments)
    budget: dict[str, Any] = {"keep_ratio": arguments.keep_ratio}
    if arguments.num_keep is not None:
        budget = {"num_keep": arguments.num_keep}
    inputs = chat_inputs(processor, [{"images": [image], "prompt": arguments.question}], model.device)
    pruners, refused = usable_pruners(model, inputs, budget, arguments)
    for name, why in refused.items():
        note(f"Without {name}: {why}")
    unknown = unknown_words_note(processor, arguments.question)
    if unknown is not None:
        note(unknown)

    rows, panels = [["pruner", "tokens kept", "answer"]], []
    greedy = {**GREEDY, "max_new_tokens": arguments.max_new_tokens}
    with bar(len(pruners), "pruner", "Answering") as answered:
        for name, pruner in pruners.items():
            own: dict[str, Any] = {"prune": False} if name == "none" else budget
            with using_pruner(model, pruner):
                plan = model.prune(**inputs, **own)
                sequence = model.generate(**inputs, **own, **greedy, tokenizer=processor.tokenizer)[0]
            answer = processor.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            correct = None if arguments.answer is None else is_correct(answer, arguments.answer)
            count = f"{int(plan.num_kept)} of {int(plan.num_visual)}"
            rows.append([name, count, answer + ("  x" if correct is False else "")])
            mask = None if name == "none" else plan.keep_mask
            panels.append(Panel(f"{name}: {count}", answer, mask, plan.scores, correct))
            answered.update()
    print(format_table(rows))
    if arguments.answer is not None:
        note(f"x: other than the reference {arguments.answer!r}")
    title = arguments.question + (f"  ({arguments.answer})" if arguments.answer else "")
    figures = make_figures(image, processor, inputs, plan, panels, title)
    lines = [f"model: {name_of_model(arguments.model)}"] if arguments.model else ["the embedded model"]
    for path in write_pictures(figures, arguments.output_dir, "What each pruner keeps", lines):
        note(str(path))
    return 0


def usable_pruners(
    model, inputs, budget: dict[str, Any], arguments: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, str]]:
    """The pruners that this model can have, the unpruned model first; and why it cannot have the others."""
    from tprl_hf.pruners.by_name import make_pruner, own_pruner, own_pruner_with_settings

    from .loading import using_pruner

    pruners: dict[str, Any] = {"none": None}
    refused = {}
    own = {own_pruner(model): own_pruner_with_settings(model)}
    for name in arguments.pruners or [own.get(name, name) for name in method_names()]:
        if name == "none":
            continue
        try:
            pruner = make_pruner(model, name, arguments.seed)
            with using_pruner(model, pruner):
                model.prune(**inputs, **budget)
        except ValueError as error:
            if arguments.pruners:
                raise
            refused[name] = str(error)
            continue
        pruners[name] = pruner
    return pruners, refused
