"""What a policy did with single questions, for `log_completions`: a table, and pictures of the keep masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from tprl_hf.modeling.saved_files import written_whole
from tprl_hf.modeling.text_query import question_of
from tprl_hf.pictures import images_of
from tprl_hf.visualization import Panel, draw_figures, figures_by_block, seen_pictures

from .answer_batches import AnswerBatch, SampleEncoder, open_images, reference_answer

# Trackers that have tables and images under these names, `log`, `Table(dataframe=...)` and `Image`.
TRACKERS = ("wandb", "trackio")


@dataclass
class Completion:
    """One answer with a part of the visual tokens.

    Args:
        question, answer (`str`): what was asked, and what was answered.
        reference (`str`, *optional*): the answer of the dataset, or of the LVLM itself where that is the reference.
        num_kept, num_visual (`int`): of the visual tokens.
        score (`float`): what the keep mask earned.
        picture (`PIL.Image.Image`, *optional*): the kept tokens over the images; of a question without images none.
    """

    question: str
    answer: str
    reference: str | None
    num_kept: int
    num_visual: int
    score: float
    picture: Image.Image | None = None

    def row(self, step: int) -> dict[str, Any]:
        """Of the table."""
        return {
            "step": step,
            "question": self.question,
            "kept_tokens": self.num_kept,
            "visual_tokens": self.num_visual,
            "answer": self.answer,
            "reference": self.reference,
            "score": self.score,
        }


def completions_of(
    encoder: SampleEncoder,
    batch: AnswerBatch,
    keep_masks: Tensor,
    sample_index: Sequence[int],
    answers: Sequence[str],
    scores: Tensor,
) -> list[Completion]:
    """Of `keep_masks [S, N]` of samples `sample_index` of a batch of `encoder`, their `answers` and `scores [S]`."""
    found = []
    for keep_mask, sample, answer, score in zip(keep_masks, sample_index, answers, scores.tolist(), strict=True):
        row, valid = batch.rows[sample], batch.inputs.valid[sample]
        kept, unpruned = keep_mask[valid], batch.samples[sample].unpruned
        reference = reference_answer(row) if unpruned is None else unpruned.text
        completion = Completion(
            question_of(row["prompt"]), answer, reference, int(kept.sum()), int(valid.sum()), score
        )
        if len(kept):
            layout = batch.inputs.layout[torch.tensor(sample)][valid]
            images = open_images(images_of(row))
            seen = seen_pictures(images, encoder.processor, encoder.process(row), layout)
            panel = Panel(f"{completion.num_kept} of {completion.num_visual} tokens", answer, kept)
            completion.picture = draw_figures(figures_by_block(seen, layout, [panel], completion.question))
        found.append(completion)
    return found


def as_text(completions: Sequence[Completion], step: int) -> str:
    """The table for a terminal."""
    lines = [("kept", "score", "answer", "question")]
    for one in completions:
        kept = f"{one.num_kept}/{one.num_visual}"
        lines.append((kept, f"{one.score:.3f}", repr(one.answer[:40]), one.question[:60]))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    table = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]) for line in lines
    ]
    return "\n".join([f"Step {step}", *table])


def write_completions(
    completions: Sequence[Completion],
    step: int,
    output_dir: str,
    trackers: Sequence[str],
    callbacks: Sequence[TrainerCallback],
) -> None:
    """
    Prints the table, writes it to `output_dir/completions/completions_STEP.parquet`, and hands table and pictures to
    the trackers that take them.

    Args:
        completions: of which the log tells.
        step (`int`): the optimizer step.
        output_dir (`str`): of the training.
        trackers (`list[str]`): `report_to` of the config.
        callbacks: those of the trainer; TensorBoard's has the writer.
    """
    print(as_text(completions, step), flush=True)
    table = Dataset.from_list([one.row(step) for one in completions])
    folder = Path(output_dir) / "completions"
    with written_whole(folder) as scratch:
        table.to_parquet(str(Path(scratch) / f"completions_{step:05d}.parquet"))
    for tracker in set(TRACKERS) & set(trackers):
        package = import_module(tracker)
        frame = table.to_pandas()
        frame["picture"] = [None if one.picture is None else package.Image(one.picture) for one in completions]
        # the axis of all other rows: trackers count their calls, of which this is one more
        package.log({"completions": package.Table(dataframe=frame), "train/global_step": step})
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            lines = as_text(completions, step).splitlines()
            callback.tb_writer.add_text("completions", "\n".join(f"    {line}" for line in lines), step)
            for number, one in enumerate(completions):
                if one.picture is not None:
                    pixels = np.asarray(one.picture)
                    callback.tb_writer.add_image(f"completions/{number}", pixels, step, dataformats="HWC")
