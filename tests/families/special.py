"""Families with an adapter, a code book or an input of their own: one entry and one tiny config each."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING

from tests.families.shrunk_configs import shrink, shrunk
from tests.families.tiny_models import (
    IMAGE,
    ROPE,
    Family,
    Pixels,
    concatenate,
    crops,
    modality_types,
    per_sample,
    sized,
    square,
)


def patches(generator: torch.Generator, kind: int) -> Pixels:
    return {"pixel_values": torch.randn(1, 16, 3 * 6 * 6, generator=generator)}


def one_tile(generator: torch.Generator, kind: int) -> Pixels:
    tile = torch.randn(1, 3, 24, 24, generator=generator)
    return {"pixel_values": tile, "pixel_attention_mask": torch.ones(1, dtype=torch.bool)}


def large(generator: torch.Generator, kind: int) -> Pixels:
    return {"pixel_values": torch.randn(1, 3, 64, 64, generator=generator)}


def flat_patches(generator: torch.Generator, kind: int) -> Pixels:
    height, width = [(8, 8), (8, 12), (12, 8)][kind % 3]
    return {
        "pixel_values": torch.randn(height * width, 3 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def same_size(generator: torch.Generator, kind: int) -> Pixels:
    """A code book's entries depend on what an image is padded with."""
    return sized(generator, 0)


def placed(side: int) -> Any:
    """Patches of `side` pixels with a place each, padded to those of the largest image."""

    def pixels(generator: torch.Generator, kind: int) -> Pixels:
        height, width = [(4, 4), (4, 6), (6, 4)][kind % 3]
        columns, rows = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
        places = torch.full((24, 2), -1)
        places[: height * width] = torch.stack([columns, rows], -1).reshape(-1, 2)
        patches = torch.rand(1, 24, 3 * side * side, generator=generator)
        return {"pixel_values": patches, "image_position_ids": places[None]}

    return pixels


POOLING = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])


def pooled(generator: torch.Generator, kind: int) -> Pixels:
    """A crop of 4 by 4 patches, and which of them each token is made of."""
    return {
        "pixel_values": torch.randn(1, 16, 3 * 6 * 6, generator=generator),
        "image_token_pooling": POOLING,
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
    }


def join_pooled(samples: list[list[Pixels]]) -> Pixels:
    joined = concatenate(samples)
    owner = torch.arange(len(joined["image_grids"])).repeat_interleave(len(POOLING))
    return {**joined, "image_token_pooling": joined["image_token_pooling"] + 16 * owner[:, None]}


def with_code_book(model_type: str, names: list[str], **sizes) -> dict[str, Any]:
    """A config whose vocabulary has `names` for the entries of a code book."""
    config = shrunk(model_type)
    config.pop("image_token_id")
    words = {name: 60 + index for index, name in enumerate(names)}
    small = {"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1}
    vq = {**config["vq_config"], **small, "embed_dim": 8, "latent_channels": 8, **sizes}
    return {**config, "vocabulary_map": {"<image>": IMAGE, **words}, "vq_config": vq}


def with_tower(model_type: str, **tower) -> dict[str, Any]:
    """A config of a type whose default has no tower."""
    text = {"vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8} if model_type == "gemma4" else {}
    vision = shrink({**CONFIG_MAPPING[f"{model_type}_vision"]().to_dict(), "pooling_kernel_size": 2})
    return {**shrunk(model_type, text_config=text), "vision_config": {**vision, **tower}}


def ocr_tower(family: str, **encoder) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sam = {**sizes, "output_channels": 8, "image_size": 64, "patch_size": 4, "window_size": 2, "mlp_dim": 48}
    return {
        "encoder_config": {**sizes, **encoder},
        "sam_config": {
            **sam,
            "global_attn_indexes": [1],
            "downsample_channels": [16, 32],
            "model_type": f"{family}_sam_vision_model",
        },
    }


OCR_TEXT: dict[str, Any] = {
    "n_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse"],
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
SPECIAL: dict[str, Family] = {
    "chameleon": Family(
        lambda: with_code_book(
            "chameleon", [f"IMGIMG{letter}Z" for letter in "ABCDEFGH"], num_embeddings=8, resolution=24
        ),
        square,
        concatenate,
    ),
    "deepseek_ocr2": Family(
        lambda: shrunk(
            "deepseek_ocr2",
            vision_config=ocr_tower(
                "deepseek_ocr2",
                num_key_value_heads=4,
                head_dim=8,
                vocab_size=99,
                layer_types=["full_attention"] * 2,
                model_type="deepseek_ocr2_encoder",
            ),
            text_config=OCR_TEXT,
        ),
        large,
        concatenate,
    ),
    "emu3": Family(
        lambda: with_code_book(
            "emu3",
            [*(f"<|visual token {index:06d}|>" for index in range(8)), "<|extra_200|>"],
            codebook_size=8,
            temporal_downsample_factor=1,
        ),
        same_size,
        concatenate,
    ),
    "fuyu": Family(lambda: shrunk("fuyu"), patches, concatenate),
    "gemma4": Family(lambda: with_tower("gemma4", position_embedding_size=32), placed(6), concatenate, modality_types),
    "gemma4_unified": Family(
        lambda: with_tower("gemma4_unified", patch_size=4, mm_posemb_size=16), placed(8), concatenate, modality_types
    ),
    "granite4_vision": Family(
        lambda: shrunk(
            "granite4_vision",
            vision_config={"hidden_size": 64},
            qformer_config={"hidden_size": 64, "encoder_hidden_size": 64},
            image_grid_pinpoints=[[24, 48], [48, 24]],
            deepstack_layer_map=[[-2, 0]],
            spatial_target_layers=[1] * 4,
            downsample_rate="1/2",
        ),
        crops,
        concatenate,
    ),
    "granite_docling": Family(
        lambda: shrunk(
            "granite_docling",
            vision_config={"scale_factor": 2, "patch_size": 4, "deepstack_visual_indexes": [0, 1]},
        ),
        one_tile,
        per_sample,
    ),
    "hunyuan_vl": Family(
        lambda: shrunk(
            "hunyuan_vl",
            vision_config={"patch_size": 4, "max_image_size": 64, "min_image_size": 8},
            text_config={"head_dim": 8, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 1, 1]}},
        ),
        flat_patches,
        concatenate,
        modality_types,
        batch_differs=True,
    ),
    "llama4": Family(
        lambda: shrunk(
            "llama4",
            vision_config={
                "patch_size": 3,
                "intermediate_size": 128,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            text_config={
                "attention_chunk_size": 64,
                "moe_layers": [1],
                "no_rope_layers": [1, 0],
                "num_experts_per_tok": 1,
                "layer_types": ["chunked_attention", "full_attention"],
            },
        ),
        square,
        concatenate,
    ),
    "molmo2": Family(
        lambda: shrunk(
            "molmo2",
            adapter_config={"vision_feature_layer": [0, 1]},
            vision_config={"num_position_embeddings": 16},
            text_config={"additional_vocab_size": 8, "rope_scaling_layers": [0]},
            image_patch_id=IMAGE,
        ),
        pooled,
        join_pooled,
        modality_types,
        own_positions=True,
    ),
    "unlimited_ocr": Family(
        lambda: shrunk(
            "unlimited_ocr",
            vision_config=ocr_tower(
                "unlimited_ocr", image_size=8, patch_size=2, model_type="unlimited_ocr_vision_encoder"
            ),
            text_config={**OCR_TEXT, "layer_types": ["reference_sliding_attention"] * 2},
        ),
        large,
        concatenate,
    ),
}
