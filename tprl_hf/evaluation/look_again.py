"""Is a second look worth its tokens? `generate(escalate=...)` beside fixed budgets of as many tokens on average.

`OMP_NUM_THREADS=1 python -m tprl_hf.evaluation.look_again OUT.json` calibrates on validation questions of Mosaic-VQA,
one first and second budget after the other, and answers test questions greedily.
"""

import argparse
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import tprl_hf
from tprl_hf.answer_rules import exact_score
from tprl_hf.data import mosaic_vqa
from tprl_hf.intervals import bootstrap_mean, units_of
from tprl_hf.modeling.generation_tprl import GREEDY
from tprl_hf.training import calibrate_escalation

from .answers import chat_inputs
from .compare_pruners import encode_once

# First look, second look, and the mean of both together; the card's budgets and the model's own limit.
POINTS = ("1/9,1/3,1/6", "1/9,1,2/9", "1/18,1/3,1/9")
BATCH_SIZE = 60


@dataclass(frozen=True)
class Answered:
    """
    What one way to ask gave for all samples.

    Args:
        scores (`list[float]`): of each answer, in [0, 1].
        num_read (`list[int]`): visual tokens that the LLM read for it, both looks counted.
        num_escalated (`int`): samples that were looked at again.
    """

    scores: list[float]
    num_read: list[int]
    num_escalated: int = 0

    @property
    def mean_read(self) -> float:
        return sum(self.num_read) / len(self.num_read)


def answer_all(
    model: Any, processor: Any, samples: Dataset, calls: Mapping[str, dict[str, Any]], max_new_tokens: int = 8
) -> dict[str, Answered]:
    """Answers `samples` greedily under each of `calls`, arguments of `generate`. Each image is encoded once."""
    found: dict[str, list[Any]] = {name: [[], [], 0] for name in calls}
    for start in tqdm(range(0, len(samples), BATCH_SIZE), desc="Answering", unit="batch"):
        batch = [samples[index] for index in range(start, min(start + BATCH_SIZE, len(samples)))]
        inputs, features = chat_inputs(processor, batch, model.device), encode_once(model, processor, batch, None)
        for name, call in calls.items():
            output = model.generate(
                **inputs, **call, visual_features=features, max_new_tokens=max_new_tokens,
                tokenizer=processor.tokenizer, **GREEDY | {"return_dict_in_generate": True},
            )  # fmt: skip
            texts = processor.batch_decode(
                output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            found[name][0] += [
                float(exact_score(text.strip(), one["answer"])) for text, one in zip(texts, batch, strict=True)
            ]
            found[name][1] += output.get("num_read", output["num_kept"]).tolist()
            found[name][2] += int(output["is_escalated"].sum()) if "is_escalated" in output else 0
    return {name: Answered(*values) for name, values in found.items()}


def compare_looks(
    model: Any, processor: Any, validation: Dataset, test: Dataset, points: Sequence[str] = POINTS
) -> dict[str, Any]:
    """
    Args:
        points (`Sequence[str]`): each "first,second,mean" as fractions KEPT, such as "1/9,1/3,1/6".

    Returns:
        `dict`: `none` and `rows`, a row for each point: `below` as calibrated, tokens read, the share of samples that
        were looked at again, accuracy, that of a fixed budget of at least as many tokens, and the mean paired
        difference. Accuracies are percentages with 95 % bootstrap intervals over images.
    """
    looks: dict[str, dict[str, Any]] = {}
    for point in points:
        first, second, mean = (float(Fraction(part)) for part in point.split(","))
        escalation = calibrate_escalation(model, processor, validation, first, second, mean)
        looks[point] = {"keep_ratio": first, "escalate": escalation}
    answered = answer_all(model, processor, test, {"none": {"keep_ratio": 1.0}, **looks})
    fixed = {point: {"num_keep": math.ceil(answered[point].mean_read)} for point in points}
    others = answer_all(model, processor, test, fixed)
    units = units_of(test)

    def percent(scores: Sequence[float]) -> dict[str, float]:
        return asdict(bootstrap_mean([100 * score for score in scores], units))

    rows = []
    for point in points:
        one, other = answered[point], others[point]
        rows.append(
            {
                "budgets": point,
                "below": looks[point]["escalate"].below,
                "tokens_read": one.mean_read,
                "escalated": one.num_escalated / len(test),
                "accuracy": percent(one.scores),
                "fixed_tokens": other.mean_read,
                "fixed_accuracy": percent(other.scores),
                "difference": percent([a - b for a, b in zip(one.scores, other.scores, strict=True)]),
            }
        )
    return {"none": percent(answered["none"].scores), "rows": rows}


def as_table(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        "| first look, second look, mean wanted | again below | looked at again | tokens read | accuracy % | fixed: "
        "tokens | accuracy % | difference (pp) |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def cell(estimate: Mapping[str, float], sign: str = "") -> str:
        return f"{estimate['value']:{sign}.2f} ({estimate['low']:{sign}.2f} to {estimate['high']:{sign}.2f})"

    for row in result["rows"]:
        lines.append(
            f"| {row['budgets']} | {row['below']:.3f} | {100 * row['escalated']:.1f} % | {row['tokens_read']:.1f} | "
            f"{cell(row['accuracy'])} | {row['fixed_tokens']:.0f} | {cell(row['fixed_accuracy'])} | "
            f"{cell(row['difference'], '+')} |"
        )
    return "\n".join([*lines, "", f"Unpruned: {cell(result['none'])} %."]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", metavar="OUT.json")
    parser.add_argument("--model", default=tprl_hf.embedded_checkpoint(), help="default: the embedded one")
    parser.add_argument("--points", nargs="+", default=POINTS, metavar="FIRST,SECOND,MEAN")
    parser.add_argument("--num-samples", type=int, default=2100, help="of the test (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the test questions (default: %(default)s)")
    parser.add_argument("--num-validation", type=int, default=1200, help="for the calibration (default: %(default)s)")
    options = parser.parse_args(arguments)
    model = AutoModelForImageTextToText.from_pretrained(options.model).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    result = compare_looks(
        model,
        processor,
        mosaic_vqa("validation", num_samples=options.num_validation, seed=0),
        mosaic_vqa("test", num_samples=options.num_samples, seed=options.seed),
        options.points,
    )
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "model")}
    words = ["python", "-m", "tprl_hf.evaluation.look_again", Path(options.output).name]
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, (list, tuple)) else [str(value)])]
    Path(options.output).write_text(json.dumps({"command": shlex.join(words), **result}, indent=1) + "\n")
    print(as_table(result))


if __name__ == "__main__":
    main()
