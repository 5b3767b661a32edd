"""Adapters of the families that differ from the default, and the choice of the adapter of a base model."""

import inspect
import math
from dataclasses import replace
from difflib import get_close_matches
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from .columns import run_lengths
from .lvlm_adapters import HANDED, LVLMAdapter, RopeIndexAdapter
from .token_layout import SEPARATOR, Block, grid_blocks, join_rows, square_block
from .video_adapters import (
    Glm4vAdapter,
    NemotronAdapter,
    OneKindAdapter,
    VideoLlama3Adapter,
    VideoSpanAdapter,
    no_attention_to_videos,
)
from .vision_attention import ObservedLayer, received_by_patches, undo_windows
from .visual_features import EncodedModality, VisualFeatures

logger = logging.get_logger(__name__)


class NewlineAdapter(LVLMAdapter):
    """Families that show an overview, then crops as one grid whose rows end in a learned newline (LLaVA-NeXT)."""

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        if modality == "video" and all(entry.ndim == 2 for entry in entries):
            frames = inputs["pixel_values_videos"].shape[1]
            return [[square_block(len(entry) // frames)] * frames for entry in entries]
        if modality == "video":
            return super().blocks(modality, entries, {})
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return [self.newline_blocks(entry, side) for entry in entries]

    def received_attention(
        self, modality: str, layer: ObservedLayer, encoded: EncodedModality, inputs: dict[str, Any]
    ) -> Tensor:
        """The family's own packing of features, of which attention is one."""
        if modality == "video":
            raise no_attention_to_videos(self.config.model_type)
        # not above: a model's module takes time to import, and few need this one
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        vision, sizes = self.config.vision_config, inputs["image_sizes"]
        num_tiles = [
            image_size_to_num_patches(size, self.config.image_grid_pinpoints, vision.image_size) for size in sizes
        ]
        alone = inputs.get("batch_num_images")  # several images of one sample are not cut
        if alone is not None:
            cut = alone.repeat_interleave(alone) == 1
            num_tiles = [number if whole else 1 for number, whole in zip(num_tiles, cut.tolist(), strict=True)]
        side = vision.image_size // vision.patch_size
        patches = received_by_patches(layer, None, sum(num_tiles) * side**2, self.class_token)
        packed = self.pack(list(patches.view(-1, side**2, 1).split(num_tiles)), sizes, patches.new_zeros(1))
        return torch.cat(packed).squeeze(-1)

    def pack(self, patches: list[Tensor], sizes: Tensor, newline: Tensor) -> list[Tensor]:
        """Overview and crops `[tiles, patches, C]` of each image as its tokens lie, `[L, C]`."""
        strategy = self.config.vision_feature_select_strategy
        return list(self.core.pack_image_features(patches, sizes, strategy, newline)[0])

    def newline_blocks(self, entry: Tensor, side: int) -> list[Block]:
        """An overview of `side` by `side` tokens, and what the newlines in `entry [L, D]` tell of the rest."""
        newlines = (entry == self.core.image_newline.to(entry)).all(-1).nonzero()[:, 0].tolist()
        width = newlines[0] - side * side if newlines else 0  # of a picture that is too flat no row is left
        rest = [Block(len(newlines), width, row_newline=True)] if width else [SEPARATOR] * len(newlines)
        return [Block(side, side), *rest]


class OneVisionAdapter(NewlineAdapter):
    """LLaVA-OneVision scales crops down where they are too many, and ends a video in a newline."""

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        if modality == "image":
            return super().blocks(modality, entries, inputs)
        return [[*frames, SEPARATOR] for frames in super().blocks(modality, [rows[:-1] for rows in entries], inputs)]

    def pack(self, patches: list[Tensor], sizes: Tensor, newline: Tensor) -> list[Tensor]:
        return list(self.core.pack_image_features(patches, sizes, newline, self.config.vision_aspect_ratio)[0])


class Idefics3Adapter(LVLMAdapter):
    """Families whose encoder returns all tiles of a sample in one piece."""

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size // self.config.scale_factor
        return [[Block(side, side)] * (len(entry) // side**2) for entry in entries]


class GraniteDoclingAdapter(LVLMAdapter):
    """Granite Docling: all tiles of a sample in one piece, with four times as many tokens on its fine route."""

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size // vision.scale_factor
        side *= 1 if inputs.get("tile_fine_mask") is None else 2
        return [[Block(side, side)] * (len(entry) // side**2) for entry in entries]


class Granite4VisionAdapter(NewlineAdapter):
    """Granite 4 Vision: every row goes into LLM layers of its own, none of them into the embeddings.

    Pruners see the rows of the first.
    """

    def unpack(self, modality: str, output: ModelOutput, counts: Tensor, inputs: dict[str, Any]) -> EncodedModality:
        (_, first), *others = output["deepstack_features"]
        return EncodedModality(
            rows=torch.cat(list(first)),
            blocks=self.blocks(modality, list(first), inputs),
            counts=counts,
            output_class=type(output),
            container="list",
            deepstack=[torch.cat(list(entries)) for _, entries in others],
        )

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        vision, rate = self.config.vision_config, Fraction(self.config.downsample_rate or 1)
        return [self.newline_blocks(entry, int(vision.image_size // vision.patch_size * rate)) for entry in entries]

    def pack(self, patches: list[Tensor], sizes: Tensor, newline: Tensor) -> list[Tensor]:
        rate = Fraction(self.config.downsample_rate or 1)
        side = math.isqrt(patches[0].shape[1])
        small = [
            adaptive_avg_pool2d(one.view(-1, 1, side, side), int(side * rate)).flatten(1)[..., None] for one in patches
        ]
        strategy = self.config.vision_feature_select_strategy
        return list(self.core.pack_image_features(small, sizes, strategy, newline))

    def mm_encoder_outputs(
        self, features: VisualFeatures, keep: dict[str, Tensor], counts: dict[str, Tensor], same_length: bool
    ) -> dict[str, ModelOutput]:
        layers = [layer for _, layer in self.config.deepstack_layer_map] + list(self.config.spatial_target_layers)
        outputs = {}
        for modality, encoded in features.modalities.items():
            kept, sizes = keep[modality], counts[modality].tolist()
            if kept.any():
                rows = [rows[kept].split(sizes) for rows in (encoded.rows, *encoded.deepstack)]
                pairs = list(zip(layers, map(list, rows), strict=True))
                outputs[modality] = encoded.output_class(deepstack_features=pairs)
        return outputs


class FuyuAdapter(LVLMAdapter):
    """Fuyu has no tower, and text tokens end the rows of its images."""

    output_field = "last_hidden_state"

    def encode(self, input_ids: Tensor, inputs: dict[str, Any], with_attention: bool = False) -> VisualFeatures:
        features = super().encode(input_ids, inputs, with_attention)
        for encoded in features.modalities.values():
            rows = run_lengths(input_ids.cpu() == self.token_ids["image"])
            encoded.blocks = join_rows(rows, [sum(b.num_tokens for b in blocks) for blocks in encoded.blocks])
        return features


class Llama4Adapter(LVLMAdapter):
    """Llama 4 projects what it is handed: pruners see the projected rows, and the others are handed on."""

    output_field = "last_hidden_state"
    takes_projected = False
    class_token = -1

    def unpack(self, modality: str, output: ModelOutput, counts: Tensor, inputs: dict[str, Any]) -> EncodedModality:
        encoded = super().unpack(modality, output, counts, inputs)
        projected = self.base.multi_modal_projector(encoded.rows)
        return replace(encoded, rows=projected, deepstack=[encoded.rows])

    def mm_encoder_outputs(
        self, features: VisualFeatures, keep: dict[str, Tensor], counts: dict[str, Tensor], same_length: bool
    ) -> dict[str, ModelOutput]:
        handed = {name: replace(m, rows=m.deepstack[0], deepstack=[]) for name, m in features.modalities.items()}
        return super().mm_encoder_outputs(VisualFeatures(handed), keep, counts, same_length)


class ResamplerAdapter(LVLMAdapter):
    """Families whose queries gather tokens from the whole image, so that a token stands for no place in it."""

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        return [[Block(1, entry.shape[-2])] * entry.shape[:-2].numel() for entry in entries]


class DeepseekOcr2Adapter(LVLMAdapter):
    """DeepSeek-OCR 2: tokens that stand for no place in the image, and a separator behind them."""

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        return [[Block(1, len(entry) - 1), SEPARATOR] for entry in entries]


class UnlimitedOcrAdapter(LVLMAdapter):
    """Unlimited OCR: the crops as one grid, an overview, both with a newline behind each row, and a separator."""

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        found = []
        for entry in entries:
            newlines = (entry == self.core.image_newline.to(entry)).all(-1).nonzero()[:, 0]
            widths = (newlines - torch.cat([newlines.new_tensor([-1]), newlines[:-1]]) - 1).tolist()
            blocks: list[Block] = []
            side = widths[-1]  # the overview is square and comes last
            crops = widths[: len(widths) - side]
            if crops:
                blocks.append(Block(len(crops), crops[0], row_newline=True))
            found.append([*blocks, Block(side, side, row_newline=True), SEPARATOR])
        return found


class HunYuanAdapter(RopeIndexAdapter):
    """HunYuan: rows end in a newline, images have a begin and an end, and the config names the rotary axes."""

    patches_row_by_row = True
    has_text_axis = False

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        merge = self.config.vision_config.spatial_merge_size
        grids = [(height // merge, width // merge) for _, height, width in inputs["image_grid_thw"].tolist()]
        return [[SEPARATOR, Block(height, width, row_newline=True), SEPARATOR] for height, width in grids]

    def spread_positions(self, positions: Tensor, valid: Tensor) -> Tensor:
        num_axes = len(self.config.text_config.rope_parameters["mrope_section"])
        return positions.expand(num_axes, -1, -1)


class HunYuan4Adapter(RopeIndexAdapter):
    """HunYuan 4: the rows of an image and of each frame end in a newline, which has a place in the positions."""

    patches_row_by_row = True

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        merge = self.config.vision_config.spatial_merge_size
        grids = inputs[f"{modality}_grid_thw"].tolist()
        return [[Block(height // merge, width // merge, row_newline=True)] * frames for frames, height, width in grids]


class Emu3Adapter(LVLMAdapter):
    """Emu3: the rows of an image's code book entries end in one that means the end of the row."""

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        factor = self.core.vqmodel.vision_spatial_factor
        sizes = inputs["image_sizes"].tolist()
        return [[Block(height // factor, width // factor, row_newline=True)] for height, width in sizes]


class Molmo2Adapter(OneKindAdapter):
    """Molmo 2: an overview, then the crops as one grid.

    It makes its mask twice, and the second time reads gaps in positions as several packed prompts.
    """

    keeps_positions = False

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        if inputs.get("pixel_values_videos") is not None:
            return [[Block(height, width)] * frames for frames, height, width in inputs["video_grids"].tolist()]
        return [
            [Block(height, width) for height, width in (grid[:2], grid[2:]) if height * width]
            for grid in inputs["image_grids"].tolist()
        ]


class Gemma4Adapter(LVLMAdapter):
    """Gemma 4: patches with a place each, pooled in squares."""

    def valid_patches(self, modality: str, inputs: dict[str, Any]) -> Tensor | None:
        return (inputs[f"{modality}_position_ids"] != -1).all(-1)

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        places = inputs[f"{modality}_position_ids"]
        sizes = places.flatten(0, -3).amax(dim=1) + 1  # of each image or frame: width and height in patches
        frames = inputs.get("num_frames_per_video") if modality == "video" else None
        num_frames = [len(sizes) // len(entries)] * len(entries) if frames is None else frames.tolist()
        found = []
        for entry, own in zip(entries, sizes.split(num_frames), strict=True):
            grids = [[1, height, width] for width, height in own.tolist()]
            num_tokens = entry.shape[:-1].numel() // len(own)
            found.append([block for grid in grids for block in grid_blocks(grid, num_tokens)])
        return found


class OwnPositionsAdapter(LVLMAdapter):
    """Families whose `generate` counts positions by itself, whatever is passed."""

    keeps_positions = False


def windows_of_tokens(adapter: LVLMAdapter, patches: Tensor, blocks: list[Block], side: int) -> Tensor:
    """Patches of a tower that goes through the merged tokens of an image window by window (Qwen2.5-VL)."""
    vision = adapter.config.vision_config
    grids = [(block.height, block.width) for block in blocks]
    return undo_windows(patches.view(-1, side**2), grids, vision.window_size // vision.patch_size // side).flatten()


class Qwen25Adapter(RopeIndexAdapter):
    """Qwen2.5-VL: the tower works in windows."""

    def row_by_row(self, patches: Tensor, blocks: list[Block], side: int) -> Tensor:
        return windows_of_tokens(self, patches, blocks, side)


class OmniAdapter(RopeIndexAdapter):
    """Qwen-Omni: what counts its positions has names of its own for two inputs, and needs the lengths of audio."""

    geometry_names = (*RopeIndexAdapter.geometry_names, "video_second_per_grid")

    def position_ids(self, input_ids: Tensor, attention_mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        lengths, mask = inputs.get("audio_feature_lengths"), inputs.get("feature_attention_mask")
        lengths = lengths if mask is None else mask.sum(-1)
        named = {"audio_seqlens": lengths, "second_per_grids": inputs.get("video_second_per_grid")}
        return super().position_ids(input_ids, attention_mask, {**inputs, **named})


class Qwen25OmniAdapter(OmniAdapter, Qwen25Adapter):
    """Qwen2.5-Omni: the tower works in windows."""


class Exaone45Adapter(OwnPositionsAdapter):
    """EXAONE 4.5: the tower works in windows."""

    def row_by_row(self, patches: Tensor, blocks: list[Block], side: int) -> Tensor:
        return windows_of_tokens(self, patches, blocks, side)


class MuseAdapter(LVLMAdapter):
    """Muse: the tower works in windows of patches, before any are merged."""

    patches_row_by_row = True

    def row_by_row(self, patches: Tensor, blocks: list[Block], side: int) -> Tensor:
        grids = [(block.height * side, block.width * side) for block in blocks]
        return undo_windows(patches, grids, self.config.vision_config.pos_emb_height)


class KimiAdapter(LVLMAdapter):
    """Kimi: a grid counts the patches, and they come row by row all the same. A video becomes one grid of means."""

    patches_row_by_row = True

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        name = f"{modality}_grid_thw"
        grids = [(1, height, width) for _, height, width in inputs[name].tolist()]
        return super().blocks(modality, entries, {**inputs, name: torch.tensor(grids, device="cpu")})

    def received_attention(
        self, modality: str, layer: ObservedLayer, encoded: EncodedModality, inputs: dict[str, Any]
    ) -> Tensor:
        if modality == "video":
            raise no_attention_to_videos(self.config.model_type)
        return super().received_attention(modality, layer, encoded, inputs)


class PaddleOcrAdapter(RopeIndexAdapter):
    """PaddleOCR: a grid counts the patches, and they come row by row all the same."""

    patches_row_by_row = True


class PaliGemmaAdapter(LVLMAdapter):
    """PaliGemma counts positions from 1; its `generate` adds the 1 itself, its forward does not.

    It reads tokens of type 0 in both directions, so an answer has type 1.
    """

    forward_position_offset = 1
    answer_token_type = 1


# Only families that the default does not serve have an entry.
ADAPTERS: dict[str, type[LVLMAdapter]] = {
    "llava_next": NewlineAdapter,
    "llava_next_video": NewlineAdapter,
    "llava_onevision": OneVisionAdapter,
    "idefics3": Idefics3Adapter,
    "smolvlm": Idefics3Adapter,
    "paligemma": PaliGemmaAdapter,
    "aria": ResamplerAdapter,
    "idefics2": ResamplerAdapter,
    "deepseek_ocr2": DeepseekOcr2Adapter,
    "emu3": Emu3Adapter,
    "fuyu": FuyuAdapter,
    "gemma4": Gemma4Adapter,
    "gemma4_unified": Gemma4Adapter,
    "granite4_vision": Granite4VisionAdapter,
    "granite_docling": GraniteDoclingAdapter,
    "glm46v": Glm4vAdapter,
    "glm4v": Glm4vAdapter,
    "glm4v_moe": Glm4vAdapter,
    "glm5_next": VideoSpanAdapter,
    "glm_ocr": Glm4vAdapter,
    "glmga": Glm4vAdapter,
    "hunyuan_vl": HunYuanAdapter,
    "hy_v4_vl": HunYuan4Adapter,
    "llama4": Llama4Adapter,
    "molmo2": Molmo2Adapter,
    "unlimited_ocr": UnlimitedOcrAdapter,
    "video_llama_3": VideoLlama3Adapter,
    "exaone4_5": Exaone45Adapter,
    "kimi_k25": KimiAdapter,
    "muse_glimmer": MuseAdapter,
    "muse_spark": MuseAdapter,
    "nemotron_h_omni": NemotronAdapter,
    "paddleocr_vl": PaddleOcrAdapter,
    "qwen2_5_vl": Qwen25Adapter,
    "qwen2_5_omni_thinker": Qwen25OmniAdapter,
    "qwen3_omni_moe_thinker": OmniAdapter,
    "hyperclovax_vision_v2": OwnPositionsAdapter,
}

# Types whose invariants the tests hold; docs/families.md is the table.
SUPPORTED = (
    "apertus1p5", "aria", "aya_vision", "chameleon", "cohere2_vision", "cohere_compass", "cosmos3_edge",
    "cosmos3_omni", "deepseek_ocr2", "deepseek_vl", "deepseek_vl_hybrid", "dots3_note", "emu3", "ernie4_5_vl_moe",
    "exaone4_5", "fuyu", "gemma3", "gemma4", "gemma4_unified", "glm46v", "glm4v", "glm4v_moe", "glm5_next", "glm_ocr",
    "glmga", "got_ocr2", "granite4_vision", "granite_docling", "hunyuan_vl", "hy_v4_vl", "hyperclovax_vision_v2",
    "idefics2", "idefics3", "inkling2", "inkling2_loop", "internvl", "janus", "kimi_k25", "lfm2_vl", "lfm3_vl",
    "lighton_ocr", "llama4", "llava", "llava_next", "llava_next_video", "llava_onevision", "minicpm_ocr",
    "minicpmv4_6", "minicpmv4_7", "minimax_m3_vl", "mistral3", "mistral_large4", "molmo2", "muse_glimmer",
    "muse_spark", "nemotron_h_omni", "ovis2", "paddleocr_vl", "paligemma", "pp_chart2table", "qianfan_ocr",
    "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl",
    "qwen3_vl_moe", "qwen4_exp", "smolvlm", "step3p7", "unlimited_ocr", "video_llama_3", "video_llava", "vipllava",
)  # fmt: skip
# Types that take `mm_encoder_outputs` and cannot be pruned all the same.
REFUSED = {
    "blip-2": "its own `generate` encodes the image itself and ignores the features it is given",
    "instructblip": "its own `generate` encodes the image itself and ignores the features it is given",
    "instructblipvideo": "its own `generate` encodes the video itself and ignores the features it is given",
    "diffusion_gemma": "it denoises blocks of text by a `generate` of its own instead of writing token by token",
}


def adapter_for(base: PreTrainedModel) -> LVLMAdapter:
    """The adapter of `base`, by its model type and by what it can do. An untested type is warned about.

    Raises:
        `ValueError`: when the base model cannot be pruned.
    """
    model_type = base.config.model_type
    if model_type in REFUSED:
        raise ValueError(cannot_be_pruned(model_type, REFUSED[model_type]))
    if HANDED not in inspect.signature(base.forward).parameters:
        raise ValueError(cannot_be_pruned(model_type, f"its `forward` does not take `{HANDED}`"))
    default = RopeIndexAdapter if hasattr(base.base_model, "get_rope_index") else LVLMAdapter
    adapter = ADAPTERS.get(model_type, default)(base)
    if not adapter.encoder_names:
        reason = "it has no placeholder token with an encoder (`get_image_features`)"
        raise ValueError(cannot_be_pruned(model_type, reason))
    if model_type not in SUPPORTED:
        logger.warning(
            f"Pruning is untested for models of type {model_type!r}. Check that keep_ratio=1.0 gives the base model's "
            "answers before you rely on it."
        )
    return adapter


def cannot_be_pruned(model_type: str, reason: str) -> str:
    """The message of a refusal, with supported types of a similar name."""
    similar = get_close_matches(model_type, SUPPORTED)
    named = f"Supported types of a similar name: {', '.join(similar)}. " if similar else ""
    return (
        f"Models of type {model_type!r} cannot be pruned: {reason}. {named}docs/families.md lists the supported types."
    )
