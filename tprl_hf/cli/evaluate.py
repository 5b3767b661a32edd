"""Accuracy of a model by question type under several pruners and budgets, always beside the unpruned model and random
keeping."""

import argparse
import functools
import importlib.util
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprl_hf.whole_files import write

from .arguments import (
    A_MODEL,
    MAX_SEED,
    add_loading_arguments,
    add_model_argument,
    check_writable,
    keep_ratios,
    loading_words,
    method_names,
    positive_int,
    pruner_names,
    rounds,
)
from .evaluation_notes import ENLARGED, HALF_SIZE, MARK, OWN_ANSWERS, RESIZE, notes_of, seeds_of
from .progress import bar, note
from .run_folder import PAGE, PLOT, RUNS, claim_folder, default_folder, refuse_other_run

if TYPE_CHECKING:
    from tprl_hf.evaluation.compare_pruners import Setting

NAME = "evaluate"
HELP = "measure a model's accuracy under several pruners and budgets"
BASELINES = ("none", "random")
TEST_BEDS = ("mosaic", "easy-vqa", "photo")
# Settings of a generation config that change no answer.
NO_ANSWER_DEPENDS_ON = (
    "transformers_version",
    "_from_model_config",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
)
# By name, the functions of `tprl_hf.answer_rules` and what the tables say of them.
METRICS = {
    "exact": ("exact_score", "share of answers that equal a reference, letter case and a closing full stop aside"),
    "vqa": (
        "vqa_score",
        "VQAv2's accuracy: normalised, min(1, n / 3) for n of nine people; up to three references are all correct",
    ),
    "relaxed": ("relaxed_score", "ChartQA's relaxed accuracy: numbers within 5 %"),
    "anls": ("anls_score", "normalised Levenshtein similarity, 0 below 0.5"),
    "choice": ("choice_score", "share of multiple-choice answers that name the letter of the correct option"),
    "yes-no": ("yes_no_score", "POPE's accuracy: no if the first sentence has no or not, else yes"),
}
# What these read a reference as.
NEED_REFERENCES = {"choice": "the letter of an option, such as B", "yes-no": "yes or no"}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")  # that every LLM's config has
# The oracle needs data with boxes, and shrinking a picture is not a pruner's work, so that only this command has them.
OTHERS = (
    *("oracle", RESIZE, ENLARGED),
    *(f"{RESIZE}+{name}" for name in (*method_names(), "oracle") if name != "none"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser, f"{A_MODEL}; Photo-LLaVA with --data photo")
    parser.add_argument(
        "--data",
        default="mosaic",
        metavar="NAME|FILE",
        help="mosaic, easy-vqa, photo, a .jsonl file with image, prompt, answer a line, the directory of a saved "
        "dataset, or a task of lmms-eval where that is installed (default: mosaic); without answers, pruned answers "
        "are compared with unpruned ones",
    )
    parser.add_argument("--include-path", metavar="DIR", help="folder with lmms-eval tasks of your own")
    parser.add_argument(
        "--pruners",
        type=functools.partial(pruner_names, others=OTHERS),
        metavar="NAME,...",
        help=f"of {', '.join(method_names())} (also fastv:layer=3), oracle, resize (a smaller picture), "
        "resize+NAME (pruned from a picture of half the tokens), enlarged (shrunk and enlarged again: all tokens, "
        "less detail); none and random are always there (default: uniform, vispruner, and the checkpoint's own)",
    )
    parser.add_argument(
        "--keep-ratios",
        type=keep_ratios,
        default=[("1/3", 1 / 3), ("1/9", 1 / 9)],
        metavar="FRACTION,...",
        help="fractions of visual tokens to keep (default: 1/3,1/9)",
    )
    parser.add_argument("--num-samples", type=positive_int, metavar="N", help="questions (default: 2000, or the file)")
    parser.add_argument(
        "--seed",
        type=seeds,
        default=[7],
        metavar="N,...",
        help="seeds of the images of mosaic or photo, each with --num-samples questions; the first is that of random "
        "(default: 7)",
    )
    parser.add_argument(
        "--random-seeds",
        type=positive_int,
        default=1,
        metavar="N",
        help="run random under so many seeds, from the first of --seed on (default: 1)",
    )
    parser.add_argument(
        "--time-rounds",
        type=rounds,
        metavar="N",
        help="also time each row, from pixels to the first new token, in N rounds",
    )
    parser.add_argument("--split", help="split of mosaic, easy-vqa or photo (default: test)")
    parser.add_argument(
        "--batch-size", type=positive_int, default=48, metavar="N", help="questions at once (default: 48)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=16, metavar="N", help="longest answer (default: 16)"
    )
    parser.add_argument(
        "--metric", choices=METRICS, help="when an answer is correct (default: exact; a task of lmms-eval has its own)"
    )
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        help="for results.html, .json, .csv, .md, .png and answers.jsonl; a run that was cut off resumes from the "
        f"answers there (default: one for each model and data, below {RUNS})",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the results of an earlier run there, and start over"
    )
    add_loading_arguments(parser)


def seeds(text: str) -> list[int]:
    """Whole numbers, each of them once."""
    parts = [part.strip() for part in text.split(",")]
    are_seeds = all(part.isascii() and part.isdigit() and int(part) <= MAX_SEED for part in parts)
    if not are_seeds or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of different whole numbers up to {MAX_SEED}, such as 7 or 7,8,9"
        )
    return [int(part) for part in parts]


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    from tprl_hf.evaluation.broken import broken_questions
    from tprl_hf.evaluation.compare_pruners import append_records, compare_pruners, read_records
    from tprl_hf.evaluation.runs_table import QUESTIONS
    from tprl_hf.evaluation.setting_costs import count_settings, time_settings
    from tprl_hf.evaluation.tables import summarize
    from tprl_hf.intervals import units_of
    from tprl_hf.pictures import images_of
    from tprl_hf.report.evaluation_page import BROKEN, evaluation_page
    from tprl_hf.training.answer_batches import undecoded

    from .loading import load_model_for
    from .tables import format_table

    folder = Path(arguments.output_dir or default_folder(arguments))
    check_writable(folder)
    samples, data_seeds, score, metric = load_samples(arguments)
    check_references(samples, arguments)
    samples = undecoded(samples)
    if any(name.endswith("oracle") for name in arguments.pruners or ()) and not any(samples["boxes"]):
        raise ValueError(f"The oracle needs boxes, which {arguments.data} has none of: leave it out of --pruners.")
    known_before = describe_data(arguments, samples, metric)
    if not arguments.overwrite:
        refuse_other_run(folder, known_before)
    model, processor = load_model_for(arguments.data, arguments)
    check_samples(samples, processor, arguments.data)
    settings = make_settings(model, arguments.pruners or default_pruners(model, processor, samples), arguments)

    folder.mkdir(parents=True, exist_ok=True)
    answers = folder / "answers.jsonl"
    described = describe_run(arguments, model, processor, known_before)
    claim_folder(folder, described, arguments.overwrite)
    units = units_of(samples)
    asked = {
        "data": arguments.data,
        "split": described["split"],
        "units": list(map(str, units)),
        "llm_layers": model.config.get_text_config().num_hidden_layers,
    }
    write(folder / QUESTIONS, json.dumps(asked) + "\n")
    keys = {setting.key for setting in settings}
    records_before, num_removed = read_records(answers)
    known = [record for record in records_before if record.key in keys and record.sample < len(samples)]
    if num_removed:
        note(f"{answers}: {num_removed} damaged lines were removed; they are answered again.")
    total = len(settings) * len(samples)
    note(f"{len(samples)} questions, {len(settings)} settings; {described['device']}")
    shown = next((sample for sample in samples if images_of(sample)), None)
    counted = {} if shown is None else count_settings(model, processor, shown, settings)
    rounds = arguments.time_rounds
    times = time_settings(model, processor, shown, settings, rounds) if shown is not None and rounds else {}
    with bar(total, "answer", done=len(known)) as answered:
        for records in compare_pruners(
            model,
            processor,
            samples,
            settings,
            batch_size=arguments.batch_size,
            score=score,
            known=known,
            max_new_tokens=arguments.max_new_tokens,
        ):
            append_records(answers, records)
            known += records
            answered.update(len(records))

    references = list(samples["answer"]) if "answer" in samples.column_names else None
    if references is None:
        own = {record.sample: record.answer for record in known if record.key == settings[0].key}
        samples = samples.add_column("answer", [own[number] for number in range(len(samples))])
    rows = summarize(known, settings, samples["question_type"], units, 0.95, data_seeds, counted, times, references)
    write_results(folder, rows, described)
    write(folder / BROKEN, json.dumps(broken_questions(model, processor, samples, settings, known)) + "\n")
    write(folder / PAGE, evaluation_page(folder))
    for table in tables_of(rows):
        print(format_table(table))
    print("\n".join(notes_of(rows, described)))
    print(f"Written: {folder}/results.html, .json, .csv, .md{', .png' * (folder / PLOT).exists()} and answers.jsonl")
    print(f"Took {time.perf_counter() - started:.0f} s")
    return 0


def make_settings(model, names: list[str], arguments: argparse.Namespace) -> list["Setting"]:
    """One a pruner and budget, the unpruned model first; random has one for each of its seeds."""
    from tprl_hf.evaluation.compare_pruners import Setting
    from tprl_hf.pruners.by_name import make_pruner

    first = arguments.seed[0]
    settings = [Setting("none", "1", None, {"prune": False})]
    for name in dict.fromkeys([*BASELINES, *names]):
        for text, ratio in arguments.keep_ratios if name != "none" else ():
            budget = {"keep_ratio": ratio}
            if name in (RESIZE, ENLARGED):
                settings.append(
                    Setting(name, text, None, {"prune": False}, picture_ratio=ratio, enlarged=name == ENLARGED)
                )
            elif name.startswith(RESIZE):
                if ratio >= HALF_SIZE:
                    raise ValueError(
                        f"{name} prunes from a picture of half the tokens: keep less than 1/2, not {text}."
                    )
                own = name.removeprefix(f"{RESIZE}+")
                method = oracle_of if own == "oracle" else make_pruner(model, own, first)
                row = f"{RESIZE}+{row_name(model, own, method)}"
                settings.append(Setting(row, text, method, budget, picture_ratio=HALF_SIZE))
            elif name == "random":
                settings += [
                    Setting(name, text, make_pruner(model, name, seed), budget, seed)
                    for seed in range(first, first + arguments.random_seeds)
                ]
            else:
                method = oracle_of if name == "oracle" else make_pruner(model, name)
                settings.append(Setting(row_name(model, name, method), text, method, budget))
    return settings


def row_name(model, name: str, method) -> str:
    """A pruner's name in the tables, marked where it reads attention that the embedded model had boxes for."""
    from transformers import AutoConfig

    import tprl_hf
    from tprl_hf.pruners.llm_attention import LLMAttentionPruner
    from tprl_hf.test_bed.batches import ANSWER_LAYER, NOUN_LAYER

    if not isinstance(method, LLMAttentionPruner) or method.layer not in (NOUN_LAYER + 1, ANSWER_LAYER + 1):
        return name
    # a model with an LLM of just these sizes is the embedded one, or was trained on from it
    configs = model.config, AutoConfig.from_pretrained(tprl_hf.embedded_checkpoint())
    own, embedded = ([getattr(one.get_text_config(), size) for size in SIZES] for one in configs)
    return f"{name}{MARK}" if own == embedded else name


def default_pruners(model, processor, samples) -> list[str]:
    """Those that this model can have: its tower may not return attention, its policy may not be trained."""
    from tprl_hf.evaluation.compare_pruners import encode_once
    from tprl_hf.pictures import images_of
    from tprl_hf.pruners import VisPruner
    from tprl_hf.pruners.by_name import own_pruner_with_settings

    own, shown = own_pruner_with_settings(model), next((one for one in samples if images_of(one)), samples[0])
    names = list(dict.fromkeys(["uniform", "vispruner", *([] if own is None else [own])]))
    try:
        encode_once(model, processor, [shown], VisPruner())
    except ValueError as error:
        note(f"Without vispruner: {error}")
        names.remove("vispruner")
    return names


def oracle_of(samples):
    """The oracle that knows the boxes of these samples."""
    from tprl_hf.pictures import images_of, picture_of
    from tprl_hf.pruners import OraclePruner

    sizes = [picture_of(found[0]).size if found else (1, 1) for found in map(images_of, samples)]
    return OraclePruner([sample["boxes"] for sample in samples], sizes)


def check_task_name(data: str) -> None:
    """Raises `ValueError` for what can only be a file or a directory, and not a task of lmms-eval."""
    if Path(data).is_dir():
        raise ValueError(f"{data} is not a saved dataset: it has no state.json. A .jsonl file is named itself.")
    if Path(data).is_file():
        raise ValueError(f"{data} is not a .jsonl file. Write one JSON object a line, and call it NAME.jsonl.")
    if "/" in data or "." in data:
        raise ValueError(f"There is no file or directory {data}.")


def load_samples(arguments: argparse.Namespace) -> tuple[Any, list[int] | None, Any, str]:
    """The `datasets.Dataset` that the arguments name, each sample's seed, the score of an answer, and what it is."""
    from datasets import concatenate_datasets

    from tprl_hf import answer_rules
    from tprl_hf.data.own_rows import with_all_columns
    from tprl_hf.data.sources import is_source, read_source
    from tprl_hf.evaluation.lmms_eval.samples import lmms_eval_samples
    from tprl_hf.training.trainer_arguments import check_rows

    function, metric = METRICS[arguments.metric or "exact"]
    score = getattr(answer_rules, function)
    data, split = arguments.data, arguments.split or "test"
    if data not in TEST_BEDS and arguments.split:
        raise ValueError(f"{data} has no splits: leave out --split {split}.")
    if data in ("mosaic", "photo"):
        number = arguments.num_samples or 2000
        parts = [read_source(data, split, seed, number) for seed in arguments.seed]
        data_seeds = [seed for seed in arguments.seed for _ in range(number)]
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0], data_seeds, score, metric
    if len(arguments.seed) > 1:
        written = ",".join(map(str, arguments.seed))
        raise ValueError(
            f"{data} has the same questions under every --seed, got {written}: pass one. Only mosaic and photo have "
            "others."
        )
    if is_source(data):
        number = arguments.num_samples or (2000 if data == "easy-vqa" else None)
        samples = read_source(data, split, num_samples=number)
        check_rows(samples, data)
        samples = with_all_columns(samples)
        if "answer" not in samples.column_names:
            if arguments.metric in NEED_REFERENCES:
                raise ValueError(
                    f"{data} has no `answer`, which --metric {arguments.metric} compares with: add the correct "
                    "answers, or leave --metric out to compare with the unpruned model's."
                )
            metric += f"; the data have none, so {OWN_ANSWERS}"
        return samples, None, score, metric
    check_task_name(data)
    if arguments.metric:
        raise ValueError(
            f"{arguments.data} is not among the data that --metric {arguments.metric} scores: leave it out."
        )
    samples, score, name, wanted = lmms_eval_samples(data, arguments.num_samples or 2000, arguments.include_path)
    longest = wanted.get("max_new_tokens")
    if longest is not None and longest > arguments.max_new_tokens:
        cut = f"--max-new-tokens {arguments.max_new_tokens} cuts longer ones off."
        note(f"{data} lets an answer have {longest} tokens; {cut}")
    drawn = wanted.get("do_sample") or (wanted.get("temperature") or 0) > 0
    if drawn or (wanted.get("num_beams") or 1) > 1:
        how = "draws its answers" if drawn else f"searches with {wanted['num_beams']} beams"
        note(f"{data} {how}; here each is greedy, so that rows differ by their tokens alone.")
    return samples, None, score, f"{name} of the task {arguments.data}"


def check_references(samples, arguments: argparse.Namespace) -> None:
    """Raises `ValueError` for references that the metric cannot read: no answer would be scored as it should."""
    from tprl_hf.answer_rules import as_texts, chosen_option, is_yes

    metric = arguments.metric
    for number, answer in enumerate(samples["answer"] if metric in NEED_REFERENCES else ()):
        reads = is_yes(answer) is not None if metric == "yes-no" else all(map(chosen_option, as_texts(answer)))
        if not reads:
            raise ValueError(
                f"--metric {metric} reads each `answer` as {NEED_REFERENCES[metric]}; got {answer!r} in row {number} "
                f"of {arguments.data}: change it, or take another metric."
            )


def check_samples(samples, processor, data: str) -> None:
    """Raises `ValueError` for own rows that could not be asked, all at once and before the first answer."""
    from tprl_hf.data.sources import is_source
    from tprl_hf.modeling.text_query import chat_messages, text_parts
    from tprl_hf.pictures import images_of, name_of_picture, picture_of

    if data in TEST_BEDS or not is_source(data):
        return
    placeholder = getattr(processor, "image_token", None)
    wrong: list[str] = []
    for number, row in enumerate(samples):
        try:
            pictures = [picture_of(image, name_of_picture(row)) for image in images_of(row)]
            messages = chat_messages(row["prompt"], len(pictures))
            texts = [part.get("text") or "" for message in messages for part in text_parts(message["content"])]
            if placeholder and any(placeholder in text for text in texts):
                raise ValueError(f"its prompt has {placeholder} in a text: leave it out, it stands for a picture")
        except (ValueError, OSError) as error:
            wrong.append(f"Row {number}: {error}")
    if wrong:
        more = f" ({len(wrong) - 2} more)" if len(wrong) > 2 else ""
        raise ValueError(
            f"{len(wrong)} of {len(samples)} rows of {data} cannot be asked{more}.\n" + "\n".join(wrong[:2])
        )


def describe_data(arguments: argparse.Namespace, samples, metric: str) -> dict[str, Any]:
    """What the answers depend on, as far as it is known before a model is loaded."""
    from tprl_hf.evaluation.fingerprint import questions_digest

    return {
        "questions": questions_digest(samples),
        "split": (arguments.split or "test") if arguments.data in TEST_BEDS else None,  # others have none
        "seed": arguments.seed if len(arguments.seed) > 1 else arguments.seed[0],
        "num_samples": len(samples),
        "max_new_tokens": arguments.max_new_tokens,
        "score": metric,
    }


def describe_run(arguments: argparse.Namespace, model, processor, known_before: dict[str, Any]) -> dict[str, Any]:
    """What the numbers depend on, besides the settings."""
    import torch
    import transformers

    import tprl_hf
    from tprl_hf.evaluation.fingerprint import fingerprint, lora_in_checkpoint, policy_of_model, processor_digest

    from .tables import describe_device

    generation = json.loads(json.dumps(model.generation_config.to_diff_dict(), default=str))  # as run.json has it
    config, num_samples = model.config.to_dict(), known_before["num_samples"]
    ratios = ",".join(text for text, _ in arguments.keep_ratios)
    command = f"tprl evaluate{f' {arguments.model}' if arguments.model else ''} --data {arguments.data}"
    command += f" --pruners {','.join(arguments.pruners)}" if arguments.pruners else ""
    command += f" --include-path {arguments.include_path}" if arguments.include_path else ""
    written = ",".join(map(str, arguments.seed))
    command += f" --keep-ratios {ratios} --num-samples {num_samples // len(arguments.seed)} --seed {written}"
    command += f" --random-seeds {arguments.random_seeds}" if arguments.random_seeds > 1 else ""
    command += f" --time-rounds {arguments.time_rounds}" if arguments.time_rounds else ""
    command += f" --split {arguments.split}" if arguments.split else ""
    command += f" --max-new-tokens {arguments.max_new_tokens}"
    command += f" --metric {arguments.metric}" if arguments.metric else ""
    command += loading_words(arguments)
    return {
        "command": command,
        "device": describe_device(model),
        "versions": {name.__name__: name.__version__ for name in (tprl_hf, transformers, torch)},
        "data": arguments.data,
        **known_before,
        "random_seeds": arguments.random_seeds,
        "time_rounds": arguments.time_rounds,
        "pruners": arguments.pruners or [],
        "settings": {name: config[name] for name in ("num_steps", "query_agnostic", "position_ids")},
        "bounds": {name: config[name] for name in ("min_keep", "max_keep", "threshold_keep_ratio")},
        "generation": {name: value for name, value in generation.items() if name not in NO_ANSWER_DEPENDS_ON},
        "processor": processor_digest(processor),
        "dtype": str(model.dtype).removeprefix("torch."),
        # an untrained policy is drawn anew each time, and no setting asks it
        "weights": fingerprint(model.lvlm if model.config.policy_training is None else model),
        "policy_weights": policy_of_model(model),  # which `tprl push` compares, without the base model
        "lora": lora_in_checkpoint(model.name_or_path) if model.config.includes_adapter else None,
    }


def tables_of(rows) -> list[list[list[str]]]:
    """Accuracy, accuracy by question type, and how sure the answers are where that was noted, as texts."""
    from tprl_hf.evaluation.confidence import confidence_table
    from tprl_hf.evaluation.tables import accuracy_table, type_table

    tables = [accuracy_table(rows), type_table(rows)]
    return [*tables, confidence_table(rows)] if any(row.confidence for row in rows) else tables


def write_results(folder: Path, rows, described: dict[str, Any]) -> None:
    """Writes results.json, results.csv, results.md and, where matplotlib is installed, results.png."""
    from dataclasses import asdict

    from tprl_hf.evaluation.tables import as_csv, as_markdown, plot_accuracy

    content = {**described, "notes": notes_of(rows, described), "rows": [asdict(row) for row in rows]}
    write(folder / "results.json", json.dumps(content, indent=1) + "\n")
    write(folder / "results.csv", as_csv(rows))
    write(folder / "results.md", "\n".join([*map(as_markdown, tables_of(rows)), *notes_of(rows, described)]) + "\n")
    source = " ".join(filter(None, (described["data"], described["split"])))
    title = f"{source}, {described['num_samples']} questions, {seeds_of(described)}"
    if importlib.util.find_spec("matplotlib") is None:
        (folder / PLOT).unlink(missing_ok=True)  # of other rows
        note(f"No {PLOT}, which needs matplotlib: pip install 'tprl_hf[eval]'; the same command then only draws.")
        return
    plot_accuracy(rows, folder / PLOT, title)
