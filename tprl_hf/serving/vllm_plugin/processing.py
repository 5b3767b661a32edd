"""From a request to what the model gets: budget and question become part of each image's hash and of its inputs."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import BatchFeature, GenerationConfig
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    InputProcessingContext,
    PromptReplacement,
)

from tprl_hf.modeling.checkpoint_checks import refuse_untrained
from tprl_hf.modeling.text_query import config_special_ids, template_ids
from tprl_hf.modeling.token_layout import Block

from .engine_config import base_context, named_pruner, pruned_config, reads_question
from .places import BASE, EMBEDDED_COLUMNS, read_places
from .requests import counts_of_images, question_ids, request_budget, split_budget

# Under this name budget and question travel among a request's `mm_processor_kwargs`, which vLLM hashes.
OURS = "tprl"
# Inputs of the model that are ours, one entry for each image. "tprl_keep" is 0 where the request is not pruned.
FIELDS = ("tprl_keep", "tprl_question", "tprl_blocks", "tprl_key")


def without_ours(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the base model's own processor takes."""
    return {name: value for name, value in kwargs.items() if name != OURS}


class PrunedInfo(BaseProcessingInfo):
    """What a family's processor knows, besides what vLLM's own knows of the base model."""

    def __init__(self, ctx: InputProcessingContext) -> None:
        super().__init__(base_context(ctx))
        self.outer = ctx.model_config
        self.config = pruned_config(self.outer.hf_config)
        self.pruner = named_pruner(self.config)

    @property
    def model_id(self) -> str:
        return self.outer.model  # what is cached is of this policy, not of its base model

    @property
    def server_kwargs(self) -> Mapping[str, Any]:
        return self.outer.get_multimodal_config().mm_processor_kwargs or {}

    @cached_property
    def query_settings(self) -> tuple[list[int], list[int] | None, list[int] | None]:
        """Ids that are never part of a question, and what stands around one, as `generate` knows them."""
        base, config = self.get_hf_config(), self.config
        try:
            generation = GenerationConfig.from_pretrained(self.ctx.model_config.model)
        except OSError:
            generation = GenerationConfig.from_model_config(base)
        special = config_special_ids(base, generation) + (config.special_token_ids or [])
        if config.question_end_ids is not None:
            return special, config.question_start_ids, config.question_end_ids
        processor = self.get_hf_processor()
        if getattr(processor, "chat_template", None) is None:
            return special, None, None
        special += processor.tokenizer.all_special_ids
        return special, *template_ids(processor)

    @abstractmethod
    def image_blocks(self, width: int, height: int, kwargs: Mapping[str, object]) -> list[Block]:
        """The grids that an image becomes, see [`Block`]."""

    @property
    def embedded_width(self) -> int | None:
        """Width of rows that were encoded and pruned elsewhere; `None` where the family does not take such."""
        extra = EMBEDDED_COLUMNS if self.config.position_ids == "original" else 0
        width = self.config.token_dim
        return None if width is None else width + extra

    def _get_expected_hidden_size(self) -> int | None:
        return self.embedded_width if self.ctx.get_mm_config().enable_mm_embeds else None

    def num_positions(self, blocks: list[Block]) -> int:
        """By how much the position of the text behind an image with these grids is larger than the image's."""
        return sum(block.num_tokens for block in blocks)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {name: None if name == "image" else 0 for name in super().get_supported_mm_limits()}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_max_image_tokens()}  # a request may ask for all


class PrunedProcessor(BaseMultiModalProcessor[Any]):
    """What vLLM's own processor of a family does, for fewer placeholders."""

    info: PrunedInfo

    def apply(self, inputs, timing_ctx):
        request, kwargs = split_budget(inputs.hf_processor_mm_kwargs)
        if self.are_embedded(inputs.mm_data_items):
            if request:
                raise ValueError(f"Embeddings of images have been pruned: leave out {', '.join(sorted(request))}.")
            self.refuse_other_embeddings(inputs.prompt, inputs.mm_data_items["image"])
        elif "image" in inputs.mm_data_items:
            images = self.blocks(inputs.mm_data_items, kwargs)
            budget = request_budget(request, self.info.server_kwargs, self.info.config, self.info.pruner)
            if budget is not None and self.info.pruner is None:
                refuse_untrained(self.info.config)
            counts = counts_of_images(budget, images)
            self.refuse_too_long(inputs.prompt, [self.info.num_positions(blocks) for blocks in images])
            kwargs[OURS] = {"keep": [], "question": []}
            if budget is not None:
                kept = {repr(blocks): count for blocks, count in zip(images, counts, strict=True)}
                question = []
                if reads_question(self.info.config):
                    question = question_ids(inputs.prompt, self.image_token_id, *self.info.query_settings)
                kwargs[OURS] = {"keep": sorted(kept.items()), "question": question}
        return super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)

    def get_dummy_inputs(self, *args, **kwargs):
        inputs = super().get_dummy_inputs(*args, **kwargs)
        return replace(inputs, hf_processor_mm_kwargs={"prune": False})  # memory is measured with all tokens

    @property
    def image_token_id(self) -> int:
        token = self.info.config.image_token_id
        assert token is not None
        return token

    def are_embedded(self, mm_items: Mapping[str, Any]) -> bool:
        """Whether images come as rows that were encoded and pruned elsewhere."""
        if "image" not in mm_items or isinstance(mm_items["image"], ImageProcessorItems):
            return False
        if not isinstance(mm_items["image"], ImageEmbeddingItems) or self.info.embedded_width is None:
            raise ValueError("Send images to this model: it does not take images as embeddings.")
        return True

    def blocks(self, mm_items: Mapping[str, Any], kwargs: Mapping[str, object]) -> list[list[Block]]:
        """The grids of each image."""
        images = mm_items["image"]
        if any(images.get(index) is None for index in range(len(images))):
            raise ValueError("A uuid alone does not tell an image's size: send the image with it.")
        sizes = [images.get_image_size(index) for index in range(len(images))]
        return [self.info.image_blocks(size.width, size.height, kwargs) for size in sizes]

    def refuse_other_embeddings(self, prompt: list[int], images: ImageEmbeddingItems) -> None:
        """Raises `ValueError` for rows that `embedded_rows` did not make: their places would lead anywhere."""
        if self.info.config.position_ids != "original":
            return
        totals = []
        for index in range(images.get_count()):
            columns = images.get(index)[:, -EMBEDDED_COLUMNS:].float()
            is_small = bool(((columns >= 0) & (columns < BASE) & (columns == columns.round())).all())
            places, total = read_places(columns[:, :2])[0], read_places(columns[:, 2:])[0]
            if not is_small or bool((places >= total).any()) or len(total.unique()) != 1:
                raise ValueError(
                    f"The last {EMBEDDED_COLUMNS} columns of image {index}'s embeddings do not say where its tokens "
                    "lay: make them with tprl_hf.serving.vllm_plugin.places.embedded_rows."
                )
            totals.append(int(total[0]))
        self.refuse_too_long(prompt, totals)

    def refuse_too_long(self, prompt: list[int], images: list[int]) -> None:
        """Raises `ValueError` where kept tokens and text would have positions that the LLM does not know."""
        config = self.info.config
        if config.position_ids != "original":
            return
        length = len(prompt) - len(images) + sum(images)
        longest = config.get_text_config().max_position_embeddings
        if length > longest:
            raise ValueError(
                f"With all visual tokens this prompt has {length} positions, and the LLM knows {longest} positions. "
                "Kept tokens keep theirs, so that pruning does not help: send fewer or smaller images, or less text."
            )

    def _apply_hf_processor_main(self, mm_items, hf_kwargs):
        kwargs = without_ours(hf_kwargs)
        output = super()._apply_hf_processor_main(mm_items, kwargs)
        if "image" in mm_items and len(mm_items["image"]) and not self.are_embedded(mm_items):
            images = self.blocks(mm_items, kwargs)
            is_pruned = bool(hf_kwargs[OURS]["keep"])
            output["tprl_keep"] = torch.tensor([is_pruned * self.kept(blocks, hf_kwargs) for blocks in images])
            question = torch.tensor(hf_kwargs[OURS]["question"], dtype=torch.long)
            output["tprl_question"] = [question] * len(images)
            output["tprl_blocks"] = [
                torch.tensor([[b.height, b.width, b.row_newline, b.separator] for b in blocks]) for blocks in images
            ]
            output["tprl_key"] = torch.stack(
                [self.image_key(item, kwargs) for item in mm_items["image"].get_all_items_for_hash()]
            )
        return output

    def kept(self, blocks: list[Block], hf_kwargs: Mapping[str, Any]) -> int:
        """How many tokens of an image with these grids are kept."""
        return dict(hf_kwargs[OURS]["keep"]).get(repr(blocks), sum(block.num_tokens for block in blocks))

    def image_key(self, image: object, kwargs: Mapping[str, object]) -> torch.Tensor:
        """What tells an image's rows before pruning from those of others: 128 bits, `int64 [2]`."""
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        digest = MultiModalHasher.hash_kwargs(algorithm, image=image, kwargs=dict(kwargs))
        bits = hashlib.sha256(digest.encode()).digest()
        return torch.tensor([int.from_bytes(bits[i : i + 8], "little", signed=True) for i in (0, 8)])

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        ours = {name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in FIELDS}
        return {**super()._get_mm_fields_config(hf_inputs, without_ours(hf_processor_mm_kwargs)), **ours}

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> Sequence[PromptReplacement]:
        token = self.image_token_id
        if "image" not in mm_items:
            return []
        if self.are_embedded(mm_items):
            sizes = mm_items["image"]
            return [PromptReplacement("image", [token], lambda index: [token] * sizes.get_feature_size(index))]
        images = self.blocks(mm_items, without_ours(hf_processor_mm_kwargs))
        counts = [self.kept(blocks, hf_processor_mm_kwargs) for blocks in images]
        return [PromptReplacement("image", [token], lambda index: [token] * counts[index])]
