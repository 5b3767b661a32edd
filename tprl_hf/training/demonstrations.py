"""Stage 2: what a teacher keeps, step by step, as a dataset on disk (eq. 7 of the TPRL paper)."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, List, Value, load_from_disk
from torch import Tensor
from tqdm.auto import tqdm

from tprl_hf.data.digest import data_digest
from tprl_hf.modeling.budget import Budget, keep_counts
from tprl_hf.modeling.keep_mask import keep_top_k
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.saved_files import put_first, scratch_directory
from tprl_hf.modeling.token_pruner import TokenPruner
from tprl_hf.modeling.values import COUNT, KEPT_FRACTION, list_of, one_of, whole

from .answer_batches import AnswerBatch, SampleEncoder
from .feature_cache import cache_of
from .fingerprint import fingerprint, processor_digest
from .saved_masks import Masks, SavedMasks, description, this_process
from .teachers import AnswerTeacher
from .trainer_arguments import given_dataset, needs_answers
from .unpruned_answers import UnprunedAnswers
from .whole_checkpoints import mark_whole

PAPER_KEEP_RATIOS = (0.75, 0.5)
MADE_FROM = "made_from.json"  # in the folder of a dataset: data, teacher, settings and weights


def budget_steps(keep_ratio: float, num_steps: int) -> list[float]:
    """The keep ratio after each of `num_steps` equal steps down to `keep_ratio`, as [`LearnedPruner`] takes them."""
    return [keep_ratio ** ((step + 1) / num_steps) for step in range(num_steps)]


def demonstrate(
    teacher: TokenPruner | AnswerTeacher,
    model: TPRLForConditionalGeneration,
    batch: AnswerBatch,
    schedules: Sequence[Sequence[float]],
) -> list[list[Tensor]]:
    """
    Keep masks `bool [B, N]` after each step of each schedule; each is part of the one before.

    Args:
        schedules: fractions of all visual tokens that are left after each step, descending.
    """
    inputs = batch.inputs
    if not inputs.valid.any():  # no picture: there is nothing to keep
        return [[inputs.valid] * len(schedule) for schedule in schedules]
    num_visual, protected = inputs.valid.sum(1), inputs.layout.protected
    scores = teacher.score(model, batch, inputs.valid) if isinstance(teacher, AnswerTeacher) else None
    demonstrated = []
    for schedule in schedules:
        keep_mask, before, masks = inputs.valid, 1.0, []
        for keep_ratio in schedule:
            if isinstance(teacher, TokenPruner):
                with torch.no_grad():
                    left = replace(inputs, valid=keep_mask, num_visual=keep_mask.sum(1).cpu())
                    keep_mask, _ = teacher.choose(left, Budget(keep_ratio=keep_ratio / before))
            else:
                assert scores is not None
                counts = keep_counts(num_visual, Budget(keep_ratio=keep_ratio))
                keep_mask = keep_top_k(scores, keep_mask, counts, protected)
            masks.append(keep_mask)
            before = keep_ratio
        demonstrated.append(masks)
    return demonstrated


def generate_demonstrations(
    teacher: TokenPruner | AnswerTeacher,
    model: TPRLForConditionalGeneration,
    processor: Any,
    dataset: Dataset,
    keep_ratios: Sequence[float] | Sequence[Sequence[float]] = PAPER_KEEP_RATIOS,
    output_dir: str | None = None,
    batch_size: int = 16,
    feature_cache_mb: int = 1024,
    feature_cache_dir: str | None = None,
    score: str = "logprob",
    max_answer_length: int = 128,
    unpruned_answers_dir: str | None = None,
) -> Dataset:
    r"""
    Lets a teacher prune each sample step by step.

    Args:
        teacher ([`TokenPruner`] or [`AnswerTeacher`]): any pruner, or one that knows the reference answer. That is the
            column `answer`, or what `score` makes of it.
        model ([`TPRLForConditionalGeneration`]): whose frozen LVLM the samples are encoded with.
        processor: its processor.
        dataset (`datasets.Dataset`): rows with `images`, `prompt` and, for a teacher that knows the answer, `answer`.
        keep_ratios (`list[float]`, defaults to 0.75 and 0.5): fraction of the visual tokens that is KEPT after each
            step, descending: the paper's 25 % and 50 % pruned. Several such lists take turns, sample by sample.
        output_dir (`str`, *optional*): where the result is saved. Until then the masks of each batch are added to
            `OUTPUT_DIR.unfinished.jsonl`, from which the same call resumes if it was cut off. Processes that
            `torchrun` started share the work through such files; the first one saves the result, all return it.
        batch_size (`int`, defaults to 16): samples at a time.
        feature_cache_mb (`int`, defaults to 1024): room for visual features, in MiB.
        feature_cache_dir (`str`, *optional*): keep them there, as the trainers do; not for a teacher that reads the
            tower's attention, which takes a pass of its own.
        score (`"logprob"` or `"agreement"`, defaults to `"logprob"`): "agreement" needs no labels. The reference is
            what the frozen LVLM itself answers unpruned, as in training with the scores "agreement" and "kl". (The
            divergence of "kl" has no gradient where all tokens are kept, so a teacher cannot start from it.)
        max_answer_length (`int`, defaults to 128): tokens of the longest such answer.
        unpruned_answers_dir (`str`, *optional*): where such answers are kept, `OUTPUT_DIR.unpruned_answers` by
            default. Later stages find them there, or in the result.

    Returns:
        `datasets.Dataset`: the rows of `dataset` with `keep_masks`, a list over steps of lists over the sample's
        visual tokens, in place of any they had; with `score="agreement"` also `unpruned_answer`.

    Raises:
        `ValueError`: when the ratios are not fractions in descending order, and for rows without the answer that the
            teacher reads.

    Example:

    ```python
    >>> from tprl_hf.pruners import VisPruner
    >>> from tprl_hf.training import generate_demonstrations

    >>> demonstrations = generate_demonstrations(VisPruner(), model, processor, dataset, output_dir="demonstrations")
    ```
    """
    batch_size, cache_mb = COUNT("batch_size", batch_size), whole(0)("feature_cache_mb", feature_cache_mb)
    given = list_of(lambda name, value: value, least=1)("keep_ratios", keep_ratios)
    several = any(isinstance(one, (list, tuple)) for one in given)
    schedules = [list_of(KEPT_FRACTION, least=1)("keep_ratios", one) for one in (given if several else [given])]
    for schedule in schedules:
        if not all(0 < later < earlier <= 1 for earlier, later in zip([1.0, *schedule], schedule, strict=False)):
            raise ValueError(f"keep_ratios are fractions that are KEPT, below 1 and descending; got {schedule}.")
    score = one_of(("logprob", "agreement"))("score", score)
    if isinstance(teacher, AnswerTeacher) and teacher.reads_answers and score == "logprob":
        needs_answers(dataset, "dataset", "the teacher reads it; set score='agreement' for teaching without labels")
    needs_attention = isinstance(teacher, TokenPruner) and teacher.needs_attention
    directory = None if needs_attention else feature_cache_dir
    encoder = SampleEncoder(model, processor, cache_of(model, processor, cache_mb, directory, None), needs_attention)
    source = given_dataset(dataset, "dataset")
    if "keep_masks" in dataset.column_names:  # of another teacher
        dataset, source = (one.remove_columns("keep_masks") for one in (dataset, source))
    unpruned_answers = None
    if score == "agreement":
        beside = None if output_dir is None else f"{Path(output_dir)}.unpruned_answers"
        unpruned_answers = UnprunedAnswers(model, processor, unpruned_answers_dir or beside, max_answer_length)
    model.eval()
    saved, (process, num_processes) = None, this_process()
    if output_dir is not None:
        depends_on = {
            "data": data_digest(dataset),
            "teacher": description(teacher),
            "keep_ratios": schedules,
            "batch_size": batch_size,
            "weights": fingerprint(model.lvlm),
            "processor": processor_digest(processor),
        }
        if unpruned_answers is not None:
            depends_on["unpruned_answers"] = unpruned_answers.settings
        saved = SavedMasks(Path(f"{Path(output_dir)}.unfinished.jsonl"), depends_on, process)
        made_from = Path(output_dir) / MADE_FROM
        if process == 0:
            made_from.unlink(missing_ok=True)  # others shall wait for what this call makes
        elif is_made_from(made_from, saved.depends_on):  # the first one was done before this one began
            saved.path.unlink(missing_ok=True)
            return load_from_disk(str(output_dir))
    batches = [range(start, min(start + batch_size, len(source))) for start in range(0, len(source), batch_size)]
    turns = in_turns(batches, process, num_processes if saved is not None else 1)
    keep_masks: dict[int, Masks] = {}
    with without_gradients(model):
        for samples in tqdm(turns, desc="Demonstrations", unit="batch", disable=process > 0):
            if saved is not None:
                saved.read_others()
                if saved.is_over:
                    return load_from_disk(str(output_dir))
            new = None if saved is None else saved.of(samples)
            if new is None:
                batch = encoder([source[index] for index in samples])
                batch = batch if unpruned_answers is None else unpruned_answers(batch)
                demonstrated = demonstrate(teacher, model, batch, schedules)
                chosen = [demonstrated[index % len(schedules)] for index in samples]
                rows = enumerate(zip(chosen, batch.inputs.valid, strict=True))
                new = [[mask[row, valid].tolist() for mask in masks] for row, (masks, valid) in rows]
                if saved is not None:
                    saved.add(samples.start, new)
            keep_masks.update(zip(samples, new, strict=True))
    in_order = [keep_masks[index] for index in range(len(source))]
    column = Dataset.from_dict({"keep_masks": in_order}).cast_column("keep_masks", List(List(Value("bool"))))
    demonstrations = source.add_column("keep_masks", column.data.column("keep_masks").combine_chunks())
    if unpruned_answers is not None:
        demonstrations = unpruned_answers.add_to(demonstrations, encoder)
    for name in ("images", "image"):
        if demonstrations.features.get(name) != dataset.features.get(name):
            demonstrations = demonstrations.cast_column(name, dataset.features[name])
    if saved is not None and process == 0:
        save_whole(demonstrations, Path(str(output_dir)), saved.depends_on)
        saved.remove()
    return demonstrations


@contextlib.contextmanager
def without_gradients(model: TPRLForConditionalGeneration) -> Iterator[None]:
    """The gradient teacher needs gradients of the tokens only."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def in_turns(batches: Sequence[range], process: int, num_processes: int) -> list[range]:
    """
    All batches in the order in which a process looks at them: its own share, then those of the others from their ends,
    for the case that these are slower or have died.
    """
    shares = [batches[(process + other) % num_processes :: num_processes] for other in range(num_processes)]
    return [*shares[0], *(one for share in shares[1:] for one in reversed(share))]


def is_made_from(path: Path, depends_on: Mapping[str, Any]) -> bool:
    """Whether that file of a dataset says that it was made from these things."""
    try:
        return json.loads(path.read_bytes()) == depends_on
    except (OSError, ValueError):
        return False


def save_whole(dataset: Dataset, directory: Path, depends_on: Mapping[str, Any]) -> None:
    """Saves a dataset, and what it was made from, beside `directory`, and puts it there when all of it is written."""
    with scratch_directory(directory.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        dataset.save_to_disk(str(new))
        mark_whole(new)
        (new / MADE_FROM).write_text(json.dumps(depends_on, indent=1) + "\n")  # not in the manifest: it may go
        if directory.exists():
            directory.rename(old)
        put_first(new, directory)
