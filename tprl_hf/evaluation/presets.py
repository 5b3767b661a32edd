"""Shapes of common LVLMs, from their public configs; no weights, and nothing to download."""

from dataclasses import dataclass
from typing import Any

from .flops import ModelShape, shape_of

CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
VICUNA_13B = {
    **VICUNA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
QWEN2_5_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
QWEN2_VISION = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14}
QWEN3_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "deepstack_visual_indexes": [8, 16, 24],
}
QWEN3_VISION_SMALL = {
    **QWEN3_VISION,
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
SIGLIP_BASE_512 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}
MROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
QWEN2_5_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN2_5_3B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
}
QWEN2_0_5B = {
    "model_type": "qwen2",
    "vocab_size": 152000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
QWEN2_5_1_5B = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
QWEN3_8B = {**QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288}
GEMMA3_4B = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
GEMMA3_12B = {
    **GEMMA3_4B,
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
SMOLLM2_1_7B = {
    "model_type": "llama",
    "vocab_size": 49280,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
SMOLLM2_360M = {
    **SMOLLM2_1_7B,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
}
INTERN_VIT_300M = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": [448, 448],
    "patch_size": [14, 14],
}


@dataclass(frozen=True)
class Preset:
    """
    Args:
        model_type (`str`): transformers' name of the family.
        config (`dict`): keyword arguments of its config.
        num_tiles (`int`): tiles that one typical image becomes.
        about (`str`): one line for `tprl flops --list`.
    """

    model_type: str
    config: dict[str, Any]
    num_tiles: int
    about: str


def _qwen2_vl(text: dict[str, Any], tied: bool) -> dict[str, Any]:
    return {
        "vision_config": {**QWEN2_VISION, "hidden_size": text["hidden_size"]},
        "text_config": {"model_type": "qwen2_vl_text", **text, "rope_parameters": MROPE},
        "tie_word_embeddings": tied,
    }


def _qwen2_5_vl(text: dict[str, Any], tied: bool) -> dict[str, Any]:
    return {
        "vision_config": {**QWEN2_5_VISION, "out_hidden_size": text["hidden_size"]},
        "text_config": {"model_type": "qwen2_5_vl_text", **text, "rope_parameters": MROPE},
        "tie_word_embeddings": tied,
    }


def _qwen3_vl(vision: dict[str, Any], text: dict[str, Any], tied: bool) -> dict[str, Any]:
    return {
        "vision_config": {**vision, "out_hidden_size": text["hidden_size"]},
        "text_config": {"model_type": "qwen3_vl_text", **text},
        "tie_word_embeddings": tied,
    }


def _internvl(text: dict[str, Any], tied: bool) -> dict[str, Any]:
    return {
        "vision_config": INTERN_VIT_300M,
        "text_config": {"model_type": "qwen2", **text, "vocab_size": 151674},
        "tie_word_embeddings": tied,
    }


def _gemma3(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "vision_config": {"model_type": "siglip_vision_model", **SIGLIP_SO400M, "image_size": 896},
        "text_config": text,
        "mm_tokens_per_image": 256,
    }


PRESETS = {
    "llava-1.5-7b": Preset(
        "llava", {"vision_config": CLIP_L_336, "text_config": VICUNA_7B}, 1, "576 visual tokens, Vicuna-7B"
    ),
    "llava-1.5-13b": Preset(
        "llava", {"vision_config": CLIP_L_336, "text_config": VICUNA_13B}, 1, "576 visual tokens, Vicuna-13B"
    ),
    "llava-next-7b": Preset(
        "llava_next",
        {"vision_config": CLIP_L_336, "text_config": VICUNA_7B},
        5,
        "5 tiles, 2880 visual tokens (row ends not counted), Vicuna-7B",
    ),
    "llava-next-13b": Preset(
        "llava_next",
        {"vision_config": CLIP_L_336, "text_config": VICUNA_13B},
        5,
        "5 tiles, 2880 visual tokens (row ends not counted), Vicuna-13B",
    ),
    "llava-0.5b": Preset(
        "llava",
        {"vision_config": CLIP_L_336, "text_config": QWEN2_0_5B, "tie_word_embeddings": True},
        1,
        "not a published model: LLaVA-1.5's tower before Qwen2-0.5B, small enough for a CPU",
    ),
    "qwen2-vl-2b": Preset("qwen2_vl", _qwen2_vl(QWEN2_5_1_5B, True), 1, "576 visual tokens of a 672-pixel image"),
    "qwen2-vl-7b": Preset("qwen2_vl", _qwen2_vl(QWEN2_5_7B, False), 1, "576 visual tokens of a 672-pixel image"),
    "qwen2.5-vl-3b": Preset("qwen2_5_vl", _qwen2_5_vl(QWEN2_5_3B, True), 1, "576 visual tokens of a 672-pixel image"),
    "qwen2.5-vl-7b": Preset("qwen2_5_vl", _qwen2_5_vl(QWEN2_5_7B, False), 1, "576 visual tokens of a 672-pixel image"),
    "qwen3-vl-4b": Preset(
        "qwen3_vl", _qwen3_vl(QWEN3_VISION_SMALL, QWEN3_4B, True), 1, "441 visual tokens of a 672-pixel image"
    ),
    "qwen3-vl-8b": Preset(
        "qwen3_vl", _qwen3_vl(QWEN3_VISION, QWEN3_8B, False), 1, "441 visual tokens of a 672-pixel image"
    ),
    "internvl3-2b": Preset(
        "internvl", _internvl(QWEN2_5_1_5B, False), 13, "12 tiles and an overview of 256 visual tokens, Qwen2.5-1.5B"
    ),
    "internvl3-8b": Preset(
        "internvl", _internvl(QWEN2_5_7B, False), 13, "12 tiles and an overview of 256 visual tokens, Qwen2.5-7B"
    ),
    "gemma-3-4b": Preset("gemma3", _gemma3(GEMMA3_4B), 1, "256 visual tokens of 4096 patches"),
    "gemma-3-12b": Preset("gemma3", _gemma3(GEMMA3_12B), 1, "256 visual tokens of 4096 patches"),
    "smolvlm2-0.5b": Preset(
        "smolvlm",
        {
            "vision_config": SIGLIP_BASE_512,
            "text_config": SMOLLM2_360M,
            "scale_factor": 4,
            "tie_word_embeddings": False,
        },
        17,
        "16 tiles and an overview of 64 visual tokens, SmolLM2-360M",
    ),
    "smolvlm2-2.2b": Preset(
        "smolvlm",
        {
            "vision_config": {**SIGLIP_SO400M, "image_size": 384},
            "text_config": SMOLLM2_1_7B,
            "scale_factor": 3,
            "tie_word_embeddings": False,
        },
        17,
        "16 tiles and an overview of 81 visual tokens, SmolLM2-1.7B",
    ),
}


def preset_config(name: str):
    """
    The transformers config of a preset.

    Raises:
        `ValueError`: if there is no such preset.
    """
    from transformers import AutoConfig

    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
    return AutoConfig.for_model(PRESETS[name].model_type, **PRESETS[name].config)


def preset_shape(name: str, num_tiles: int | None = None, image_size: int = 672) -> ModelShape:
    """The [`ModelShape`] of a preset, with as many tiles as it says where `num_tiles` is not given."""
    config = preset_config(name)
    return shape_of(config, PRESETS[name].num_tiles if num_tiles is None else num_tiles, image_size)
