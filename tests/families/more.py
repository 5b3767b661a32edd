"""Families that the default adapters serve without a line of their own: one entry and one tiny config each.

Those with an adapter or an input of their own are in `special`; `OTHERS` has them all.
"""

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING

from tests.families.shrunk_configs import shrunk
from tests.families.special import SPECIAL
from tests.families.tiny_models import (
    IMAGE,
    MROPE,
    ROPE,
    VIDEO,
    Family,
    Pixels,
    concatenate,
    crops,
    grid,
    masked,
    modality_types,
    per_sample,
    sized,
    square,
)


def single_frames(generator: torch.Generator, kind: int) -> Pixels:
    pixels = grid(generator, kind)
    return {**pixels, "pixel_values": pixels["pixel_values"][:, : 3 * 4 * 4]}


def merged_frames(generator: torch.Generator, kind: int) -> Pixels:
    return {**single_frames(generator, kind), "image_merge_sizes": torch.tensor([2])}


def expert_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**modality_types(ids), "moe_mm_token_type_ids": (ids == IMAGE).long()}


def whole_patches(generator: torch.Generator, kind: int) -> Pixels:
    pixels = single_frames(generator, kind)
    return {**pixels, "pixel_values": pixels["pixel_values"].reshape(-1, 3, 4, 4)}


def shaped(generator: torch.Generator, kind: int) -> Pixels:
    """Patches of an image of its own shape, padded to those of the largest."""
    height, width = [(4, 4), (4, 6), (6, 4)][kind % 3]
    count = height * width
    return {
        "pixel_values": torch.randn(1, 24, 3 * 6 * 6, generator=generator),
        "pixel_attention_mask": (torch.arange(24) < count)[None].long(),
        "spatial_shapes": torch.tensor([[height, width]]),
    }


def merged_patches(generator: torch.Generator, kind: int) -> Pixels:
    """Squares of 2 by 2 patches, and a grid that counts them."""
    height, width = [(4, 4), (4, 6), (6, 4)][kind % 3]
    return {
        "pixel_values": torch.randn(height * width, 8, 8, 3, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def two_resolutions(generator: torch.Generator, kind: int) -> Pixels:
    small, large = (torch.randn(1, 3, side, side, generator=generator) for side in (24, 64))
    return {"pixel_values": small, "high_res_pixel_values": large}


def in_a_row(generator: torch.Generator, kind: int) -> Pixels:
    """Patches of an image side by side, as one strip."""
    height, width = [(8, 8), (8, 12), (12, 8)][kind % 3]
    strip = torch.randn(1, 3, 4, height * width * 4, generator=generator)
    return {"pixel_values": strip, "target_sizes": torch.tensor([[height, width]])}


def join_strips(samples: list[list[Pixels]]) -> Pixels:
    images = [image for sample in samples for image in sample]
    return {
        "pixel_values": torch.cat([image["pixel_values"] for image in images], -1),
        "target_sizes": torch.cat([image["target_sizes"] for image in images]),
    }


def counted_patches(generator: torch.Generator, kind: int) -> Pixels:
    pixels = in_a_row(generator, kind)
    height, width = pixels["target_sizes"][0].tolist()
    return {
        "pixel_values": torch.randn(height * width, 48, generator=generator),
        "image_grid_hw": pixels["target_sizes"],
    }


SMALL_PATCHES = {"patch_size": 4}
SMALL_WINDOWS = {"patch_size": 4, "window_size": 16}
WINDOWS_OF_PATCHES = {"patch_size": 4, "pos_emb_height": 3, "pos_emb_width": 3}
GLM_ROPE = {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}
DEEPSTACK = {**SMALL_PATCHES, "deepstack_visual_indexes": [0, 1]}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]},
}
# Multi-head latent attention has as many keys as queries.
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "qk_rope_head_dim": 8}
THINKER: dict[str, Any] = {
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "audio_start_token_id": 94,
    "position_id_per_seconds": 25,
}
HALF_ROPE = {**ROPE, "partial_rotary_factor": 0.5}
MINICPM: dict[str, Any] = {
    "vision_config": {"patch_size": 4, "insert_layer_id": 0},
    "text_config": LINEAR,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "insert_layer_id": 0,
}
EVERY: dict[str, Family] = {
    "apertus1p5": Family(
        lambda: shrunk(
            "apertus1p5",
            vision_config={
                **{"codebook_size": 8, "embed_dim": 8, "latent_channels": 8, "resolution": 24, "attn_resolutions": []},
                **{"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1},
            },
            audio_config={"codebook_size": 4, "codebook_dim": 32},
            image_token_offset=60,
            audio_token_offset=68,
        ),
        sized,
        concatenate,
    ),
    "aria": Family(lambda: shrunk("aria", projector_patch_to_query_dict={16: 8}), square, concatenate),
    "cohere2_vision": Family(lambda: shrunk("cohere2_vision"), square, concatenate),
    "cohere_compass": Family(
        lambda: shrunk(
            "cohere_compass",
            vision_config=DEEPSTACK,
            text_config={
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {"sliding_attention": MROPE, "full_attention": MROPE},
            },
        ),
        grid,
        concatenate,
        modality_types,
    ),
    "cosmos3_edge": Family(
        lambda: shrunk("cosmos3_edge", vision_config=SMALL_PATCHES, text_config={"rope_parameters": MROPE}),
        single_frames,
        concatenate,
        modality_types,
    ),
    "cosmos3_omni": Family(
        lambda: shrunk("cosmos3_omni", vision_config=DEEPSTACK, text_config={"rope_parameters": MROPE}),
        grid,
        concatenate,
        modality_types,
    ),
    "deepseek_vl": Family(lambda: shrunk("deepseek_vl"), square, concatenate),
    "deepseek_vl_hybrid": Family(
        lambda: shrunk(
            "deepseek_vl_hybrid",
            high_res_vision_config={
                "image_size": 64,
                "patch_size": 4,
                "global_attn_indexes": [1],
                "output_channels": 8,
                "window_size": 2,
            },
        ),
        two_resolutions,
        concatenate,
    ),
    "dots3_note": Family(
        lambda: shrunk(
            "dots3_note",
            vision_config={**SMALL_PATCHES, "per_layer_config": {}, "mlp_layer_types": ["dense", "sparse"]},
            audio_config={"num_key_value_heads": 4, "downsample_hidden_size": 8},
            text_config={
                **LATENT,
                "head_dim": 16,
                "per_layer_config": {},
                "layer_types": ["indexed_attention", "sliding_attention"],
                "mlp_layer_types": ["dense", "sparse"],
                "rope_parameters": {"indexed_attention": HALF_ROPE, "sliding_attention": HALF_ROPE},
            },
        ),
        single_frames,
        concatenate,
    ),
    "ernie4_5_vl_moe": Family(
        lambda: shrunk(
            "ernie4_5_vl_moe",
            vision_config=SMALL_PATCHES,
            text_config={"rope_parameters": MROPE, "mlp_layer_types": ["dense", "sparse"]},
        ),
        single_frames,
        concatenate,
        expert_types,
    ),
    "exaone4_5": Family(
        lambda: shrunk("exaone4_5", vision_config=SMALL_WINDOWS), grid, concatenate, own_positions=True
    ),
    "glm46v": Family(
        lambda: shrunk("glm46v", vision_config=SMALL_PATCHES, text_config=GLM_ROPE), grid, concatenate, modality_types
    ),
    "glm4v": Family(
        lambda: shrunk("glm4v", vision_config=SMALL_PATCHES, text_config=GLM_ROPE), grid, concatenate, modality_types
    ),
    "glm4v_moe": Family(
        lambda: shrunk("glm4v_moe", vision_config=SMALL_PATCHES, text_config=GLM_ROPE),
        grid,
        concatenate,
        modality_types,
    ),
    "glm5_next": Family(
        lambda: shrunk(
            "glm5_next",
            vision_config=SMALL_PATCHES,
            text_config={
                "num_key_value_heads": 4,
                "head_dim": 0,
                "layer_types": ["linear_attention", "indexed_attention"],
            },
        ),
        grid,
        concatenate,
        modality_types,
    ),
    "glm_ocr": Family(
        lambda: shrunk("glm_ocr", vision_config=SMALL_PATCHES, text_config=GLM_ROPE), grid, concatenate, modality_types
    ),
    "glmga": Family(
        lambda: shrunk("glmga", vision_config=SMALL_PATCHES, text_config=GLM_ROPE), grid, concatenate, modality_types
    ),
    "got_ocr2": Family(lambda: shrunk("got_ocr2"), square, concatenate),
    "hy_v4_vl": Family(
        lambda: shrunk(
            "hy_v4_vl",
            vision_config={"patch_size": 4, "max_image_size": 64},
            text_config={
                **LATENT,
                "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]},
                "indexer_types": ["full", "shared"],
            },
        ),
        single_frames,
        concatenate,
        modality_types,
    ),
    "hyperclovax_vision_v2": Family(
        lambda: shrunk("hyperclovax_vision_v2", vision_config=SMALL_PATCHES), grid, concatenate, own_positions=True
    ),
    "idefics2": Family(lambda: shrunk("idefics2"), masked, per_sample),
    "inkling2": Family(
        lambda: shrunk("inkling2", vision_config=SMALL_PATCHES, text_config={"unpadded_vocab_size": 99}),
        merged_patches,
        concatenate,
    ),
    "inkling2_loop": Family(
        lambda: shrunk(
            "inkling2_loop",
            vision_config=SMALL_PATCHES,
            text_config={
                **{"unpadded_vocab_size": 99, "num_hidden_layers": 6, "n_layers_per_attn_res_block": 2},
                **{"loop_layer_index_start": 2, "loop_layer_index_end": 4, "loop_gate_rank": 4},
                "layer_types": ["hybrid_sliding", "hybrid"] * 3,
            },
        ),
        merged_patches,
        concatenate,
    ),
    "janus": Family(
        lambda: shrunk("janus", vq_config={"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}),
        square,
        concatenate,
    ),
    "kimi_k25": Family(
        lambda: shrunk("kimi_k25", vision_config=SMALL_PATCHES, text_config=LATENT), whole_patches, concatenate
    ),
    "lfm2_vl": Family(
        lambda: shrunk(
            "lfm2_vl",
            vision_config={"num_patches": 16},
            text_config={"layer_types": ["conv", "full_attention"], "rope_parameters": ROPE},
            downsample_factor=2,
        ),
        shaped,
        concatenate,
    ),
    "lfm3_vl": Family(
        lambda: shrunk(
            "lfm3_vl", vision_config=SMALL_PATCHES, text_config={"layer_types": ["conv", "full_attention"]}
        ),
        grid,
        concatenate,
    ),
    "lighton_ocr": Family(lambda: shrunk("lighton_ocr"), sized, concatenate),
    "llava_next_video": Family(
        lambda: shrunk("llava_next_video", image_grid_pinpoints=[[24, 48], [48, 24]]), crops, concatenate
    ),
    "minicpm_ocr": Family(lambda: shrunk("minicpm_ocr", **MINICPM), in_a_row, join_strips),
    "minicpmv4_6": Family(lambda: shrunk("minicpmv4_6", **MINICPM), in_a_row, join_strips),
    "minicpmv4_7": Family(lambda: shrunk("minicpmv4_7", **MINICPM), in_a_row, join_strips, modality_types),
    "minimax_m3_vl": Family(lambda: shrunk("minimax_m3_vl", vision_config=SMALL_PATCHES), grid, concatenate),
    "mistral_large4": Family(
        lambda: shrunk("mistral_large4", text_config={**LATENT, "kv_source_layers": [0, 1]}), sized, concatenate
    ),
    "muse_glimmer": Family(
        lambda: shrunk("muse_glimmer", vision_config=WINDOWS_OF_PATCHES, out_hidden_size=128), grid, concatenate
    ),
    "muse_spark": Family(
        lambda: shrunk(
            "muse_spark",
            vision_config=WINDOWS_OF_PATCHES,
            audio_config={"num_hidden_layers": 4, "hidden_sizes": [8] * 4},
            text_config={"moe_hidden_size": 32},
            out_hidden_size=128,
        ),
        grid,
        concatenate,
    ),
    "nemotron_h_omni": Family(
        lambda: shrunk(
            "nemotron_h_omni",
            vision_config={**SMALL_PATCHES, "patch_dim": 48, "video_patch_dim": 96, "max_img_size": 64},
            text_config={
                "mamba_num_heads": 4,
                "mamba_head_dim": 16,
                "ssm_state_size": 8,
                "chunk_size": 16,
                "num_hidden_layers": 2,
                "layers_block_type": ["linear_attention", "full_attention"],
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=96,
        ),
        counted_patches,
        concatenate,
    ),
    "ovis2": Family(lambda: shrunk("ovis2"), square, concatenate),
    "paddleocr_vl": Family(
        lambda: shrunk("paddleocr_vl", vision_config=SMALL_PATCHES, text_config={"rope_parameters": MROPE}),
        whole_patches,
        concatenate,
        modality_types,
    ),
    "pp_chart2table": Family(lambda: shrunk("pp_chart2table"), square, concatenate),
    "qianfan_ocr": Family(lambda: shrunk("qianfan_ocr"), square, concatenate),
    "qwen2_5_omni_thinker": Family(
        lambda: shrunk(
            "qwen2_5_omni_thinker", vision_config=SMALL_WINDOWS, text_config={"rope_parameters": MROPE}, **THINKER
        ),
        grid,
        concatenate,
        around=(92, 93),
    ),
    "qwen3_5": Family(
        lambda: shrunk("qwen3_5", vision_config=SMALL_PATCHES, text_config=LINEAR), grid, concatenate, modality_types
    ),
    "qwen3_5_moe": Family(
        lambda: shrunk("qwen3_5_moe", vision_config=SMALL_PATCHES, text_config=LINEAR),
        grid,
        concatenate,
        modality_types,
    ),
    "qwen3_omni_moe_thinker": Family(
        lambda: shrunk(
            "qwen3_omni_moe_thinker",
            vision_config=DEEPSTACK,
            audio_config={"downsample_hidden_size": 8},
            text_config={"rope_parameters": MROPE},
            **THINKER,
        ),
        grid,
        concatenate,
        around=(92, 93),
    ),
    "qwen3_vl_moe": Family(
        lambda: shrunk("qwen3_vl_moe", vision_config=DEEPSTACK, text_config={"rope_parameters": MROPE}),
        grid,
        concatenate,
        modality_types,
    ),
    "qwen4_exp": Family(
        lambda: shrunk(
            "qwen4_exp",
            vision_config=SMALL_PATCHES,
            text_config={
                **LINEAR,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 64,
                "indexer_compress_ratio": 4,
            },
        ),
        grid,
        concatenate,
        modality_types,
    ),
    "step3p7": Family(lambda: shrunk("step3p7", text_config={"sliding_window": 64}), square, concatenate),
    "video_llama_3": Family(lambda: shrunk("video_llama_3", vision_config=SMALL_PATCHES), merged_frames, concatenate),
    "video_llava": Family(lambda: shrunk("video_llava"), square, concatenate),
    "vipllava": Family(lambda: shrunk("vipllava", vision_feature_layers=[-1, -2]), square, concatenate),
    **SPECIAL,
}
# Releases in which a base model itself fails, with images or without.
BASE_BROKEN = {"llama4": "5.24.0"}
# Some came with later releases than the oldest that we take.
OTHERS = {
    name: family
    for name, family in EVERY.items()
    if name in CONFIG_MAPPING and BASE_BROKEN.get(name) != transformers.__version__
}
