"""How well the frozen LVLM answers with a part of its visual tokens: the reference answer, teacher-forced."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration

from .answer_batches import AnswerBatch, EncodedSample, left_pad
from .divergence import mean_divergence, stacked_targets
from .micro_batches import MAX_TOKENS, within_memory


@dataclass
class AnswerScores:
    """Of S keep masks.

    Args:
        logprobs (float32 `[S]`): mean log-probability of the reference answer's tokens, its end included.
        correct (`bool [S]`): every token of the reference answer is the most likely one, so that greedy decoding gives
            exactly this answer.
        divergence (float32 `[S]`, *optional*): where the reference is the LVLM's own unpruned answer, `KL(unpruned ||
            pruned)` of the next-token distributions along it, see [`~tprl_hf.training.divergence.mean_divergence`].
    """

    logprobs: Tensor
    correct: Tensor
    divergence: Tensor | None = None

    def by_name(self, score: str) -> Tensor:
        """What the setting `score` of a config asks for, float32 `[S]`; higher is better."""
        if score == "correct":
            return self.correct.float()
        if score == "kl":
            assert self.divergence is not None
            return -self.divergence
        return self.logprobs  # of the dataset's answer, or of the LVLM's own


def answered_prompts(
    model: TPRLForConditionalGeneration, batch: AnswerBatch, sample_index: Sequence[int]
) -> tuple[dict[str, Any], Tensor]:
    """
    Prompts of samples `sample_index`, which may repeat, followed by their reference answers.

    Returns:
        What `model.forward` takes, left-padded, and the labels `int64 [S, L]` of the answers alone (-100: none).

    Raises:
        `ValueError`: for a sample without a reference answer.
    """
    samples, answers = [batch.samples[index] for index in sample_index], []
    for index, sample in zip(sample_index, samples, strict=True):
        if sample.answer_ids is None:
            raise ValueError(
                f"A sample has no answer to compare with: {str(batch.rows[index]['prompt'])[:60]!r}. Give it an "
                "`answer`, or set score='agreement', which compares with what the LVLM itself answers unpruned."
            )
        answers.append(sample.answer_ids)
    pairs = list(zip(samples, answers, strict=True))
    labels = left_pad([torch.cat([torch.full_like(s.prompt_ids, -100), answer]) for s, answer in pairs], -100)
    answer_type = model.adapter.answer_token_type
    inputs = {
        "input_ids": left_pad([torch.cat([s.prompt_ids, answer]) for s, answer in pairs]),
        "attention_mask": left_pad([torch.ones(len(s.prompt_ids) + len(answer)).long() for s, answer in pairs]),
    }
    for name in samples[0].types:
        rows = [torch.cat([s.types[name], torch.full_like(answer, answer_type)]) for s, answer in pairs]
        inputs[name] = left_pad(rows)
    on_device = {name: value.to(model.device) for name, value in inputs.items()}
    return {**on_device, "visual_features": batch.features.take(list(sample_index))}, labels


def answer_logits(
    model: TPRLForConditionalGeneration, inputs: dict[str, Any], labels: Tensor, keep_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits `[S, A, vocab]` of answers after pruning with `keep_mask [V]`, and their labels `[S, A]` (-100: none)."""
    length = int((labels != -100).sum(1).max())
    logits = model(**inputs, keep_mask=keep_mask, use_cache=False, logits_to_keep=length + 1).logits
    return logits[:, -length - 1 : -1].float(), labels[:, -length:].to(logits.device)


def score_logits(logits: Tensor, labels: Tensor, samples: Sequence[EncodedSample] = ()) -> AnswerScores:
    """
    Scores of answers from their logits `[S, A, vocab]` and labels `[S, A]`; gradients pass.

    Args:
        samples: those that the answers are of, for the divergence where they have the LVLM's own answers.
    """
    label_mask = labels != -100
    token = labels.clamp(min=0)[..., None]
    logprobs = logits.log_softmax(-1).gather(-1, token).squeeze(-1).masked_fill(~label_mask, 0.0)
    correct = ((logits.argmax(-1) == labels) | ~label_mask).all(1)
    scores = AnswerScores(logprobs.sum(1) / label_mask.sum(1), correct)
    unpruned = [sample.unpruned for sample in samples if sample.unpruned is not None]
    if unpruned:
        scores.divergence = mean_divergence(logits, label_mask, *stacked_targets(unpruned, logits.device))
    return scores


@torch.no_grad()
def score_answers(
    model: TPRLForConditionalGeneration,
    batch: AnswerBatch,
    keep_mask: Tensor,
    sample_index: Sequence[int],
    batch_size: int = 64,
    max_tokens: int = MAX_TOKENS,
) -> AnswerScores:
    """
    Scores S keep masks at once, several of one sample if need be.

    Args:
        batch: B samples with N visual tokens at most.
        keep_mask (`bool [S, N]`): True where a token is kept.
        sample_index (`list[int]` of length S): the sample that each mask is of.
        batch_size (`int`, defaults to 64): masks that run through the LLM together, at most.
        max_tokens (`int`, defaults to 40,960): tokens that run through it together, padding included, at most.

    Returns:
        [`AnswerScores`]
    """
    valid = batch.inputs.valid
    answers = [0 if sample.answer_ids is None else len(sample.answer_ids) for sample in batch.samples]
    texts = [
        len(sample.prompt_ids) - sample.num_visual + length
        for sample, length in zip(batch.samples, answers, strict=True)
    ]
    # Masks that keep about as many tokens run together, so that little is padded.
    num_kept = keep_mask.sum(1)
    order, kept = num_kept.argsort(stable=True).tolist(), num_kept.tolist()
    lengths = [texts[sample_index[index]] + kept[index] for index in order]
    logprobs = torch.zeros(len(sample_index), device=keep_mask.device)
    correct = torch.zeros(len(sample_index), dtype=torch.bool, device=keep_mask.device)
    is_own = bool(batch.samples) and all(sample.unpruned is not None for sample in batch.samples)
    divergence = torch.zeros_like(logprobs) if is_own else None
    for part in within_memory(lengths, max_tokens, batch_size):
        chunk = [order[place] for place in part]
        samples = [sample_index[index] for index in chunk]
        inputs, labels = answered_prompts(model, batch, samples)
        logits, labels = answer_logits(model, inputs, labels, keep_mask[chunk][valid[samples]])
        scores = score_logits(logits, labels, [batch.samples[index] for index in samples] if is_own else ())
        logprobs[chunk], correct[chunk] = scores.logprobs, scores.correct
        if divergence is not None and scores.divergence is not None:
            divergence[chunk] = scores.divergence
    return AnswerScores(logprobs, correct, divergence)


def gradient_tokens(model: TPRLForConditionalGeneration) -> int:
    """Tokens whose activations take about 16 GiB until the backward pass: some 34 values of each layer's width."""
    text = model.lvlm.config.get_text_config()
    return max(2**34 // (34 * text.hidden_size * text.num_hidden_layers * model.lvlm.dtype.itemsize), 1)


def gradient_saliency(
    model: TPRLForConditionalGeneration, batch: AnswerBatch, keep_mask: Tensor, max_tokens: int | None = None
) -> Tensor:
    """
    What each kept token contributes to the reference answer, to first order: `|d log p(answer) / dv . v|`.

    Args:
        keep_mask (`bool [B, N]`): tokens that the LLM sees.
        max_tokens (`int`, *optional*): tokens that run through it together; by default what fits into 16 GiB.

    Returns:
        float32 `[B, N]`, 0 for tokens that are not kept.
    """
    saliency = torch.zeros(keep_mask.shape, device=keep_mask.device)
    for part in within_memory(
        [len(sample.prompt_ids) for sample in batch.samples], max_tokens or gradient_tokens(model)
    ):
        found = saliency_together(model, batch, part, keep_mask[part][batch.inputs.valid[part]])
        saliency[part, : found.shape[1]] = found
    return saliency


def saliency_together(
    model: TPRLForConditionalGeneration, batch: AnswerBatch, sample_index: list[int], keep_mask: Tensor
) -> Tensor:
    """[`gradient_saliency`] of samples `sample_index`, by one backward pass; `keep_mask [V]` is of their tokens."""
    inputs, labels = answered_prompts(model, batch, sample_index)
    features = inputs["visual_features"]
    leaves = {name: m.rows.detach().clone().requires_grad_() for name, m in features.modalities.items()}
    modalities = {name: replace(m, rows=leaves[name]) for name, m in features.modalities.items()}
    inputs["visual_features"] = replace(features, modalities=modalities)
    # Gradients of sure answers are below what float16 can hold, so they are scaled as much as is possible.
    for scale in (2.0**12, 2.0**6, 1.0) if model.lvlm.dtype == torch.float16 else (1.0,):
        with torch.enable_grad():
            logits, answers = answer_logits(model, inputs, labels, keep_mask)
            loss = scale * score_logits(logits, answers).logprobs.sum()
            gradients = torch.autograd.grad(loss, list(leaves.values()))
        if all(gradient.isfinite().all() for gradient in gradients):
            break
    saliency = {}
    for (name, rows), gradient in zip(leaves.items(), gradients, strict=True):
        of_tokens = (gradient.float() * rows.detach().float()).sum(-1, keepdim=True).abs() / scale
        saliency[name] = replace(features.modalities[name], rows=of_tokens)
    # in the place of the tokens, so that they come in the order and padding of the tokens
    prompts = {**batch.prompts(sample_index), "visual_features": replace(features, modalities=saliency)}
    return model.pruning_inputs(**prompts, with_attention=False).tokens.squeeze(-1)
