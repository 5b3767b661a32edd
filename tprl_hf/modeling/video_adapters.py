"""Adapters of families whose videos differ from images in more than their names."""

import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .lvlm_adapters import LVLMAdapter, RopeIndexAdapter
from .token_layout import without_places
from .visual_features import EncodedModality, VisualFeatures


class OneKindAdapter(LVLMAdapter):
    """Families whose image tokens stand for videos where videos are passed, so that a call has one kind of them."""

    def __init__(self, base: PreTrainedModel):
        super().__init__(base)
        names = inspect.signature(self.core.get_video_features).parameters
        self.encoder_names["video"] = [name for name in names if name != "kwargs"]

    @property
    def token_ids(self) -> dict[str, int]:
        return {modality: token_id for modality, token_id in super().token_ids.items() if modality != "video"}

    def placeholders(self, modality: str, input_ids: Tensor) -> Tensor:
        return super().placeholders("image", input_ids)

    def encode(self, input_ids: Tensor, inputs: dict[str, Any], with_attention: bool = False) -> VisualFeatures:
        is_video = inputs.get("pixel_values_videos") is not None
        if is_video and inputs.get("pixel_values") is not None:
            raise ValueError(
                f"Models of type {self.config.model_type!r} take images or videos, not both in one call: nothing "
                "tells their tokens apart. Pass `pixel_values` or `pixel_values_videos`."
            )
        input_ids = input_ids.cpu()
        encoded = self.encode_modality("video" if is_video else "image", input_ids, inputs, with_attention)
        features = VisualFeatures({} if encoded is None else {"image": encoded})
        self.check(input_ids, features)
        return features


class NemotronAdapter(OneKindAdapter):
    """Nemotron-H Omni can prune videos by itself, after it was handed them."""

    def encode(self, input_ids: Tensor, inputs: dict[str, Any], with_attention: bool = False) -> VisualFeatures:
        if inputs.get("pixel_values_videos") is not None and self.config.video_pruning_rate > 0:
            raise ValueError(
                f"video_pruning_rate={self.config.video_pruning_rate}: the base model would prune videos once more. "
                "Load it with video_pruning_rate=0."
            )
        return super().encode(input_ids, inputs, with_attention)


class VideoSpanAdapter(LVLMAdapter):
    """GLM: image tokens between the start and the end of a video stand for its frames."""

    @property
    def token_ids(self) -> dict[str, int]:
        own = super().token_ids
        return {**own, "video": own["image"]}

    def placeholders(self, modality: str, input_ids: Tensor) -> Tensor:
        starts = (input_ids == self.config.video_start_token_id).cumsum(-1)
        in_video = starts > (input_ids == self.config.video_end_token_id).cumsum(-1)
        return super().placeholders(modality, input_ids) & (in_video if modality == "video" else ~in_video)


class Glm4vAdapter(VideoSpanAdapter, RopeIndexAdapter):
    """GLM-4V: the base model itself does not tell image tokens in videos from those of images."""

    hands_over_as_one = True


class VideoLlama3Adapter(LVLMAdapter):
    """VideoLLaMA 3: its processor drops what a frame repeats of the frame before, and says so in a mask."""

    def consumed_names(self) -> set[str]:
        return super().consumed_names() | {"video_compression_mask"}

    def encode_modality(
        self, modality: str, input_ids: Tensor, inputs: dict[str, Any], with_attention: bool
    ) -> EncodedModality | None:
        encoded = super().encode_modality(modality, input_ids, inputs, with_attention)
        mask = inputs.get("video_compression_mask")
        if encoded is None or mask is None or modality == "image":
            return encoded
        if len(mask) != len(encoded.rows):
            raise ValueError(
                f"video_compression_mask has {len(mask)} entries for {len(encoded.rows)} tokens of the videos: pass "
                "it as the processor returned it with these videos."
            )
        mask = mask.bool().to(encoded.rows.device)
        bits = iter((~mask).tolist())
        blocks = [[without_places(block, bits) for block in entry] for entry in encoded.blocks]
        attention = None if encoded.attention is None else encoded.attention[mask.to(encoded.attention.device)]
        return replace(encoded, rows=encoded.rows[mask], blocks=blocks, attention=attention)


def no_attention_to_videos(model_type: str) -> ValueError:
    return ValueError(
        f"Attention to videos cannot be read in models of type {model_type!r}. Use a pruner without `needs_attention`."
    )
