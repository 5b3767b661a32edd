"""Ask a small embedded model questions about test images, with all and with a third of the visual tokens."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from .arguments import (
    DEFAULT_KEEP_RATIO,
    add_loading_arguments,
    add_model_argument,
    keep_ratio,
    loading_options,
    loading_words,
    positive_int,
)
from .tables import describe_device, format_table

NAME = "demo"
HELP = "see the embedded model answer with a third of its visual tokens"
SHOWN = ("none", "random", "uniform", "vispruner")
TIMED_PROMPTS = 16
REPETITIONS = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-samples", type=positive_int, default=120, metavar="N", help="questions to answer (default: 120)"
    )
    parser.add_argument(
        "--num-shown",
        type=positive_int,
        default=6,
        metavar="N",
        help="how many of them to print and draw (default: 6)",
    )
    parser.add_argument("--seed", type=int, default=7, help="seed of the images and of the random pruner (default: 7)")
    parser.add_argument(
        "--keep-ratio",
        type=keep_ratio,
        default=DEFAULT_KEEP_RATIO,
        metavar="FRACTION",
        help="fraction of visual tokens to keep, in (0, 1] (default: 1/3)",
    )
    parser.add_argument(
        "--photo",
        action="store_true",
        help="with photographs: a model of 145 million parameters, whose parts are fetched the first time (280 MB)",
    )
    add_model_argument(parser)
    parser.add_argument(
        "--output-dir", default="tprl_output/demo", metavar="DIR", help="for the pictures (default: %(default)s)"
    )
    add_loading_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    from tprl_hf.data.sources import read_source
    from tprl_hf.evaluation.answers import generate_answers
    from tprl_hf.evaluation.scores import is_correct
    from tprl_hf.loading import load_model
    from tprl_hf.pruners.by_name import make_pruner, own_pruner

    from .loading import using_pruner
    from .pictures import write_pictures

    source, path = ("photo" if arguments.photo else "mosaic"), arguments.model
    if arguments.photo and path is None:
        from tprl_hf.test_bed.photo_checkpoint import photo_checkpoint

        path = str(photo_checkpoint())
    model, processor = load_model(path, **loading_options(arguments))
    names = [*SHOWN, *(["learned"] if own_pruner(model) == "learned" else [])]
    pruners = {name: make_pruner(model, name, arguments.seed) for name in names}
    budgets: dict[str, dict[str, Any]] = {name: {"keep_ratio": arguments.keep_ratio} for name in pruners}
    budgets["none"] = {"prune": False}
    samples = list(read_source(source, "test", arguments.seed, arguments.num_samples))

    answers = {}
    for name in pruners:
        with using_pruner(model, pruners[name]):
            answers[name] = generate_answers(model, processor, samples, max_new_tokens=8, **budgets[name])
    correct = {
        name: [is_correct(answer, sample["answer"]) for answer, sample in zip(answers[name], samples, strict=True)]
        for name in pruners
    }

    shown = pick_shown(samples, arguments.num_shown)
    rows = [["type", "question", "reference", *pruners]]
    for number in shown:
        marked = [answers[name][number] + ("" if correct[name][number] else "  x") for name in pruners]
        rows.append([samples[number][column] for column in ("question_type", "prompt", "answer")] + marked)
    print(f"Some of the questions, and the answers at keep ratio {arguments.keep_ratio:.3g}; x is wrong\n")
    print(format_table(rows))

    figures, kept = draw(model, processor, samples, shown, pruners, budgets, answers, correct)
    times = time_prefill(model, processor, samples[:TIMED_PROMPTS], pruners, budgets)
    rows = [["pruner", "tokens kept", "correct answers", "LLM prefill", "whole prefill"]]
    for name in pruners:
        count = sum(correct[name])
        accuracy = f"{count} of {len(samples)} ({100 * count / len(samples):.1f} %)"
        rows.append([name, kept[name], accuracy, f"{times[name].llm_ms:.1f} ms", f"{times[name].total_ms:.1f} ms"])
    print(format_table(rows))

    notes = [
        f"Questions: {source}_vqa(split='test', seed={arguments.seed}, num_samples={arguments.num_samples}).",
        f"Prefill: a batch of {min(TIMED_PROMPTS, len(samples))} prompts, median of {REPETITIONS} rounds in which the "
        "pruners take turns, after 2 to warm up; LLM: its forward alone; whole: vision tower, pruner and LLM; "
        f"{describe_device(model)}.",
        "Outlined in orange: what the question is about. The pruners are not told.",
        f"Command: tprl demo{' --photo' * arguments.photo}{f' {arguments.model}' if arguments.model else ''} "
        f"--num-samples {arguments.num_samples} --num-shown {arguments.num_shown} "
        f"--seed {arguments.seed} --keep-ratio {arguments.keep_ratio:.4g}{loading_words(arguments)}",
    ]
    paths = write_pictures(figures, arguments.output_dir, "Which visual tokens are kept", notes)
    print("\n".join(notes[:2]))
    print(f"Pictures: {', '.join(map(str, paths))}")
    print(f"Took {time.perf_counter() - started:.0f} s")
    return 0


def pick_shown(samples: Sequence[dict[str, Any]], count: int) -> list[int]:
    """`count` indices, none chosen by hand: types take turns, and each gives its next sample of a new image."""
    left: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        left.setdefault(sample["question_type"], []).append(number)
    picked: list[int] = []
    images: set[str] = set()
    while len(picked) < min(count, len(samples)):
        for numbers in filter(None, left.values()):
            number = next((n for n in numbers if samples[n]["image_id"] not in images), numbers[0])
            numbers.remove(number)
            images.add(samples[number]["image_id"])
            picked.append(number)
    return picked[:count]


def draw(
    model, processor, samples, shown: Sequence[int], pruners: dict[str, Any], budgets, answers, correct
) -> tuple[list[Any], dict[str, str]]:
    """The figures of the samples in `shown`, and by pruner how many tokens of one of them were kept."""
    from tprl_hf.evaluation.answers import chat_inputs
    from tprl_hf.visualization import Panel

    from .loading import using_pruner
    from .pictures import make_figures

    figures, kept = [], {}
    for number in shown:
        sample = samples[number]
        inputs = chat_inputs(processor, [sample], model.device)
        panels = []
        for name in pruners:
            with using_pruner(model, pruners[name]):
                plan = model.prune(**inputs, **budgets[name])
            kept[name] = f"{int(plan.num_kept)} of {int(plan.num_visual)}"
            mask = None if name == "none" else plan.keep_mask
            panels.append(
                Panel(f"{name}: {kept[name]}", answers[name][number], mask, plan.scores, correct[name][number])
            )
        title = f"{sample['prompt']}  ({sample['answer']})"
        image = sample["images"][0].convert("RGB")
        figures += make_figures(image, processor, inputs["pixel_values"], plan, panels, title, sample["boxes"])
    return figures, kept


def time_prefill(model, processor, samples, pruners: dict[str, Any], budgets):
    """[`PrefillTime`] by pruner, of one batch of `samples`."""
    from tprl_hf.evaluation.answers import chat_inputs
    from tprl_hf.evaluation.benchmark import measure_prefill

    from .loading import using_pruner

    inputs = chat_inputs(processor, samples, model.device)

    def prefill(name: str):
        with using_pruner(model, pruners[name]):
            return model(**inputs, **budgets[name], logits_to_keep=1)

    calls = {name: lambda name=name: prefill(name) for name in pruners}
    return measure_prefill(model.lvlm.get_decoder(), calls, REPETITIONS)
