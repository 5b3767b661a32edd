"""The library's default configs, tiny: every size shrunk by rule, and what a caller changes."""

from typing import Any

from transformers import CONFIG_MAPPING

from tests.families.tiny_models import IMAGE, VIDEO

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size", "projection_dim", "output_dim", "width"), 32),
    **dict.fromkeys(("d_model", "mm_hidden_size", "text_hidden_size", "mm_embed_dim", "output_proj_dims"), 32),
    **dict.fromkeys(("projection_hidden_size", "projector_hidden_size", "projection_hidden_dim"), 32),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size", "vision_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "encoder_ffn_dim", "mlp_dim", "mlp_hidden_dim"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "projection_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim", "qk_nope_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("linear_head_dim", "swa_head_dim", "d_rel", "hc_lowrank", "ple_embed_dim"), 8),
    **dict.fromkeys(("index_n_heads", "linear_num_heads", "swa_num_key_value_heads"), 2),
    "swa_num_attention_heads": 4,
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE),
    **dict.fromkeys(("video_token_id", "video_token_index"), VIDEO),
    **dict.fromkeys(("vision_start_token_id", "boi_token_index", "image_start_token_id", "boi_token_id"), 92),
    **dict.fromkeys(("vision_end_token_id", "eoi_token_index", "image_end_token_id", "eoi_token_id"), 93),
    "video_start_token_id": 94,
    "video_end_token_id": 95,
    "audio_token_id": 96,
    "vocab_size": 99,
    "head_dim": 8,
    "image_size": 24,
    "patch_size": 6,
    "num_position_embeddings": 64,
    "max_position_embeddings": 512,
    "sliding_window": 64,
    "sliding_window_size": 64,
    "index_topk": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Follow from the sizes, or say where a config came from.
DERIVED = (
    "layer_types",
    "mlp_layer_types",
    "rope_parameters",
    "rope_scaling",
    "transformers_version",
    "architectures",
)
DERIVED += ("dtype", "id2label", "label2id", "per_layer_config", "_name_or_path")


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name in DERIVED:
            continue
        if isinstance(value, dict):
            small[name] = shrink(value)
        elif name in SIZES and value is not None:
            small[name] = [SIZES[name]] * len(value) if isinstance(value, list | tuple) else SIZES[name]
        else:
            small[name] = value
    return small


def shrunk(model_type: str, **changes: Any) -> dict[str, Any]:
    """The library's default config of a type, tiny; `changes` go into it, into its parts where they are dicts."""
    config = shrink(CONFIG_MAPPING[model_type]().to_dict())
    config.pop("model_type")
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) and name in config else value
    # once through the class, which completes what depends on the sizes
    complete = CONFIG_MAPPING[model_type](**config).to_dict()
    complete.pop("model_type")
    return complete
