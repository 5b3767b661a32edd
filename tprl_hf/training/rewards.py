"""What a rollout earns: scores of its keep masks, and the reward of each step (eq. 4-6 of the TPRL paper)."""

import asyncio
import importlib
import inspect
import math
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from tprl_hf.modeling.generation_tprl import GREEDY
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.pictures import images_of

from .answer_batches import AnswerBatch, open_images
from .answer_ids import answer_lengths, end_ids
from .answer_rewards import ANSWER_REWARDS
from .micro_batches import MAX_TOKENS, within_memory

GIVEN = {"prompts", "completions", "completion_ids", "trainer_state"}  # to reward functions, beside the columns
Rewards = Sequence[float | None]
# As in TRL: f(prompts, completions, **columns), one number for each completion, or None where it says nothing of it.
RewardFunction = Callable[..., Rewards | Awaitable[Rewards]]


@dataclass
class MaskScores:
    """Of S keep masks.

    Args:
        scores (float32 `[S]`): what a policy earns with them; NaN where no reward function said anything.
        correct (`bool [S]`, *optional*): whether greedy decoding gives the reference answer. Not known where reward
            functions score, as nobody needs it then.
        reads_labels (`bool`, defaults to `True`): the reference is the dataset's, not the LVLM's own unpruned answer.
        by_function (`dict`): what each reward function gave, by its name, float32 `[S]` each; NaN for `None`.
    """

    scores: Tensor
    correct: Tensor | None = None
    by_function: dict[str, Tensor] = field(default_factory=dict)
    reads_labels: bool = True

    def take(self, index: slice | Tensor) -> "MaskScores":
        """Of the masks `index`."""
        correct = None if self.correct is None else self.correct[index]
        by_function = {name: values[index] for name, values in self.by_function.items()}
        return MaskScores(self.scores[index], correct, by_function, self.reads_labels)

    def metrics(self) -> dict[str, Tensor]:
        """Means by their names in the log."""
        found = {"objective/score": self.scores.nanmean()}
        if self.correct is not None:
            name = "accuracy" if self.reads_labels else "agreement"
            found[f"objective/{name}"] = self.correct.float().mean()
        if self.scores.isnan().any():
            found["objective/is_scored"] = (~self.scores.isnan()).float().mean()
        return {**found, **{f"rewards/{name}/mean": values.nanmean() for name, values in self.by_function.items()}}


def step_rewards(scores: Tensor, num_kept: Tensor, alpha: float = 1.0, beta: float = 0.1) -> Tensor:
    """
    `r_t = alpha * (Score_t - Score_{t-1}) + beta * (1 - K_t / K_{t-1})` (eq. 4-6).

    The paper averages the score over a mini-batch; we give each trajectory its own, which has the same mean. A
    trajectory that has kept nothing has ended: the steps that it does not have earn nothing for efficiency.

    Args:
        scores (`[T + 1, S]`): before the first step and after each.
        num_kept (`int64 [T + 1, S]`): tokens left at the same times.

    Returns:
        float `[T, S]`.
    """
    task = scores[1:] - scores[:-1]
    left = num_kept.to(scores.dtype)
    efficiency = (1 - left[1:] / left[:-1].clamp(min=1)) * (left[:-1] > 0)
    return alpha * task + beta * efficiency


def in_existing_steps(rewards: Tensor, step_mask: Tensor) -> Tensor:
    """`rewards [T, S]` of the steps that exist; where only the end is scored, an earlier last step gets that score."""
    last = (step_mask.sum(0) - 1).clamp(min=0)
    late = (rewards * ~step_mask).sum(0)
    return (rewards * step_mask).scatter_add(0, last[None], late[None])


def reward_name(function: RewardFunction) -> str:
    """The name of a reward function in the log."""
    return function.__name__ if inspect.isroutine(function) else type(function).__name__


def load_reward(name: str) -> RewardFunction:
    """
    The reward function that a recipe names.

    Args:
        name (`str`): one of [`~tprl_hf.training.answer_rewards`]; or `"module:function"`, whose module is looked for
            in the current directory first.

    Raises:
        `ValueError`: when there is no such module or function.
    """
    if name in ANSWER_REWARDS:
        return ANSWER_REWARDS[name]
    module, colon, function = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not (colon and module and function):
        ours = ", ".join(ANSWER_REWARDS)
        raise ValueError(f"{name!r} does not name a reward function: write module:function, or one of ours: {ours}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"There is no reward function {name!r}: {error}.") from error
    if not callable(found):
        raise ValueError(f"{name!r} is not a function but {type(found).__name__}.")
    return found


def given_rewards(reward_funcs: Any) -> list[RewardFunction]:
    """
    The reward functions that a user passed: one or several, each itself or the name that a recipe would give it.

    Raises:
        `TypeError`: for what is neither a function nor a name.
        `ValueError`: when no function has the name.
    """
    one = callable(reward_funcs) or isinstance(reward_funcs, str)
    found = [
        load_reward(each) if isinstance(each, str) else each
        for each in ([reward_funcs] if one else reward_funcs or [])
    ]
    for each in found:
        if not callable(each):
            raise TypeError(f"reward_funcs are functions, or names of them; got {type(each).__name__}.")
    return found


def check_rewards(functions: Sequence[RewardFunction], weights: Sequence[float] | None) -> list[float]:
    """
    The weight of each reward function, 1 without `weights`.

    Raises:
        `ValueError`: when two functions have one name, or `weights` are not one for each.
    """
    names = [reward_name(function) for function in functions]
    if len(set(names)) < len(names):
        raise ValueError(f"Each reward function is logged under its name, but some share one: {', '.join(names)}.")
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"reward_weights={list(weights)} are not one for each of {names}.")
    return [1.0] * len(names) if weights is None else list(weights)


@torch.no_grad()
def generate_completions(
    model: TPRLForConditionalGeneration,
    processor: Any,
    batch: AnswerBatch,
    keep_mask: Tensor,
    sample_index: Sequence[int],
    max_completion_length: int,
    batch_size: int = 64,
    max_tokens: int = MAX_TOKENS,
) -> tuple[list[str], list[list[int]]]:
    """
    Answers that are generated greedily: their texts, and their ids up to the one that ends them.

    Args:
        batch: B samples.
        keep_mask (`bool [S, N]`), sample_index (`list[int]`), batch_size, max_tokens: as in [`score_answers`].
    """
    valid, ends = batch.inputs.valid, end_ids(model, processor)
    texts: list[str] = []
    ids: list[list[int]] = []
    lengths = [len(batch.samples[sample].prompt_ids) + max_completion_length for sample in sample_index]
    for part in within_memory(lengths, max_tokens, batch_size):
        samples = [sample_index[place] for place in part]
        prompts = batch.prompts(samples)
        sequences = model.generate(
            **prompts,
            keep_mask=keep_mask[part][valid[samples]],
            max_new_tokens=max_completion_length,
            **GREEDY,
            tokenizer=processor.tokenizer,
        )
        length = prompts["input_ids"].shape[1]
        counts = answer_lengths(sequences, length, ends, processor.tokenizer, model.generation_config.stop_strings)
        answers = [row[:count] for row, count in zip(sequences[:, length:].tolist(), counts, strict=True)]
        texts += [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]
        ids += answers
    return texts, ids


def reward_function_scores(
    reward_funcs: Sequence[RewardFunction],
    batch: AnswerBatch,
    sample_index: Sequence[int],
    completions: tuple[list[str], list[list[int]]],
    trainer_state: Any = None,
) -> dict[str, Tensor]:
    """
    What each reward function gives for answers, float32 `[S]` on the CPU, by the function's name; NaN for `None`.

    They are called as in TRL: with `prompts`, `completions` (messages where the prompts are), `completion_ids`,
    `trainer_state` and the columns of the rows. Images are decoded only for functions that name `images`, or
    `image`, the first of each row.

    Args:
        batch: B samples; `sample_index` (`list[int]` of length S): the sample of each answer.
        completions: texts and ids, as [`generate_completions`] returns them.

    Raises:
        `ValueError`: when a function does not return one number or `None` for each completion, or a column has the
            name of something else that it is given.
    """
    rows = [batch.rows[index] for index in sample_index]
    texts, ids = completions
    said = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, texts, strict=True)
    ]
    names = [name for name in batch.rows[0] if name not in ("images", "image", "prompt")]
    if taken := GIVEN.intersection(names):
        raise ValueError(
            f"Reward functions are given {min(taken)!r} by the trainer, and a column of the dataset has that name: "
            "rename it."
        )
    arguments = {
        "prompts": [row["prompt"] for row in rows],
        "completions": said,
        "completion_ids": ids,
        "trainer_state": trainer_state,
        **{name: [row[name] for row in rows] for name in names},
    }
    wanted = {name for function in reward_funcs for name in inspect.signature(function).parameters}
    if wanted & {"images", "image"}:
        opened = {index: open_images(images_of(batch.rows[index])) for index in set(sample_index)}
        if "images" in wanted:
            arguments["images"] = [opened[index] for index in sample_index]
        if "image" in wanted:
            arguments["image"] = [next(iter(opened[index]), None) for index in sample_index]
    return {
        name: torch.tensor(checked_rewards(name, rewards, len(rows)), dtype=torch.float32)
        for name, rewards in call_rewards(reward_funcs, arguments).items()
    }


def call_rewards(reward_funcs: Sequence[RewardFunction], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What each function returns, by its name. Those that are `async` run side by side."""
    found: dict[str, Any] = {reward_name(function): function(**arguments) for function in reward_funcs}
    waiting = {name: value for name, value in found.items() if inspect.isawaitable(value)}
    if waiting:

        async def together() -> list[Any]:
            return await asyncio.gather(*waiting.values())

        with ThreadPoolExecutor(1) as pool:  # a notebook has a loop of its own in this thread
            found |= zip(waiting, pool.submit(asyncio.run, together()).result(), strict=True)
    return found


def checked_rewards(name: str, rewards: Any, count: int) -> list[float]:
    """Raises `ValueError` unless `rewards` are `count` finite numbers or `None`, which becomes NaN."""
    if not isinstance(rewards, Sized) or not isinstance(rewards, Iterable):
        raise ValueError(
            f"The reward function {name} returned {type(rewards).__name__}: return a list of {count} numbers, one for "
            "each completion; None says nothing of it."
        )
    if len(rewards) != count:
        raise ValueError(f"The reward function {name} returned {len(rewards)} values for {count} completions.")
    for reward in rewards:
        if reward is not None and (not isinstance(reward, SupportsFloat) or getattr(reward, "ndim", None)):
            raise ValueError(f"The reward function {name} returned {reward!r}: a number, or None to say nothing.")
        if reward is not None and not math.isfinite(float(reward)):
            raise ValueError(f"The reward function {name} returned {reward!r}: return None where there is no reward.")
    return [math.nan if reward is None else float(reward) for reward in rewards]


def weighted_sum(by_function: Mapping[str, Tensor], weights: Sequence[float]) -> Tensor:
    """The sum of rewards `[S]` with `weights`; `None` counts as nothing, and where all are `None` the sum is NaN."""
    stacked = torch.stack(list(by_function.values()))
    total = (stacked.nan_to_num() * torch.tensor(weights, device=stacked.device)[:, None]).sum(0)
    return total.masked_fill(stacked.isnan().all(0), torch.nan)
