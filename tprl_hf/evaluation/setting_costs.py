"""What each setting of a comparison costs for one question: operations, and time."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tprl_hf.modeling.generation_tprl import GREEDY

from .benchmark import Spread, time_in_turns
from .compare_pruners import Prompts, Setting, full_size, shrunk, using
from .operation_counts import OperationCounts, count, count_prefill, count_pruner
from .smaller_pictures import PictureShrinker

Name = tuple[str, str]  # of a row: pruner and budget


def one_each(settings: Sequence[Setting]) -> dict[Name, Setting]:
    """The first setting of each row."""
    found: dict[Name, Setting] = {}
    for setting in settings:
        found.setdefault((setting.pruner, setting.budget), setting)
    return found


def read_one(model, processor, sample: dict[str, Any], setting: Setting) -> Prompts:
    """One question as a setting lets the model read it."""
    method = setting.pruner_for([sample])
    observer = method if method is not None and method.needs_attention else None
    full = full_size(model, processor, [sample], observer)
    if setting.picture_ratio is None or setting.enlarged:  # which costs what the full size does
        return full
    (smaller,) = shrunk(model, PictureShrinker(model, processor), [sample], setting, full)
    return smaller


def count_settings(
    model, processor, sample: dict[str, Any], settings: Sequence[Setting]
) -> dict[Name, OperationCounts]:
    """
    Operations of each row for one question.

    Args:
        model ([`TPRLForConditionalGeneration`]), processor ([`ProcessorMixin`]): The model and its processor.
        sample (`dict`): The question, with an image.
        settings (`Sequence[Setting]`): Those of the comparison.
    """
    counted: dict[Name, OperationCounts] = {}
    towers: dict[float | None, int] = {}
    prefill: dict[int, int] = {}  # by the number of tokens kept, which is all that it depends on
    for name, setting in one_each(settings).items():
        prompts, method = read_one(model, processor, sample, setting), setting.pruner_for([sample])
        size = None if setting.enlarged else setting.picture_ratio
        if size not in towers:
            options = {} if size is None else model.adapter.smaller_picture_options
            encode = functools.partial(model.encode_images, **prompts.inputs, with_attention=False, **options)
            towers[size] = count(encode)[0]
        budget = setting.arguments if prompts.arguments is None else prompts.arguments
        pruner, keep_mask = count_pruner(model, prompts.inputs, prompts.features, method, budget)
        num_kept = int(keep_mask.sum())
        if num_kept not in prefill:
            prefill[num_kept] = count_prefill(model, prompts.inputs, prompts.features, keep_mask)
        counted[name] = OperationCounts(pruner, prefill[num_kept], towers[size])
    return counted


def time_settings(
    model, processor, sample: dict[str, Any], settings: Sequence[Setting], rounds: int
) -> dict[Name, Spread]:
    """
    Milliseconds from the pixels to the first new token, for one question under each row, in turns. Reading and
    resizing the picture is not in it; vision tower, pruner and LLM are.

    Args:
        model ([`TPRLForConditionalGeneration`]), processor ([`ProcessorMixin`]): The model and its processor.
        sample (`dict`): The question, with an image.
        settings (`Sequence[Setting]`): Those of the comparison.
        rounds (`int`): Timed rounds, at least 2, after two that are not timed.

    Returns:
        `dict`: Median and quartiles of each row: processor time on a CPU, the GPU's clock on an NVIDIA GPU, else
        wall-clock.
    """

    def answer(setting: Setting, prompts: Prompts, options: Mapping[str, Any]) -> None:
        budget = setting.arguments if prompts.arguments is None else prompts.arguments
        with using(model, setting.pruner_for([sample])), torch.no_grad():
            features = model.encode_images(**prompts.inputs, **options)
            once = {**GREEDY, "max_new_tokens": 1, "stop_strings": None}
            model.generate(**prompts.inputs, **budget, visual_features=features, **once)

    calls = {}
    for name, setting in one_each(settings).items():
        prompts = read_one(model, processor, sample, setting)
        full = setting.picture_ratio is None or setting.enlarged
        options = {} if full else model.adapter.smaller_picture_options
        calls[" ".join(name)] = functools.partial(answer, setting, prompts, options)
    times = time_in_turns(calls, rounds)
    clock = {"cpu": "cpu", "cuda": "cuda"}.get(model.device.type, "wall")
    return {name: Spread.of(getattr(times[" ".join(name)], clock)) for name in one_each(settings)}
