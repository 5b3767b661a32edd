"""What the policy does step by step with one picture (Fig. 4 of the TPRL paper)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tprl_hf.modeling.budget import Budget
from tprl_hf.modeling.checkpoint_checks import refuse_untrained
from tprl_hf.modeling.generation_tprl import GREEDY
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.training.answer_batches import SampleEncoder
from tprl_hf.training.answer_scores import score_answers

from .answers import chat_inputs


@dataclass
class TrajectoryStep:
    """One state of a trajectory.

    Args:
        keep_mask (`bool [N]`): visual tokens that are left.
        probs (float32 `[N]`, *optional*): how likely the policy found each to be kept, in the step that led here.
        num_kept (`int`): tokens that are left.
        score (`float`): mean log-probability of the reference answer's tokens, its end included.
        answer (`str`): what the LVLM answers with these tokens.
    """

    keep_mask: Tensor
    probs: Tensor | None
    num_kept: int
    score: float
    answer: str


@torch.no_grad()
def trajectory_of(
    model: TPRLForConditionalGeneration,
    processor: Any,
    sample: Mapping[str, Any],
    budget: Budget,
    num_steps: int | None = None,
    max_new_tokens: int = 64,
) -> list[TrajectoryStep]:
    """
    The states t = 0 (nothing pruned) to T of one question.

    Args:
        model ([`TPRLForConditionalGeneration`]):
            With a trained policy.
        processor ([`ProcessorMixin`]):
            Its processor.
        sample (`Mapping`):
            `images`, `prompt`, and `answer`, the reference; without one it is what the model answers unpruned.
        budget ([`Budget`]):
            What is left after the last step.
        num_steps (`int`, *optional*):
            T. Defaults to the checkpoint's own.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Length of the longest answer.

    Raises:
        `ValueError`: for a model whose policy was not trained.
    """
    refuse_untrained(model.config)
    policy = model.learned_pruner()
    policy.num_steps = num_steps or policy.num_steps
    inputs = chat_inputs(processor, [dict(sample)], model.device)

    def answer(**pruning: Any) -> str:
        sequences = model.generate(
            **inputs,
            **pruning,
            **GREEDY,
            max_new_tokens=max_new_tokens,
            tokenizer=processor.tokenizer,
        )
        return processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    unpruned = answer(prune=False)
    row = {**sample, "answer": sample.get("answer") or unpruned}
    batch = SampleEncoder(model, processor)([row])
    valid = batch.inputs.valid[0]
    states: list[tuple[Tensor, Tensor | None]] = [(valid, None)]
    for step, (keep_mask, scores) in enumerate(policy.trajectory(batch.inputs, budget)):
        # a token that survived s steps has a score of s and its last probability
        states.append((keep_mask[0], (scores[0] - step).clamp(min=0)))
    masks = torch.stack([mask for mask, _ in states])
    logprobs = score_answers(model, batch, masks, [0] * len(masks)).logprobs.tolist()
    answers = [unpruned] + [answer(keep_mask=mask[valid]) for mask in masks[1:]]
    return [
        TrajectoryStep(mask[valid], None if probs is None else probs[valid], int(mask.sum()), logprob, text)
        for (mask, probs), logprob, text in zip(states, logprobs, answers, strict=True)
    ]
