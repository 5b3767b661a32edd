"""What a base model in bfloat16 or float16 changes: the tokens that are kept, and the accuracy, beside float32's.

`OMP_NUM_THREADS=1 python -m tprl_hf.evaluation.compare_dtypes dtypes.json`; the same command resumes after the last
dtype that was measured.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from tprl_hf.intervals import Estimate, bootstrap_mean, units_of
from tprl_hf.modeling.budget import Budget, keep_counts
from tprl_hf.modeling.token_pruner import TokenPruner
from tprl_hf.pruners import DivPrune, VisPruner

from .answers import chat_inputs
from .compare_pruners import Record, Setting, compare_pruners, encode_once

KEEP_RATIOS = {"1/3": 1 / 3, "1/9": 1 / 9, "1/18": 1 / 18}
REFERENCE, *OTHERS = "float32", "bfloat16", "float16"
BATCH_SIZE, OTHER_BATCH_SIZE = 48, 7

Key = tuple[str, str]  # pruner and budget


@dataclass(frozen=True)
class Choice:
    """
    What a pruner made of one sample.

    Args:
        keep_mask (`bool [N]`): which visual tokens it keeps.
        logits (float32 `[N]`, *optional*): what the policy says of each; `None` for other pruners.
    """

    keep_mask: Tensor
    logits: Tensor | None = None


def make_pruners(model: Any) -> dict[str, TokenPruner]:
    """Those that are compared: the policy, the default without one, and one that reads attention."""
    return {"learned": model.learned_pruner(), "divprune": DivPrune(), "vispruner": VisPruner()}


@torch.no_grad()
def choices_of(
    model: Any, processor: Any, samples: Dataset, pruners: Mapping[str, TokenPruner], batch_size: int
) -> dict[Key, list[Choice]]:
    """What each pruner keeps of every sample, under each budget."""
    found: dict[Key, list[Choice]] = {(name, text): [] for name in pruners for text in KEEP_RATIOS}
    for start in range(0, len(samples), batch_size):
        batch = [samples[number] for number in range(start, min(start + batch_size, len(samples)))]
        inputs = chat_inputs(processor, batch, model.device)
        features = encode_once(model, processor, batch, pruners["vispruner"])
        seen = model.pruning_inputs(**inputs, visual_features=features, with_attention=True)
        for name, text in found:
            pruner, budget = pruners[name], Budget(keep_ratio=KEEP_RATIOS[text])
            keep_masks, _ = pruner.choose(seen, budget)
            choices = [Choice(mask[valid]) for mask, valid in zip(keep_masks, seen.valid, strict=True)]
            if name == "learned":
                told = (keep_counts(seen.num_visual, budget) / seen.num_visual).to(seen.tokens.device)
                logits = pruner.score(replace(seen, keep_ratio=told))
                rows = zip(choices, logits, strict=True)
                choices = [replace(one, logits=row[: len(one.keep_mask)]) for one, row in rows]
            found[name, text] += choices
    return found


def compare_choices(found: Iterable[Choice], reference: Iterable[Choice]) -> dict[str, Any]:
    """
    How far the choices of one way to run a model are from those of another, for the same samples.

    Returns:
        `dict`: `equal` (share of samples with the same keep mask), `jaccard` (mean over samples of tokens that both
        keep, divided by those that either keeps), `bits` (mean number of tokens that only one of both keeps). With
        logits also `rounding` (the largest difference of a sample's logits: median, 0.99 quantile and largest), `gap`
        (between the logits on both sides of the cut: 0.01 and 0.1 quantile, median), `could_differ` (share of samples
        whose gap is at most twice their rounding: the others cannot differ), `farthest` (the largest distance from
        the cut of a token on which both differ, in units of its sample's rounding: at most 2).
    """
    pairs = list(zip(found, reference, strict=True))
    differ = torch.tensor([int((one.keep_mask ^ other.keep_mask).sum()) for one, other in pairs])
    either = torch.tensor([int((one.keep_mask | other.keep_mask).sum()) for one, other in pairs])
    result: dict[str, Any] = {
        "equal": float((differ == 0).double().mean()),
        "jaccard": float((1 - differ / either.double()).mean()),
        "bits": float(differ.double().mean()),
    }
    if pairs[0][0].logits is None:
        return result
    measured = [moved_at_cut(one, other) for one, other in pairs]
    rounding, gap, away = (np.array(column) for column in zip(*measured, strict=True))
    return {
        **result,
        "rounding": np.quantile(rounding, [0.5, 0.99, 1]).tolist(),
        "gap": np.quantile(gap, [0.01, 0.1, 0.5]).tolist(),
        "could_differ": float((gap <= 2 * rounding).mean()),
        "farthest": float((away / np.maximum(rounding, 1e-30)).max()),
    }


def moved_at_cut(found: Choice, reference: Choice) -> tuple[float, float, float]:
    """
    Of one sample: the largest difference of its logits; the gap of the reference's logits at the cut; and how far
    from the other side of the cut the farthest token lies that was decided otherwise, 0 where none was.
    """
    assert found.logits is not None and reference.logits is not None
    logits, kept = reference.logits, reference.keep_mask
    last, first = logits[kept].min(), logits[~kept].max()  # to be kept, to be removed
    away = torch.where(kept, logits - first, last - logits) * (found.keep_mask ^ kept)
    return float((found.logits - logits).abs().max()), float(last - first), float(away.max())


def accuracies(records: Sequence[Record], reference: Sequence[Record], units: Sequence[Any]) -> dict[str, Estimate]:
    """The accuracy of one setting's records, and the mean paired difference to those of `reference`."""
    scores, others = ([record.score for record in some] for some in (records, reference))
    paired = [score - other for score, other in zip(scores, others, strict=True)]
    return {"accuracy": bootstrap_mean(scores, units), "difference": bootstrap_mean(paired, units)}


@dataclass(frozen=True)
class Measured:
    """
    What was measured in one dtype.

    Args:
        records: by pruner and budget, what became of each question.
        chosen, alone: by pruner and budget, the choices in batches of the first and of the second size.
    """

    records: dict[Key, list[Record]]
    chosen: dict[Key, list[Choice]]
    alone: dict[Key, list[Choice]]


def measure(model: Any, processor: Any, samples: Dataset, batch_sizes: tuple[int, int], name: str) -> Measured:
    """Answers and choices of a model, under each setting; `name` is that of the bar."""
    pruners = make_pruners(model)
    settings = [
        Setting("none", "1", None, {"prune": False}),
        *(
            Setting(pruner, text, pruners[pruner], {"keep_ratio": ratio})
            for pruner in pruners
            for text, ratio in KEEP_RATIOS.items()
        ),
    ]
    records: dict[Key, list[Record]] = {(setting.pruner, setting.budget): [] for setting in settings}
    batches = compare_pruners(model, processor, samples, settings, batch_sizes[0], max_new_tokens=16)
    for some in tqdm(batches, desc=name, unit="batch", file=sys.stderr):
        records[some[0].pruner, some[0].budget] += some
    chosen, alone = (choices_of(model, processor, samples, pruners, size) for size in batch_sizes)
    return Measured(records, chosen, alone)


def as_saved(measured: Measured) -> list[Any]:
    """As lists of plain values and tensors, which `torch.load` reads with `weights_only=True`."""
    records = [asdict(record) for some in measured.records.values() for record in some]
    choices = [
        [(*key, one.keep_mask, one.logits) for key, some in found.items() for one in some]
        for found in (measured.chosen, measured.alone)
    ]
    return [records, *choices]


def from_saved(saved: list[Any]) -> Measured:
    records: dict[Key, list[Record]] = {}
    for fields in saved[0]:
        records.setdefault((fields["pruner"], fields["budget"]), []).append(Record(**fields))
    found: list[dict[Key, list[Choice]]] = [{}, {}]
    for choices, rows in zip(found, saved[1:], strict=True):
        for pruner, budget, keep_mask, logits in rows:
            choices.setdefault((pruner, budget), []).append(Choice(keep_mask, logits))
    return Measured(records, *found)


def compare_dtypes(
    load: Any,
    samples: Dataset,
    dtypes: Sequence[str] = OTHERS,
    batch_sizes: tuple[int, int] = (BATCH_SIZE, OTHER_BATCH_SIZE),
    parts: Path | None = None,
) -> list[dict[str, Any]]:
    """
    Args:
        load (`Callable`): from a `torch.dtype` to a model whose base has it, and its processor.
        samples (`datasets.Dataset`): questions.
        dtypes (`Sequence[str]`): those to compare with float32.
        batch_sizes (`tuple[int, int]`): how many questions at once, and how many for the comparison of batch sizes.
        parts (`Path`, *optional*): a folder that keeps what was measured in each dtype, and what lies there is not
            measured again: of the same model and questions.

    Returns:
        `list[dict]`: a row for each dtype, pruner and budget: `accuracy`, `difference` (to float32), `masks` (see
        [`compare_choices`], to float32), `batch` (the same, of the second batch size to the first, in this dtype).
    """
    units = units_of(samples)
    rows: list[dict[str, Any]] = []
    reference: Measured | None = None
    for dtype in (REFERENCE, *dtypes):
        path = None if parts is None else parts / f"{dtype}.pt"
        if path is not None and path.exists():
            measured = from_saved(torch.load(path, weights_only=True))
        else:
            model, processor = load(getattr(torch, dtype))
            measured = measure(model, processor, samples, batch_sizes, dtype)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(as_saved(measured), path.with_suffix(".unfinished"))
                path.with_suffix(".unfinished").replace(path)
        reference = reference or measured
        for key, answered in measured.records.items():
            row: dict[str, Any] = {"dtype": dtype, "pruner": key[0], "budget": key[1]}
            estimates = accuracies(answered, reference.records[key], units)
            row |= {name: asdict(estimate) for name, estimate in estimates.items()}
            if key in measured.alone:
                if dtype != REFERENCE:
                    row["masks"] = compare_choices(measured.chosen[key], reference.chosen[key])
                row["batch"] = compare_choices(measured.alone[key], measured.chosen[key])
            rows.append(row)
    return rows


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of other dtypes as a table, as docs/reliability.md has it."""
    heads = "dtype, pruner, kept, same masks %, Jaccard, accuracy % (float32), difference pp, error, gap, safe %"
    table = [heads.split(", "), ["---"] * 10]
    alone = {(row["pruner"], row["budget"]): row["accuracy"]["value"] for row in rows if row["dtype"] == REFERENCE}
    for row in rows:
        if row["dtype"] == REFERENCE:
            continue
        masks, difference = row.get("masks", {}), row["difference"]
        low, high = (f"{100 * difference[end]:+.2f}" for end in ("low", "high"))
        cells = [row["dtype"], row["pruner"], row["budget"]]
        cells += [f"{100 * masks['equal']:.1f}", f"{masks['jaccard']:.3f}"] if masks else ["", ""]
        cells.append(f"{100 * row['accuracy']['value']:.1f} ({100 * alone[row['pruner'], row['budget']]:.1f})")
        cells.append(f"{100 * difference['value']:+.2f} ({low} to {high})")
        if "gap" in masks:
            safe = 100 * (1 - masks["could_differ"])
            cells += [f"{masks['rounding'][0]:.3f}", f"{masks['gap'][2]:.3f}", f"{safe:.1f}"]
        table.append(cells + [""] * (10 - len(cells)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def rounded(value: Any) -> Any:
    """Five digits of every number."""
    if isinstance(value, Mapping):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main(words: Sequence[str] | None = None) -> None:
    import transformers

    import tprl_hf
    from tprl_hf.data import mosaic_vqa
    from tprl_hf.loading import load_model
    from tprl_hf.training.answer_batches import undecoded
    from tprl_hf.training.fingerprint import fingerprint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--num-samples", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--dtypes", default=",".join(OTHERS), help="default: %(default)s; CPUs are slow at float16")
    arguments = parser.parse_args(words)

    def load(dtype: torch.dtype) -> tuple[Any, Any]:
        model, processor = load_model()
        return model.to(dtype), processor

    samples = undecoded(mosaic_vqa("test", arguments.seed, arguments.num_samples))
    weights = fingerprint(load(torch.float32)[0])
    parts = arguments.output.with_suffix(f".{weights[:8]}-{arguments.num_samples}-{arguments.seed}")
    rows = compare_dtypes(load, samples, arguments.dtypes.split(","), parts=parts)
    content = {
        "command": "python -m tprl_hf.evaluation.compare_dtypes dtypes.json "
        f"--num-samples {arguments.num_samples} --seed {arguments.seed} --dtypes {arguments.dtypes}",
        "data": "mosaic",
        "split": "test",
        "seed": arguments.seed,
        "num_samples": arguments.num_samples,
        "batch_sizes": [BATCH_SIZE, OTHER_BATCH_SIZE],
        "device": f"cpu, {torch.get_num_threads()} threads",
        "weights": weights,
        "versions": {name.__name__: name.__version__ for name in (tprl_hf, transformers, torch)},
        "rows": rounded(rows),
    }
    arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(parts)
    print(as_markdown(content["rows"]))


if __name__ == "__main__":
    main()
