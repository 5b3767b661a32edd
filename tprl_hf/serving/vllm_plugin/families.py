"""The families of base models that can be pruned inside vLLM: what differs between them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder, LlavaMultiModalProcessor, LlavaProcessingInfo
from vllm.model_executor.models.llava_next import LlavaNextMultiModalProcessor, LlavaNextProcessingInfo
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal.processing import InputProcessingContext

from tprl_hf.modeling.configuration_tprl import TPRLConfig
from tprl_hf.modeling.token_layout import Block, square_block

from .engine_config import pruned_config
from .processing import PrunedInfo, PrunedProcessor
from .requests import towers_by_vllm_names


class LlavaInfo(PrunedInfo, LlavaProcessingInfo):
    def image_blocks(self, width: int, height: int, kwargs: Mapping[str, object]) -> list[Block]:
        return [square_block(self.get_num_image_tokens(image_width=width, image_height=height))]


class LlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    pass


class NewlineInfo(PrunedInfo):
    """Families that show an overview, then crops as one grid whose rows end in a newline."""

    def image_blocks(self, width: int, height: int, kwargs: Mapping[str, object]) -> list[Block]:
        config, encoder = self.get_hf_config(), self.get_vision_encoder_info()
        side = encoder.get_patch_grid_length()
        tiles = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, encoder.get_image_size())
        tokens, rows = self._get_num_unpadded_features(
            original_height=height,
            original_width=width,
            npatches=side,
            num_patch_height=tiles[0],
            num_patch_width=tiles[1],
        )
        if not rows:  # of a very flat picture none is left
            return [Block(side, side)]
        return [Block(side, side), Block(rows, tokens // rows, row_newline=True)]


class LlavaNextInfo(NewlineInfo, LlavaNextProcessingInfo):
    pass


class LlavaNextProcessor(PrunedProcessor, LlavaNextMultiModalProcessor):
    pass


class LlavaOnevisionInfo(NewlineInfo, LlavaOnevisionProcessingInfo):
    pass


class LlavaOnevisionProcessor(PrunedProcessor, LlavaOnevisionMultiModalProcessor):
    pass


class GridInfo(PrunedInfo):
    """Families whose images keep their shape: a grid of patches, some of which are merged into a token."""

    def image_blocks(self, width: int, height: int, kwargs: Mapping[str, object]) -> list[Block]:
        size, _ = self._get_vision_info(
            image_width=width,
            image_height=height,
            num_frames=1,
            image_processor=self.get_image_processor(**kwargs),
            mm_kwargs=kwargs,
        )
        vision = self.get_hf_config().vision_config
        pixels = vision.patch_size * vision.spatial_merge_size
        return [Block(size.height // pixels, size.width // pixels)]

    @property
    def embedded_width(self) -> int | None:
        return None

    def num_positions(self, blocks: list[Block]) -> int:
        return max(blocks[0].height, blocks[0].width)


class Qwen25Info(GridInfo, Qwen2_5_VLProcessingInfo):
    pass


class Qwen25Processor(PrunedProcessor, Qwen2_5_VLMultiModalProcessor):
    pass


class Qwen3Info(GridInfo, Qwen3VLProcessingInfo):
    pass


class Qwen3Processor(PrunedProcessor, Qwen3VLMultiModalProcessor):
    pass


@dataclass(frozen=True)
class Family:
    """
    One family.

    Args:
        architecture (`str`): vLLM's name of its class.
        info, processor, dummy_inputs: classes that make its inputs.
        rename (`Callable`): from a weight's name in our checkpoints to one that vLLM's class takes.
        has_three_axes (`bool`): positions have a row each for time, height and width.
    """

    architecture: str
    info: type[PrunedInfo]
    processor: type[PrunedProcessor]
    dummy_inputs: type
    rename: Callable[[str], str] = str
    has_three_axes: bool = False


FAMILIES = {
    "llava": Family(
        "LlavaForConditionalGeneration", LlavaInfo, LlavaProcessor, LlavaDummyInputsBuilder, towers_by_vllm_names
    ),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        LlavaNextInfo,
        LlavaNextProcessor,
        LlavaDummyInputsBuilder,
        towers_by_vllm_names,
    ),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        LlavaOnevisionInfo,
        LlavaOnevisionProcessor,
        LlavaOnevisionDummyInputsBuilder,
        towers_by_vllm_names,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        Qwen25Info,
        Qwen25Processor,
        Qwen2_5_VLDummyInputsBuilder,
        has_three_axes=True,
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        Qwen3Info,
        Qwen3Processor,
        Qwen3VLDummyInputsBuilder,
        has_three_axes=True,
    ),
}


def family_of(config: TPRLConfig) -> Family:
    """
    The family of a config's base model.

    Raises:
        `ValueError`: for one that is not in the table.
    """
    model_type = getattr(config.base_config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"Models of type {model_type!r} cannot be pruned inside vLLM yet, only {', '.join(sorted(FAMILIES))}. "
            "`tprl serve` takes all types of docs/families.md."
        )
    return FAMILIES[model_type]


# vLLM calls these three, one after the other.


def build_info(ctx: InputProcessingContext) -> PrunedInfo:
    return family_of(pruned_config(ctx.model_config.hf_config)).info(ctx)


def build_dummy_inputs(info: PrunedInfo):
    return family_of(info.config).dummy_inputs(info)


def build_processor(info: PrunedInfo, dummy_inputs) -> PrunedProcessor:
    return family_of(info.config).processor(info, dummy_inputs)
