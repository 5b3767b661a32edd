"""FastV and SparseVLM as scores: attention from the text to the visual tokens in an early layer of the LLM.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2" (FastV, arXiv 2403.06764), and Zhang et al., "SparseVLM"
(arXiv 2410.04417), drop tokens inside the LLM, after its first layers have seen all of them. Here the same attention
is read before the LLM runs. It is biased towards the last tokens and towards sinks; in public comparisons FastV falls
below random keeping.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tprl_hf.modeling.token_pruner import PruningInputs, TokenPruner


class _Attention(Exception):
    """Carries the attention of the layer out of the decoder, whose later layers need not run."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.weights = weights


class FastVPruner(TokenPruner):
    """`score_i` = attention that token i gets in a layer of the LLM, mean over heads.

    The LLM's first layers run on the visual tokens and the question, without the template around them: a cost of
    `layer` of its layers on all tokens, on top of the pruned prefill.

    Args:
        lvlm (`PreTrainedModel`): the base model, `model.lvlm`.
        layer (`int`, defaults to 2): the layer whose attention is read, counted from 1; FastV's K.
        raters (`"last"` or `"question"`, defaults to `"last"`): whose attention: that of the last token (FastV), or
            the mean over the question (after SparseVLM, which picks the relevant words of it).
        **budget: see [`TokenPruner`].

    Raises:
        `ValueError`: for a layer that the LLM does not have, or other raters.
    """

    def __init__(self, lvlm: PreTrainedModel, layer: int = 2, raters: str = "last", **budget):
        super().__init__(**budget)
        if raters not in ("last", "question"):
            raise ValueError(f"raters is 'last' or 'question'; got {raters!r}.")
        self.lvlm = lvlm
        self.decoder: Any = lvlm.get_decoder()
        if not 1 <= layer <= len(self.decoder.layers):
            raise ValueError(f"layer={layer}, but the LLM has layers 1 to {len(self.decoder.layers)}.")
        self.layer = layer
        self.raters = raters

    def score(self, inputs: PruningInputs) -> Tensor:
        num_visual = inputs.valid.shape[1]
        mask = torch.cat([inputs.valid, inputs.query_mask], dim=1)
        weights = self.attention(torch.cat([inputs.tokens, inputs.query], dim=1), mask)  # (B, N + L, N + L)
        column = torch.arange(mask.shape[1], device=mask.device)
        last = (column * mask).argmax(dim=1)
        rates = torch.nn.functional.one_hot(last, mask.shape[1]).bool()
        if self.raters == "question":
            asks = mask & (column >= num_visual)
            rates = torch.where(asks.any(1, keepdim=True), asks, rates)
        received = (weights * rates[:, :, None]).sum(1) / rates.sum(1)[:, None]
        return received[:, :num_visual]

    def attention(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Attention of the layer, mean over heads, float32 `[B, S, S]`, for `embeddings [B, S, D]`."""

        def catch(module: nn.Module, arguments: Any, output: Any) -> NoReturn:
            raise _Attention(output[1])

        hook = self.decoder.layers[self.layer - 1].self_attn.register_forward_hook(catch)
        try:
            with eager_decoder(self.lvlm), torch.no_grad():
                self.decoder(
                    inputs_embeds=embeddings,
                    attention_mask=mask.long(),
                    position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
                    use_cache=False,
                )
        except _Attention as caught:
            return caught.weights.float().mean(1)
        finally:
            hook.remove()
        raise RuntimeError("The decoder did not run its layer.")


@contextmanager
def eager_decoder(lvlm: PreTrainedModel) -> Iterator[None]:
    """Inside the `with`, the LLM computes attention in the way that can return it."""
    before = lvlm.config.text_config._attn_implementation
    lvlm.set_attn_implementation({"text_config": "eager"})
    try:
        yield
    finally:
        lvlm.set_attn_implementation({"text_config": before})
