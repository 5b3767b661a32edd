"""Which tokens of a prompt are the user's question.

The policy reads the question's word embeddings. Exact question tokens come from the processor ([`question_mask`]);
without them the fallback takes all attended tokens that are neither visual nor special.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig


def special_token_ids(*configs: Any) -> list[int]:
    """All ids that the configs name as `..._token_id` or `..._token_index`."""
    ids: set[int] = set()
    for config in configs:
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index")) and value is not None:
                ids.update(value if isinstance(value, Iterable) else [value])
    return sorted(i for i in ids if isinstance(i, int))


def config_special_ids(config: PreTrainedConfig, generation_config: Any) -> list[int]:
    """Special ids of an LVLM, as far as its config, text config and generation config tell."""
    return special_token_ids(config, config.get_text_config(), generation_config)


def default_query_mask(input_ids: Tensor, attention_mask: Tensor, visual: Tensor, special_ids: list[int]) -> Tensor:
    """The fallback: attended tokens that are neither visual nor special, `bool [B, L]`."""
    special = torch.isin(input_ids, torch.tensor(special_ids, device=input_ids.device, dtype=input_ids.dtype))
    return attention_mask.bool() & ~visual & ~special
