"""An independent reference: the same tokens deleted by hand, in plain code that shares nothing with the package.

One sample. The base model itself merges the embeddings of the full prompt and hands them to its decoder, where they
are caught; rows are dropped, and the base model runs on what is left, given as embeddings. Decoding is greedy and
without a cache.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

SEQUENCE_INPUTS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


def full_positions(base: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Positions of the full prompt as a direct forward of the base model counts them."""
    ids = inputs["input_ids"]
    if hasattr(base.base_model, "get_rope_index"):
        geometry = {name: value for name, value in inputs.items() if name.endswith("_grid_thw")}
        types = inputs["mm_token_type_ids"]
        return base.base_model.get_rope_index(ids, mm_token_type_ids=types, **geometry)[0]
    return torch.arange(ids.shape[1])[None]


def caught_by_decoder(base: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the base model gives its decoder for the full prompt."""
    caught: dict[str, Any] = {}

    def catch(module, args, kwargs):
        caught.update({name: value for name, value in kwargs.items() if value is not None})

    hook = base.get_decoder().register_forward_pre_hook(catch, with_kwargs=True)
    base(**inputs)
    hook.remove()
    return caught


@torch.no_grad()
def delete_by_hand(
    base: PreTrainedModel, inputs: dict[str, Tensor], keep_mask: Tensor, position_ids: str, new_tokens: int
) -> tuple[Tensor, list[int]]:
    """Logits `[1, P, vocab]` of the shortened prompt, and the greedy tokens that follow it."""
    caught = caught_by_decoder(base, inputs)
    ids = inputs["input_ids"][0].tolist()
    names = ("image_token_id", "video_token_id")
    visual = {getattr(base.config, name) for name in names if hasattr(base.config, name)}
    bits = iter(keep_mask.tolist())
    is_kept = [token not in visual or next(bits) for token in ids]
    columns = [column for column, kept in enumerate(is_kept) if kept]

    positions = full_positions(base, inputs)[..., columns]
    if position_ids == "contiguous":
        positions = torch.arange(len(columns)).expand_as(positions)
    if base.config.model_type == "paligemma":  # which counts from 1
        positions = positions + 1
    state = {
        "inputs_embeds": caught["inputs_embeds"][:, columns],
        "position_ids": positions,
        **{name: inputs[name][:, columns] for name in SEQUENCE_INPUTS if name in inputs},
    }
    if "deepstack_visual_embeds" in caught:
        state["visual_pos_masks"] = caught["visual_pos_masks"][:, columns]
        state["deepstack_visual_embeds"] = [rows[keep_mask] for rows in caught["deepstack_visual_embeds"]]

    logits = run(base, state)
    tokens: list[int] = []
    step = logits
    for _ in range(new_tokens):
        tokens.append(int(step[0, -1].argmax()))
        word = base.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
        state["inputs_embeds"] = torch.cat([state["inputs_embeds"], word], 1)
        state["position_ids"] = torch.cat([state["position_ids"], state["position_ids"][..., -1:] + 1], -1)
        # answers are causal; PaliGemma says so with a type of its own
        new_type = 1 if base.config.model_type == "paligemma" else 0
        for name in SEQUENCE_INPUTS:
            if name in state:
                state[name] = torch.cat([state[name], torch.full((1, 1), new_type)], 1)
        if "visual_pos_masks" in state:
            state["visual_pos_masks"] = torch.cat([state["visual_pos_masks"], torch.zeros(1, 1, dtype=bool)], 1)
        step = run(base, state)
    return logits, tokens


def run(base: PreTrainedModel, state: dict[str, Any]) -> Tensor:
    mask = torch.ones(state["inputs_embeds"].shape[:2], dtype=torch.long)
    if "deepstack_visual_embeds" in state:  # only the decoder itself takes these
        own = {name: value for name, value in state.items() if name not in SEQUENCE_INPUTS}
        hidden = base.get_decoder()(**own, attention_mask=mask, use_cache=False).last_hidden_state
        return base.get_output_embeddings()(hidden)
    return base(**state, attention_mask=mask, use_cache=False).logits
