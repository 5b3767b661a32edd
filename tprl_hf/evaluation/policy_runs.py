"""Compares training variants of a policy, each under several seeds: do variants differ by more than the seeds?

`python -m tprl_hf.evaluation.policy_runs OUT.json lfd=DIR,DIR,DIR ppo=DIR,DIR,DIR` answers the same Mosaic-VQA
questions with the policy of each directory, at fixed budgets and, `--adaptive`, with a threshold that is calibrated on
validation questions. An answer is correct when greedy decoding gives exactly the reference (teacher-forced, in one
pass). The directory OUT.answers keeps what each checkpoint answered: an interrupted run resumes, and one with further
checkpoints asks only these.
"""

import argparse
import hashlib
import json
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import AutoProcessor

from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.data import mosaic_vqa
from tprl_hf.intervals import bootstrap_mean
from tprl_hf.loading import device_named
from tprl_hf.modeling.budget import Budget
from tprl_hf.modeling.saved_files import written_whole
from tprl_hf.modeling.token_pruner import LearnedPruner, TokenPruner
from tprl_hf.pruners import DivPrune, RandomPruner, VisPruner
from tprl_hf.pruners.oracle import covered
from tprl_hf.training import calibrate_threshold
from tprl_hf.training.answer_batches import SampleEncoder, undecoded
from tprl_hf.training.answer_scores import score_answers

from .fingerprint import fingerprint

POINTING_BASELINES = {"random": RandomPruner, "vispruner": VisPruner, "divprune": DivPrune}


class Questions:
    """
    The same questions for all policies.

    Args:
        dataset (`datasets.Dataset`): Mosaic-VQA, with boxes.
        batch_size (`int`, defaults to 60): questions at once.
    """

    def __init__(self, dataset: Dataset, batch_size: int = 60):
        self.rows = undecoded(dataset)
        self.batch_size = batch_size
        self.types = dataset["question_type"]
        self.units = dataset["image_id"]
        self.image_size = dataset[0]["images"][0].size  # that of all of Mosaic-VQA

    @torch.no_grad()
    def answer(
        self, model: TPRLForConditionalGeneration, processor: Any, settings: dict[Any, tuple[TokenPruner, Budget]]
    ) -> dict[Any, dict[str, list[float]]]:
        """For each setting, for each question: `correct` (0 or 1), `kept` tokens, and the share of them `on_boxes`.
        The LVLM of `model` answers; each image is encoded once for all settings."""
        encoder = SampleEncoder(model, processor, with_attention=True)
        found: dict[Any, dict[str, list[float]]] = {key: defaultdict(list) for key in settings}
        for start in tqdm(range(0, len(self.rows), self.batch_size), unit="batch"):
            rows = [self.rows[i] for i in range(start, min(start + self.batch_size, len(self.rows)))]
            batch = encoder(rows)
            shares = [covered(batch.inputs, i, row["boxes"], self.image_size) for i, row in enumerate(rows)]
            boxes = (torch.stack(shares) > 0).to(model.device)
            for key, (pruner, budget) in settings.items():
                keep_mask, _ = pruner.choose(batch.inputs, budget)
                scores = score_answers(model, batch, keep_mask, list(range(len(rows))), 96)
                found[key]["correct"] += scores.correct.float().tolist()
                found[key]["kept"] += keep_mask.sum(1).tolist()
                found[key]["on_boxes"] += ((keep_mask & boxes).sum(1) / keep_mask.sum(1).clamp(min=1)).tolist()
        return found

    def by_type(self, values: Sequence[float], digits: int = 4) -> dict[str, float]:
        """Means by question type."""
        groups = defaultdict(list)
        for kind, value in zip(self.types, values, strict=True):
            groups[kind].append(value)
        return {kind: round(fmean(group), digits) for kind, group in sorted(groups.items())}

    def estimate(self, values: Sequence[float]) -> dict[str, float]:
        """Mean and bootstrap interval, over images."""
        return {k: round(v, 5) for k, v in asdict(bootstrap_mean(values, self.units)).items() if k != "count"}


def once(directory: Path, what: list[Any], compute: Callable[[], Any]) -> Any:
    """What `compute` returns; for the same `what`, which must tell all that it depends on, it is called but once."""
    path = directory / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        computed = json.dumps(compute())
        with written_whole(directory) as scratch:
            Path(scratch, path.name).write_text(computed, encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def mean_of(runs: Sequence[Sequence[float]]) -> list[float]:
    """Of each question, over the runs."""
    return [fmean(values) for values in zip(*runs, strict=True)]


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with `ratios` and `adaptive` as numbers by name and `variants` as directories by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("variants", nargs="+", metavar="NAME=DIR,DIR,...", help="its checkpoints, a seed each")
    parser.add_argument("--keep-ratios", default="1/3,2/9,1/9,1/18")
    parser.add_argument("--adaptive", default="1/3,1/9", metavar="FRACTION,...", help="mean budgets of thresholds")
    parser.add_argument("--num-samples", type=int, default=4200, help="questions of each seed")
    parser.add_argument("--num-validation", type=int, default=1200)
    parser.add_argument("--seeds", default="7", metavar="SEED,...", help="of the test questions")
    arguments = parser.parse_args(argv)
    variants = {}
    for variant in arguments.variants:
        name, _, paths = variant.partition("=")
        if not name or not all(Path(path, "config.json").is_file() for path in paths.split(",")):
            parser.error(f"{variant!r} is not NAME=DIR,DIR,... with a checkpoint in each DIR")
        variants[name] = paths.split(",")
    arguments.variants = variants
    arguments.ratios = {name: float(Fraction(name)) for name in arguments.keep_ratios.split(",")}
    arguments.adaptive = {name: float(Fraction(name)) for name in arguments.adaptive.split(",") if name}
    arguments.seeds = [int(seed) for seed in arguments.seeds.split(",")]
    return arguments


# By variant or rule, run and budget: of each question.
Answers = dict[tuple[str, int, str], dict[str, list[float]]]


def policy_settings(
    trained: TPRLForConditionalGeneration, ratios: Mapping[str, float]
) -> dict[Any, tuple[TokenPruner, Budget]]:
    """A checkpoint's policy at each budget."""
    pruner = LearnedPruner(trained.policy, trained.autoencoder, trained.config.num_steps)
    return {name: (pruner, Budget(keep_ratio=ratio)) for name, ratio in ratios.items()}


def rule_settings(ratios: Mapping[str, float]) -> dict[Any, tuple[TokenPruner, Budget]]:
    """Unpruned, and each rule at each budget."""
    rules: dict[Any, tuple[TokenPruner, Budget]] = {"none": (RandomPruner(), Budget(keep_ratio=1.0))}
    for name, pruner in POINTING_BASELINES.items():
        rules |= {f"{name} {budget}": (pruner(), Budget(keep_ratio=ratio)) for budget, ratio in ratios.items()}
    return rules


def answer_of_policy(
    trained: TPRLForConditionalGeneration, questions: Questions, processor: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Answers by budget, and the threshold of each budget that is met on average, found on validation questions."""
    settings = policy_settings(trained, arguments.ratios)
    parts = trained.policy, trained.autoencoder, trained.config.num_steps
    validation = mosaic_vqa("validation", seed=1, num_samples=arguments.num_validation)
    thresholds = {}
    for name, ratio in arguments.adaptive.items():
        thresholds[name] = calibrate_threshold(trained, processor, validation, ratio)
        settings[f"{name} on average"] = LearnedPruner(*parts, ratio), Budget(threshold=thresholds[name])
    return {"thresholds": thresholds, "answers": questions.answer(trained, processor, settings)}


def correct_of(answers: dict[str, list[float]]) -> list[float]:
    """0 or 1 of each question; answers that an earlier version kept call it "right"."""
    return answers["correct"] if "correct" in answers else answers["right"]


def row_of(variant: str, budget: str, found: Answers, unpruned: list[float], questions: Questions) -> dict[str, Any]:
    """One row: a variant or a rule at one budget, with what all its runs have answered."""
    runs = [answers for key, answers in found.items() if key[0] == variant and key[2] == budget]
    correct = mean_of([correct_of(run) for run in runs])
    kept = mean_of([run["kept"] for run in runs])
    by_run = [fmean(correct_of(run)) for run in runs]
    return {
        "way": variant,
        "budget": budget,
        "accuracy": questions.estimate(correct),
        "difference": questions.estimate([a - b for a, b in zip(correct, unpruned, strict=True)]),
        "accuracy_by_run": [round(accuracy, 5) for accuracy in by_run],
        "spread": round(stdev(by_run), 5) if len(runs) > 1 else None,
        "by_type": questions.by_type(correct),
        "mean_kept": round(fmean(kept), 2),
        "kept_by_type": questions.by_type(kept, 2),
        "on_boxes": round(fmean(mean_of([run["on_boxes"] for run in runs])), 4),
    }


def differences(variant: str, others: Iterable[str], budget: str, found: Answers, questions: Questions) -> dict:
    """By how much a variant is more often correct than each of the others at the same budget."""

    def correct(name: str) -> list[float]:
        return mean_of([correct_of(run) for key, run in found.items() if key[0] == name and key[2] == budget])

    mine = correct(variant)
    return {
        f"less {other}": questions.estimate([a - b for a, b in zip(mine, correct(other), strict=True)])
        for other in others
        if other != variant
    }


def compared(
    variants: Iterable[str],
    found: Answers,
    rules: Mapping[str, dict[str, list[float]]],
    ratios: Iterable[str],
    questions: Questions,
) -> dict[str, Any]:
    """
    What all have answered, as a result.

    Args:
        variants (`Iterable[str]`): names of the policies, in the order of the rows.
        found (`dict`): answers by variant, run and budget, at budgets of which all variants have the same.
        rules (`dict`): answers by the names of [`rule_settings`].
        ratios (`Iterable[str]`): budgets of the rules.
        questions ([`Questions`]): those that were asked.
    """
    variants, budgets = list(variants), dict.fromkeys(budget for _, _, budget in found)
    found = found | {(name, 0, budget): rules[f"{name} {budget}"] for name in POINTING_BASELINES for budget in ratios}
    unpruned = correct_of(rules["none"])
    rows = []
    for variant in variants:
        for budget in budgets:
            row = row_of(variant, budget, found, unpruned, questions)
            rows.append(row | differences(variant, variants, budget, found, questions))
    for rule in POINTING_BASELINES:
        rows += [row_of(rule, budget, found, unpruned, questions) for budget in ratios]
    return {
        "num_samples": len(questions.types),
        "split": "test",
        "unpruned": questions.estimate(unpruned),
        "unpruned_by_type": questions.by_type(unpruned),
        "rows": rows,
    }


def main(argv: Sequence[str] | None = None) -> None:
    arguments = read_arguments(argv)
    ratios, variants = arguments.ratios, arguments.variants
    first = next(iter(variants.values()))[0]
    device = device_named()
    model = TPRLForConditionalGeneration.from_pretrained(first, dtype=torch.float32).to(device).eval()
    processor = AutoProcessor.from_pretrained(first)
    dataset = concatenate_datasets([mosaic_vqa("test", seed, arguments.num_samples) for seed in arguments.seeds])
    questions = Questions(dataset)

    settings = [arguments.seeds, arguments.num_samples, arguments.num_validation, ratios, arguments.adaptive]
    directory = arguments.output.with_suffix(".answers")
    answer_rules = partial(questions.answer, model, processor, rule_settings(ratios))
    rules = once(directory, [fingerprint(model.lvlm), *settings], answer_rules)
    found: Answers = {}
    thresholds: dict[str, list[float]] = defaultdict(list)
    for variant, paths in variants.items():
        for run, path in enumerate(paths):
            trained = TPRLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).to(device).eval()
            what = [fingerprint(trained), trained.config.num_steps, trained.config.position_ids, *settings]
            answered = once(directory, what, partial(answer_of_policy, trained, questions, processor, arguments))
            for name, threshold in answered["thresholds"].items():
                thresholds[f"{variant} {name}"].append(threshold)
            found |= {(variant, run, budget): answers for budget, answers in answered["answers"].items()}

    result = {
        "command": f"python -m tprl_hf.evaluation.policy_runs {shlex.join(argv)}" if argv else "",
        "seeds": arguments.seeds,
        "thresholds": thresholds,
        **compared(variants, found, rules, ratios, questions),
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for row in result["rows"]:
        print(row["way"], row["budget"], row["accuracy"], row["difference"], row["accuracy_by_run"], row["on_boxes"])


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
