"""How well the frozen LVLM answers with a part of its visual tokens: the reference answer, teacher-forced."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tprl_hf.modeling.columns import find_visual, pad_rows
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.pruned_batch import PromptBatch, prune_batch

from .answer_batches import ANSWER_TYPES, AnswerBatch, left_pad


@dataclass
class AnswerScores:
    """Of S keep masks.

    Args:
        logprobs (float32 `[S]`): mean log-probability of the reference answer's tokens, its end included.
        right (`bool [S]`): every token of the reference answer is the most likely one, so that greedy decoding gives
            exactly this answer.
    """

    logprobs: Tensor
    right: Tensor


def answered_prompts(model: TPRLForConditionalGeneration, batch: AnswerBatch, of: list[int]) -> PromptBatch:
    """Prompts of samples `of`, which may repeat, followed by their answers; `labels` are set on the answers alone."""
    samples = [batch.samples[index] for index in of]
    input_ids = left_pad([torch.cat([sample.prompt_ids, sample.answer_ids]) for sample in samples])
    labels = [torch.cat([torch.full_like(s.prompt_ids, -100), s.answer_ids]) for s in samples]
    answer_type = ANSWER_TYPES.get(model.adapter.config.model_type, 0)
    inputs = {
        name: left_pad([torch.cat([s.types[name], torch.full_like(s.answer_ids, answer_type)]) for s in samples])
        for name in samples[0].types
    }
    assert batch.prompts.features is not None
    attention_mask = left_pad([torch.ones_like(row) for row in labels])
    return PromptBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        visual=find_visual(input_ids, list(model.adapter.token_ids.values())) & attention_mask.bool(),
        features=batch.prompts.features.take(of),
        inputs={**inputs, "labels": left_pad(labels, -100)},
        device=model.device,
    )


def answer_logits(
    model: TPRLForConditionalGeneration, prompts: PromptBatch, keep_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits `[S, A, vocab]` of answers after pruning with `keep_mask [V]`, and their labels `[S, A]` (-100: none)."""
    pad = model.generation_config.pad_token_id
    contiguous = model.config.position_ids == "contiguous"
    pruned = prune_batch(prompts, keep_mask, model.adapter, contiguous, 0 if pad is None else pad)
    labels = pruned.inputs.pop("labels")
    length = int((prompts.inputs["labels"] != -100).sum(1).max())
    pruned.inputs["position_ids"] = pruned.inputs["position_ids"] + model.adapter.forward_position_offset
    logits = model.lvlm(**pruned.inputs, use_cache=False, logits_to_keep=length + 1, return_dict=True).logits
    return logits[:, -length - 1 : -1].float(), labels[:, -length:]


def score_logits(logits: Tensor, labels: Tensor) -> AnswerScores:
    """Scores of answers from their logits `[S, A, vocab]` and labels `[S, A]`."""
    asked = labels != -100
    token = labels.clamp(min=0)[..., None]
    logprobs = logits.log_softmax(-1).gather(-1, token).squeeze(-1).masked_fill(~asked, 0.0)
    right = ((logits.argmax(-1) == labels) | ~asked).all(1)
    return AnswerScores(logprobs.sum(1) / asked.sum(1), right)


@torch.no_grad()
def score_answers(
    model: TPRLForConditionalGeneration, batch: AnswerBatch, keep_mask: Tensor, of: list[int], batch_size: int = 64
) -> AnswerScores:
    """
    Scores S keep masks at once, several of one sample if need be.

    Args:
        batch: B samples with N visual tokens at most.
        keep_mask (`bool [S, N]`): True where a token is kept.
        of (`list[int]` of length S): the sample that each mask is of.
        batch_size (`int`, defaults to 64): masks that run through the LLM together.

    Returns:
        [`AnswerScores`]
    """
    valid = batch.inputs.valid
    # Masks that keep about as many tokens run together, so that little is padded.
    order = keep_mask.sum(1).argsort(stable=True).tolist()
    logprobs = torch.zeros(len(of), device=keep_mask.device)
    right = torch.zeros(len(of), dtype=torch.bool, device=keep_mask.device)
    for start in range(0, len(of), batch_size):
        chunk = order[start : start + batch_size]
        samples = [of[index] for index in chunk]
        prompts = answered_prompts(model, batch, samples)
        scores = score_logits(*answer_logits(model, prompts, keep_mask[chunk][valid[samples]]))
        logprobs[chunk], right[chunk] = scores.logprobs, scores.right
    return AnswerScores(logprobs, right)


def gradient_saliency(model: TPRLForConditionalGeneration, batch: AnswerBatch, keep_mask: Tensor) -> Tensor:
    """
    What each kept token contributes to the reference answer, to first order: `|d log p(answer) / dv . v|`.

    Args:
        keep_mask (`bool [B, N]`): tokens that the LLM sees.

    Returns:
        float32 `[B, N]`, 0 for tokens that are not kept.
    """
    prompts = answered_prompts(model, batch, list(range(len(batch))))
    features = prompts.features
    assert features is not None
    leaves = {name: m.rows.detach().clone().requires_grad_() for name, m in features.modalities.items()}
    modalities = {name: replace(m, rows=leaves[name]) for name, m in features.modalities.items()}
    prompts.features = replace(features, modalities=modalities)
    with torch.enable_grad():
        logits, labels = answer_logits(model, prompts, keep_mask[batch.inputs.valid])
        score_logits(logits, labels).logprobs.sum().backward(inputs=list(leaves.values()))
    saliency = {}
    for name, rows in leaves.items():
        assert rows.grad is not None
        saliency[name] = (rows.grad * rows.detach()).sum(-1).abs().float()
    return pad_rows(prompts.in_order(saliency, model.adapter), prompts.num_visual)[0]
