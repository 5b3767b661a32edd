"""Ask a small embedded model questions about test images, with all visual tokens, a third of them, and a ninth."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from .arguments import (
    OldSpelling,
    add_loading_arguments,
    add_model_argument,
    keep_ratios,
    loading_words,
    positive_int,
    seed,
)
from .progress import bar, note
from .tables import describe_device, format_table

NAME = "demo"
HELP = "see the embedded model answer with a third and a ninth of its visual tokens"
SHOWN = ("none", "random", "uniform", "vispruner")
TIMED_PROMPTS = 16
REPETITIONS = 5
BATCH_SIZE = 40
Setting = tuple[str, str]  # a pruner, and a budget as it was written; ("none", "") is the unpruned model


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
    parser.add_argument(
        "--seed", type=seed, default=7, help="seed of the images and of the random pruner (default: 7)"
    )
    parser.add_argument(
        "--keep-ratios",
        type=keep_ratios,
        default=[("1/3", 1 / 3), ("1/9", 1 / 9)],
        metavar="FRACTION,...",
        help="fractions of visual tokens to keep, in (0, 1] (default: 1/3,1/9)",
    )
    parser.add_argument("--keep-ratio", action=OldSpelling, new="--keep-ratios", dest="keep_ratios", type=keep_ratios)
    parser.add_argument(
        "--photo",
        action="store_true",
        help="with photographs: a model of 152 million parameters, whose parts are fetched the first time (280 MB)",
    )
    add_model_argument(parser)
    parser.add_argument(
        "--output-dir", default="tprl_output/demo", metavar="DIR", help="for the pictures (default: %(default)s)"
    )
    add_loading_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    from tprl_hf.answer_rules import is_correct
    from tprl_hf.data.sources import read_source
    from tprl_hf.evaluation.answers import generate_answers
    from tprl_hf.pruners.by_name import make_pruner, own_pruner

    from .loading import load_model_for, using_pruner
    from .pictures import name_of_model, write_pictures

    source = "photo" if arguments.photo else "mosaic"
    model, processor = load_model_for(source, arguments)
    names = [*SHOWN, *(["learned"] if own_pruner(model) == "learned" else [])]
    pruners = {name: make_pruner(model, name, arguments.seed) for name in names}
    note(f"Drawing {arguments.num_samples} questions ...")
    samples = list(read_source(source, "test", arguments.seed, arguments.num_samples))
    budgets: dict[Setting, dict[str, Any]] = {("none", ""): {"prune": False}}
    for text, ratio in arguments.keep_ratios:
        budgets.update({(name, text): {"keep_ratio": ratio} for name in names[1:]})

    answers: dict[Setting, list[str]] = {setting: [] for setting in budgets}
    with bar(len(budgets) * len(samples), "answer", "Answering") as answered:
        for (name, text), budget in budgets.items():
            for start in range(0, len(samples), BATCH_SIZE):
                batch = samples[start : start + BATCH_SIZE]
                with using_pruner(model, pruners[name]):
                    answers[name, text] += generate_answers(model, processor, batch, max_new_tokens=8, **budget)
                answered.update(len(batch))
    correct = {
        setting: [is_correct(answer, sample["answer"]) for answer, sample in zip(given, samples, strict=True)]
        for setting, given in answers.items()
    }

    shown = pick_shown(samples, arguments.num_shown)
    for text, _ in arguments.keep_ratios:
        rows = [["type", "question", "reference", *names]]
        for number in shown:
            settings = [setting for setting in budgets if setting[1] in ("", text)]
            marked = [answers[one][number] + ("" if correct[one][number] else "  x") for one in settings]
            rows.append([samples[number][column] for column in ("question_type", "prompt", "answer")] + marked)
        print(f"Some of the questions, and the answers at keep ratio {text}; x is wrong\n")
        print(format_table(rows))

    note("Drawing the pictures ...")
    figures, kept = draw(model, processor, samples, shown, pruners, budgets, answers, correct)
    times = time_prefill(model, processor, samples[:TIMED_PROMPTS], pruners, budgets)
    print(summary(names, [text for text, _ in arguments.keep_ratios], correct, times))
    counts = ", ".join(f"at {text} {number}" for text, number in kept.items())
    ratios = ",".join(text for text, _ in arguments.keep_ratios)
    notes = [
        f"Visual tokens kept: {counts}.",
        f"Questions: {source}_vqa(split='test', seed={arguments.seed}, num_samples={arguments.num_samples}).",
        f"Prefill: a batch of {min(TIMED_PROMPTS, len(samples))} prompts, median of {REPETITIONS} rounds in which the "
        "pruners take turns, after 2 to warm up; LLM: its forward alone; whole: vision tower, pruner and LLM; "
        f"{describe_device(model)}.",
        "Outlined in orange: what the question is about. The pruners are not told.",
        f"Command: tprl demo{' --photo' * arguments.photo}"
        f"{f' {name_of_model(arguments.model)}' if arguments.model else ''} "
        f"--num-samples {arguments.num_samples} --num-shown {arguments.num_shown} "
        f"--seed {arguments.seed} --keep-ratios {ratios}{loading_words(arguments)}",
    ]
    paths = write_pictures(figures, arguments.output_dir, "Which visual tokens are kept", notes)
    print("\n".join(notes[:3]))
    print(f"Pictures: {', '.join(map(str, paths))}")
    print(f"Took {time.perf_counter() - started:.0f} s")
    return 0


def summary(names: Sequence[str], ratios: Sequence[str], correct: dict[Setting, list[bool]], times) -> str:
    """The table of correct answers and times, budgets beside each other."""
    rows = [["pruner"]]
    for heading in ("correct at", "LLM at", "whole at"):
        rows[0] += [f"{heading} {text}" for text in ratios]
    for name in names:
        settings = [("none", "") if name == "none" else (name, text) for text in ratios]
        cells = [f"{sum(correct[one])} of {len(correct[one])} ({percent(correct[one])})" for one in settings]
        cells += [f"{times[one].llm_ms:.1f} ms" for one in settings]
        rows.append([name, *cells, *(f"{times[one].total_ms:.1f} ms" for one in settings)])
    return format_table(rows)


def percent(correct: Sequence[bool]) -> str:
    return f"{100 * sum(correct) / len(correct):.1f} %"


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
    """The figures of the samples in `shown`, one a budget, and by budget how many tokens of one of them were kept."""
    from tprl_hf.evaluation.answers import chat_inputs
    from tprl_hf.visualization import Panel

    from .loading import using_pruner
    from .pictures import make_figures

    figures, kept = [], {}
    for number in shown:
        sample = samples[number]
        inputs = chat_inputs(processor, [sample], model.device)
        for text in dict.fromkeys(text for _, text in budgets if text):
            panels = []
            for name, of_ratio in [setting for setting in budgets if setting[1] in ("", text)]:
                setting = name, of_ratio
                with using_pruner(model, pruners[name]):
                    plan = model.prune(**inputs, **budgets[setting])
                count = f"{int(plan.num_kept)} of {int(plan.num_visual)}"
                if of_ratio:
                    kept[of_ratio] = count
                mask = None if name == "none" else plan.keep_mask
                answer = answers[setting][number]
                panels.append(Panel(f"{name}: {count}", answer, mask, plan.scores, correct[setting][number]))
            title = f"{sample['prompt']}  ({sample['answer']})  {text} kept"
            image = sample["images"][0].convert("RGB")
            figures += make_figures(image, processor, inputs, plan, panels, title, sample["boxes"])
    return figures, kept


def time_prefill(model, processor, samples, pruners: dict[str, Any], budgets):
    """[`PrefillTime`] by pruner and budget, of one batch of `samples`."""
    from tprl_hf.evaluation.answers import chat_inputs
    from tprl_hf.evaluation.benchmark import measure_prefill

    from .loading import using_pruner

    inputs = chat_inputs(processor, samples, model.device)
    note("Timing the prefill ...")

    def prefill(setting: Setting):
        with using_pruner(model, pruners[setting[0]]):
            return model(**inputs, **budgets[setting], logits_to_keep=1)

    calls = {setting: lambda setting=setting: prefill(setting) for setting in budgets}
    return measure_prefill(model.lvlm.get_decoder(), calls, REPETITIONS)
