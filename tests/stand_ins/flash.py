"""Flash Attention for machines without a GPU: its two functions in plain torch, where transformers looks for them.

What transformers does around them, to decide which tokens see each other, is its own: a mask of ones is dropped, and
positions with gaps are then read as packed prompts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils

# Of these the base model itself, unpruned, fails with Flash Attention or answers otherwise than with sdpa. Ernie and
# GLM-4V-MoE hand it positions of three axes, which it reads as three packed prompts.
BASE_FAILS = (
    *("dots3_note", "ernie4_5_vl_moe", "glm4v_moe", "glm5_next", "hy_v4_vl", "inkling2_loop", "mistral_large4"),
    "qwen4_exp",
)
BASE_DIFFERS = ("deepseek_ocr2", "gemma3", "gemma4_unified", "inkling2", "molmo2")
# Layers with a state, and positions with gaps: a new image behind a cache is refused.
BEAR_NO_PADDING = ("lfm2_vl", "lfm3_vl", "minicpm_ocr", "minicpmv4_6", "nemotron_h_omni")


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0
) -> Tensor:
    """Attention over `[B, S, heads, d]`; the last query sees all keys."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        weights = softcap * (weights / softcap).tanh()
    place = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    other = torch.arange(k.shape[1])
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    if left >= 0:
        hidden |= other < place - left
    if right >= 0:
        hidden |= other > place + right
    weights = weights.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
) -> Tensor:
    """Attention within each of the sequences that lie one after the other in `[total, heads, d]`."""
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
    output = torch.zeros_like(q)
    of_q, of_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if (of_q[0], of_q[-1], of_k[0], of_k[-1]) != (0, len(q), 0, len(k)):  # the kernels would read what lies behind
        raise ValueError(f"Sequences end at {of_q} and {of_k}, but there are {len(q)} queries and {len(k)} keys.")
    for a, b, c, d in zip(of_q[:-1], of_q[1:], of_k[:-1], of_k[1:], strict=True):
        output[a:b] = flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], **options)[0]
    return output


@contextmanager
def flash_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the `with`, `model` computes attention as it would with `attn_implementation="flash_attention_2"`."""
    utils = modeling_flash_attention_utils
    found = (flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    with (
        patch.object(utils, "_lazy_imports", lambda *arguments, **options: found),
        patch.object(utils, "_loaded_implementation", None),
        patch.object(PreTrainedModel, "_flash_attn_can_dispatch", lambda *arguments, **options: True),
    ):
        model.set_attn_implementation("flash_attention_2")
        yield
