"""What a rollout earns: scores of its keep masks, and the reward of each step (eq. 4-6 of the TPRL paper)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration

from .answer_batches import AnswerBatch

# As in TRL: f(prompts, completions, **columns) -> list of floats.
RewardFunction = Callable[..., list[float]]


def step_rewards(
    scores: Tensor,
    num_kept: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    beta: float = 0.1,
    only_while_right: bool = False,
) -> Tensor:
    """
    `r_t = alpha * (Score_t - Score_{t-1}) + beta * (1 - K_t / K_{t-1})` (eq. 4-6).

    The paper averages the score over a mini-batch; we give each trajectory its own, which has the same mean.

    Args:
        scores (`[T + 1, S]`): before the first step and after each.
        num_kept (`int64 [T + 1, S]`): tokens left at the same times.
        right (`bool [T + 1, S]`): whether the answer was right at the same times.
        only_while_right (`bool`): pay the second term only for steps after which the answer is right: paid always, it
            makes it worthwhile to keep nothing.

    Returns:
        float `[T, S]`.
    """
    task = scores[1:] - scores[:-1]
    efficiency = 1 - num_kept[1:] / num_kept[:-1].clamp(min=1)
    if only_while_right:
        efficiency = efficiency * right[1:]
    return alpha * task + beta * efficiency


@torch.no_grad()
def reward_function_scores(
    reward_funcs: Sequence[RewardFunction],
    model: TPRLForConditionalGeneration,
    processor: Any,
    batch: AnswerBatch,
    keep_mask: Tensor,
    of: list[int],
    max_new_tokens: int,
    batch_size: int = 64,
) -> Tensor:
    """
    Sum of the reward functions over answers that are generated greedily, float32 `[S]`.

    Args:
        batch: B samples; `keep_mask` (`bool [S, N]`) and `of` (`list[int]`) as in [`score_answers`].

    Raises:
        `ValueError`: when a function does not return one number for each completion.
    """
    valid = batch.inputs.valid
    completions: list[str] = []
    for start in range(0, len(of), batch_size):
        samples = of[start : start + batch_size]
        prompts = batch.prompts
        assert prompts.features is not None
        sequences = model.generate(
            input_ids=prompts.input_ids[samples].to(prompts.device),
            attention_mask=prompts.attention_mask[samples].to(prompts.device),
            keep_mask=keep_mask[start : start + batch_size][valid[samples]],
            visual_features=prompts.features.take(samples),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **{name: value[samples].to(prompts.device) for name, value in prompts.inputs.items()},
        )
        new_tokens = sequences[:, prompts.input_ids.shape[1] :]
        completions += [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
    rows = [batch.rows[index] for index in of]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("images", "prompt")}
    total = torch.zeros(len(of), device=keep_mask.device)
    for function in reward_funcs:
        rewards = function(prompts=[row["prompt"] for row in rows], completions=completions, **columns)
        if len(rewards) != len(of):
            raise ValueError(f"A reward function returned {len(rewards)} values for {len(of)} completions.")
        total += torch.tensor(rewards, dtype=torch.float32, device=total.device)
    return total
