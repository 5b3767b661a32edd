"""The families of base models that can be pruned inside vLLM: what differs between them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm.model_executor.models.llava import LlavaDummyInputsBuilder, LlavaMultiModalProcessor, LlavaProcessingInfo
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
