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
        names = ("_grid_thw", "_sizes", "_sizes_videos", "second_per_grid_ts")
        geometry = {name: value for name, value in inputs.items() if name.endswith(names)}
        if base.config.model_type.endswith("thinker"):
            geometry["second_per_grids"] = inputs.get("video_second_per_grid")
            if "feature_attention_mask" in inputs:
                geometry["audio_seqlens"] = inputs["feature_attention_mask"].sum(-1)
        types = {name: inputs[name] for name in ("mm_token_type_ids", "attention_mask") if name in inputs}
        return base.base_model.get_rope_index(ids, **types, **geometry)[0]
    return torch.arange(ids.shape[1])[None]


def caught_by_decoder(
    base: PreTrainedModel, inputs: dict[str, Any], call: PreTrainedModel | None = None
) -> dict[str, Any]:
    """What the base model gives its decoder for the full prompt; in the call of another model around it, if given."""
    caught: dict[str, Any] = {}

    def catch(module, args, kwargs):
        caught.update({name: value for name, value in kwargs.items() if value is not None})

    def catch_embeddings(module, args):
        caught.setdefault("inputs_embeds", args[0])

    decoder = base.get_decoder()
    hooks = [decoder.register_forward_pre_hook(catch, with_kwargs=True)]
    if decoder is base.base_model:  # it merges by itself
        hooks.append(decoder.layers[0].register_forward_pre_hook(catch_embeddings))
    (call or base)(**inputs)
    for hook in hooks:
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
    if "per_layer_inputs" in caught:
        state["per_layer_inputs"] = caught["per_layer_inputs"][:, columns]
    if "deepstack_visual_embeds" in caught:
        state["visual_pos_masks"] = caught["visual_pos_masks"][:, columns]
        state["deepstack_visual_embeds"] = [rows[keep_mask] for rows in caught["deepstack_visual_embeds"]]
    if "deepstack_features" in caught:
        state["vision_mask"] = caught["vision_mask"][:, columns]
        state["deepstack_features"] = {layer: rows[keep_mask] for layer, rows in caught["deepstack_features"].items()}

    logits = run(base, state)
    tokens: list[int] = []
    step = logits
    for _ in range(new_tokens):
        tokens.append(int(step[0, -1].argmax()))
        word = base.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
        if "per_layer_inputs" in state:
            new = caught_by_decoder(base, {"input_ids": torch.tensor([[tokens[-1]]])})["per_layer_inputs"]
            state["per_layer_inputs"] = torch.cat([state["per_layer_inputs"], new], 1)
        state["inputs_embeds"] = torch.cat([state["inputs_embeds"], word], 1)
        state["position_ids"] = torch.cat([state["position_ids"], state["position_ids"][..., -1:] + 1], -1)
        # answers are causal; PaliGemma says so with a type of its own
        new_type = 1 if base.config.model_type == "paligemma" else 0
        for name in SEQUENCE_INPUTS:
            if name in state:
                state[name] = torch.cat([state[name], torch.full((1, 1), new_type)], 1)
        for name in ("visual_pos_masks", "vision_mask"):
            if name in state:
                state[name] = torch.cat([state[name], torch.zeros_like(state[name][:, :1])], 1)
        step = run(base, state)
    return logits, tokens


# What the base model gives its decoder beside the embeddings, and takes from nobody.
FOR_THE_DECODER = ("visual_pos_masks", "deepstack_visual_embeds", "vision_mask", "deepstack_features")


def run(base: PreTrainedModel, state: dict[str, Any]) -> Tensor:
    """Logits of the state behind one column of padding.

    Without it the mask is all ones, which some models drop, and then gaps in positions mean several packed prompts.
    """
    padded = {name: pad_left(value, -1 if name == "position_ids" else 1) for name, value in state.items()}
    mask = torch.ones(padded["inputs_embeds"].shape[:2], dtype=torch.long)
    mask[:, 0] = 0
    hidden = {name: padded[name] for name in FOR_THE_DECODER if name in padded}
    given = {name: value for name, value in padded.items() if name not in hidden}

    def put_in(module, args, kwargs):
        return args, {**kwargs, **hidden}

    hook = base.get_decoder().register_forward_pre_hook(put_in, with_kwargs=True)
    logits = base(**given, attention_mask=mask, use_cache=False).logits
    hook.remove()
    return logits[:, 1:]


def pad_left(value: Any, dim: int) -> Any:
    """`value` with one column of zeros before it; rows for deeper layers have no columns."""
    if not isinstance(value, Tensor):
        return value
    return torch.cat([torch.zeros_like(value.narrow(dim, 0, 1)), value], dim)
