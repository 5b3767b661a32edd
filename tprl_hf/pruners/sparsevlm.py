"""SparseVLM as a score: attention to the visual tokens from the words of the question that the image is about.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference" (arXiv
2410.04417), drop tokens in several layers inside the LLM. Here the score of its first such layer is read before the
LLM runs. Its adaptive number of tokens and its recycling of the dropped ones are left out: the budget is the caller's.
"""

import torch
from torch import Tensor

from tprl_hf.modeling.token_pruner import PruningInputs

from .llm_attention import LLMAttentionPruner, last_token


class SparseVLMPruner(LLMAttentionPruner):
    """`score_i` = attention from the text raters to token i, mean over heads and raters, in a layer of the LLM.

    Raters are the question's tokens j whose relevance `r_j = mean_i softmax_j(v_i . q_j)`, of the tokens and words as
    they enter the LLM, is at least the mean of all. Without a question the last token rates, as in FastV.

    Args:
        lvlm (`PreTrainedModel`, *optional*): the base model. A model that uses the pruner passes its own.
        layer (`int`, defaults to 2): the layer whose attention is read, counted from 1.
        **budget: see [`TokenPruner`].
    """

    def raters(self, inputs: PruningInputs) -> Tensor:
        raters = last_token(inputs)
        asks = inputs.query_valid.any(1)
        raters[asks] = False
        raters[:, inputs.valid.shape[1] :] |= text_raters(inputs)
        return raters


def text_raters(inputs: PruningInputs) -> Tensor:
    """The words that rate, `bool [B, Q]`; none where there is no question or no visual token."""
    similarity = inputs.tokens.float() @ inputs.query.float().mT  # (B, N, L)
    hidden = ~inputs.query_valid[:, None, :]
    # rows without any word would be softmax of nothing
    relevance = similarity.masked_fill(hidden, float("-inf")).softmax(dim=-1).masked_fill(hidden, 0)
    relevance = (relevance * inputs.valid[:, :, None]).sum(1) / inputs.valid.sum(1, keepdim=True).clamp(
        min=1
    )  # (B, L)
    mean = relevance.sum(1, keepdim=True) / inputs.query_valid.sum(1, keepdim=True).clamp(min=1)
    # all-equal words stay raters in spite of rounding
    return inputs.query_valid & (relevance >= mean * (1 - torch.finfo(torch.float32).eps * 8))
