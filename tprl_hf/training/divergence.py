"""How far the next-token distributions under a pruned prompt are from those under the whole prompt. Pure functions."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class UnprunedAnswer:
    """
    What the frozen LVLM answers when it sees all visual tokens, and how sure it was at each place.

    Args:
        text (`str`): the answer.
        ids (`int64 [A]`): its tokens, with the one that ends it unless it was cut off.
        top_ids (`int64 [A, k]`): the k most likely next tokens at each place.
        top_logprobs (float32 `[A, k + 1]`): their log-probabilities, and that of all others together.
    """

    text: str
    ids: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def to_json(self) -> dict[str, Any]:
        """As a file or a column of a dataset holds it: text, a list of ids, and numbers as texts."""
        return {
            "text": self.text,
            "ids": self.ids.tolist(),
            "top_ids": as_text(self.top_ids.int()),
            "top_logprobs": as_text(self.top_logprobs),
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "UnprunedAnswer":
        """Takes what `to_json` gave."""
        ids = torch.tensor(saved["ids"], dtype=torch.int64)
        top_ids, top_logprobs = (
            from_text(saved[name], dtype).view(len(ids), -1)
            for name, dtype in (("top_ids", torch.int32), ("top_logprobs", torch.float32))
        )
        return cls(saved["text"], ids, top_ids.long(), top_logprobs)


def as_text(values: Tensor) -> str:
    """The bytes of a tensor in base64: of an answer of a hundred tokens 35 kB; written as digits three times that."""
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()


def from_text(text: str, dtype: torch.dtype) -> Tensor:
    """The numbers of `as_text`, flat."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype)


def grouped_logprobs(logits: Tensor, top_ids: Tensor) -> Tensor:
    """
    Log-probabilities of some tokens, and of all others as one.

    Args:
        logits (`[..., vocab]`), top_ids (`int64 [..., k]`, k < vocab).

    Returns:
        `[..., k + 1]`, the others last; their probabilities sum to 1.
    """
    # not `1 - sum`: what is left may be smaller than the rounding of 1
    others = logits.scatter(-1, top_ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, top_ids), others], -1) - logits.logsumexp(-1, keepdim=True)


def top_tokens(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` most likely tokens of `logits [..., vocab]`, and [`grouped_logprobs`] of them."""
    top_ids = logits.topk(min(top_k, logits.shape[-1] - 1)).indices
    return top_ids, grouped_logprobs(logits, top_ids)


def mean_divergence(logits: Tensor, label_mask: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
    """
    Kullback-Leibler divergence `KL(unpruned || pruned)` of next-token distributions along an answer.

    All tokens but the stored ones count as one event. Joining events never raises a divergence (the log-sum
    inequality), so this is a lower bound of the divergence over the whole vocabulary, 0 where both are equal.

    Args:
        logits (`[S, A, vocab]`): under the pruned prompts; gradients pass.
        label_mask (`bool [S, A]`): the places of the answer.
        top_ids (`int64 [S, A, k]`), top_logprobs (`[S, A, k + 1]`): of the unpruned model, see [`stacked_targets`].

    Returns:
        `[S]`: nats, mean over the tokens of each answer.
    """
    change = top_logprobs - grouped_logprobs(logits, top_ids)
    at_places = (top_logprobs.exp() * change).sum(-1).masked_fill(~label_mask, 0.0)
    return at_places.sum(1) / label_mask.sum(1)


def stacked_targets(answers: Sequence[UnprunedAnswer], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """`top_ids [S, A, k]` and `top_logprobs [S, A, k + 1]` of answers, padded with 0 on the left as labels are."""
    padded = [
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
        for rows in ([one.top_ids for one in answers], [one.top_logprobs for one in answers])
    ]
    return padded[0].to(device), padded[1].to(device)
