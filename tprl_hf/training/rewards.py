"""What a rollout earns: scores of its keep masks, and the reward of each step (eq. 4-6 of the TPRL paper)."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration

from .answer_batches import AnswerBatch

# As in TRL: f(prompts, completions, **columns) -> list of floats.
RewardFunction = Callable[..., list[float]]


@dataclass
class MaskScores:
    """Of S keep masks.

    Args:
        scores (float32 `[S]`): what a policy earns with them.
        correct (`bool [S]`, *optional*): whether greedy decoding gives the reference answer. Not known where reward
            functions score, as nobody needs it then.
        by_function (`dict`): what each reward function gave, by its name, float32 `[S]` each.
    """

    scores: Tensor
    correct: Tensor | None = None
    by_function: dict[str, Tensor] = field(default_factory=dict)

    def take(self, index: slice | Tensor) -> "MaskScores":
        """Of the masks `index`."""
        correct = None if self.correct is None else self.correct[index]
        return MaskScores(self.scores[index], correct, {k: v[index] for k, v in self.by_function.items()})

    def metrics(self) -> dict[str, Tensor]:
        """Means by their names in the log."""
        found = {"objective/score": self.scores.mean()}
        if self.correct is not None:
            found["objective/accuracy"] = self.correct.float().mean()
        return {**found, **{f"rewards/{name}/mean": values.mean() for name, values in self.by_function.items()}}


def step_rewards(scores: Tensor, num_kept: Tensor, step_mask: Tensor, alpha: float = 1.0, beta: float = 0.1) -> Tensor:
    """
    `r_t = alpha * (Score_t - Score_{t-1}) + beta * (1 - K_t / K_{t-1})` (eq. 4-6) of each step that exists.

    The paper averages the score over a mini-batch; we give each trajectory its own, which has the same mean. A
    trajectory that has kept nothing has ended: the steps that it does not have earn nothing.

    Args:
        scores (`[T + 1, S]`): before the first step and after each.
        num_kept (`int64 [T + 1, S]`): tokens left at the same times.
        step_mask (`bool [T, S]`): steps that exist.

    Returns:
        float `[T, S]`, 0 where no step exists.
    """
    task = scores[1:] - scores[:-1]
    efficiency = 1 - num_kept[1:] / num_kept[:-1].clamp(min=1)
    return (alpha * task + beta * efficiency) * step_mask


def reward_name(function: RewardFunction) -> str:
    """The name of a reward function in the log."""
    return function.__name__ if inspect.isroutine(function) else type(function).__name__


def load_reward(name: str) -> RewardFunction:
    """
    The reward function that a recipe names.

    Args:
        name (`str`): `"module:function"`; the module is looked for in the current directory first.

    Raises:
        `ValueError`: when there is no such module or function.
    """
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise ValueError(f"{name!r} does not name a reward function: write module:function.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"There is no reward function {name!r}: {error}.") from error
    if not callable(found):
        raise ValueError(f"{name!r} is not a function but {type(found).__name__}.")
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
def reward_function_scores(
    reward_funcs: Sequence[RewardFunction],
    model: TPRLForConditionalGeneration,
    processor: Any,
    batch: AnswerBatch,
    keep_mask: Tensor,
    sample_index: Sequence[int],
    max_completion_length: int,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """
    What each reward function gives for answers that are generated greedily, float32 `[S]`, by the function's name.

    Args:
        batch: B samples; `keep_mask` (`bool [S, N]`) and `sample_index` (`list[int]`) as in [`score_answers`].

    Raises:
        `ValueError`: when a function does not return one number for each completion.
    """
    valid = batch.inputs.valid
    completions: list[str] = []
    for start in range(0, len(sample_index), batch_size):
        samples = list(sample_index[start : start + batch_size])
        prompts = batch.prompts(samples)
        sequences = model.generate(
            **prompts,
            keep_mask=keep_mask[start : start + batch_size][valid[samples]],
            max_new_tokens=max_completion_length,
            do_sample=False,
        )
        new_tokens = sequences[:, prompts["input_ids"].shape[1] :]
        completions += [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
    rows = [batch.rows[index] for index in sample_index]
    names = [name for name in batch.rows[0] if name not in ("images", "prompt")]
    columns = {name: [row[name] for row in rows] for name in names}
    found = {}
    for function in reward_funcs:
        rewards = function(prompts=[row["prompt"] for row in rows], completions=completions, **columns)
        if len(rewards) != len(rows):
            name = reward_name(function)
            raise ValueError(f"The reward function {name} returned {len(rewards)} values for {len(rows)} completions.")
        found[reward_name(function)] = torch.tensor(rewards, dtype=torch.float32, device=keep_mask.device)
    return found
