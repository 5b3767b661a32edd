"""An independent reference: the same tokens deleted by hand, in plain code that shares nothing with the package.

One sample. Embeddings are merged as the base model would, rows are dropped, and the language model runs on what is
left with an explicit mask and positions; decoding is greedy without a cache.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel


def full_positions(base: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    ids = inputs["input_ids"]
    return torch.arange(ids.shape[1])[None]


@torch.no_grad()
def delete_by_hand(
    base: PreTrainedModel, inputs: dict[str, Tensor], keep_mask: Tensor, position_ids: str, new_tokens: int
) -> tuple[Tensor, list[int]]:
    """Logits `[1, P, vocab]` of the shortened prompt, and the greedy tokens that follow it."""
    captured: dict[str, Tensor] = {}

    def capture(module, args, kwargs):
        captured.update({name: value for name, value in kwargs.items() if value is not None})

    text_model = base.base_model.language_model
    hook = text_model.register_forward_pre_hook(capture, with_kwargs=True)
    base(**inputs)  # merges the embeddings of the full prompt
    hook.remove()
    embeds = captured["inputs_embeds"]

    ids = inputs["input_ids"][0].tolist()
    names = ("image_token_id", "video_token_id")
    visual = {getattr(base.config, name) for name in names if hasattr(base.config, name)}
    bits = iter(keep_mask.tolist())
    kept = [column for column, token in enumerate(ids) if token not in visual or next(bits)]
    embeds = embeds[:, kept]
    positions = full_positions(base, inputs)[..., kept]
    if position_ids == "contiguous":
        positions = torch.arange(len(kept)).expand_as(positions)

    logits = run(base, embeds, positions)
    tokens: list[int] = []
    step = logits
    for _ in range(new_tokens):
        tokens.append(int(step[0, -1].argmax()))
        word = base.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
        embeds = torch.cat([embeds, word], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
        step = run(base, embeds, positions)
    return logits, tokens


def run(base: PreTrainedModel, embeds: Tensor, positions: Tensor) -> Tensor:
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    hidden = base.base_model.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return base.lm_head(hidden)
