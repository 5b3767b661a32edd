"""The model inside vLLM: vLLM's own class of the base model, with a pruner between its projector and its LLM."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import PlaceholderRange
from vllm.utils.torch_utils import set_default_torch_dtype

from tprl_hf.modeling.budget import Budget
from tprl_hf.modeling.checkpoint_tprl import BASE_PREFIX, POLICY_PREFIXES, load_policy
from tprl_hf.modeling.columns import pad_rows
from tprl_hf.modeling.pruning_policy import PruningPolicy
from tprl_hf.modeling.token_autoencoder import TokenAutoencoder
from tprl_hf.modeling.token_layout import Block, TokenLayout
from tprl_hf.modeling.token_pruner import LearnedPruner, PruningInputs, TokenPruner

from .adapter import read_adapter, with_adapter
from .engine_config import base_source, named_pruner, pruned_config
from .families import build_dummy_inputs, build_info, build_processor, family_of
from .places import full_prompt, place_columns, read_places
from .processing import FIELDS
from .rows_cache import RowsCache

ROWS_CACHE_BYTES = 512 * 1024**2


@MULTIMODAL_REGISTRY.register_processor(build_processor, info=build_info, dummy_inputs=build_dummy_inputs)
class TPRLForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsMRoPE):
    """
    The counterpart of `tprl_hf.TPRLForConditionalGeneration`: `lvlm` is the base model, here as vLLM builds it.

    The rows of an image leave `embed_multimodal` pruned. With original positions each row has the kept token's place
    in its image behind it (see `places.py`); `embed_input_ids` takes the places off, and `forward` adds them.
    """

    config: Any
    lvlm: Any
    places: Tensor
    positions: Tensor

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return None  # the chat templates of these families place images themselves

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        config = self.config = pruned_config(model_config.hf_config)
        self.family = family_of(config)
        base: Any = copy.deepcopy(config.base_config)
        if config.position_ids == "original" and not self.family.has_three_axes:
            # An answer follows the full prompt, whose length is checked; vLLM's table of angles must reach there.
            base.get_text_config().max_position_embeddings *= 2
        self.lvlm = init_vllm_registered_model(
            vllm_config, hf_config=base, architectures=[self.family.architecture], prefix=maybe_prefix(prefix, "lvlm")
        )
        self.pruner = named_pruner(config) or self.make_policy()
        self.axes = 3 if self.family.has_three_axes else 1
        self.is_original = config.position_ids == "original"
        # Without pruning, positions are the base model's, which lie in three axes also where a checkpoint counts anew.
        self.has_places = self.is_original or self.axes == 3
        size = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("places", torch.zeros(self.axes, size, dtype=torch.long), persistent=False)
        # CUDA graphs of the LLM's parts read positions where these lay at capture. One more column, as in vLLM's own
        # buffer, keeps slices of three axes from being contiguous, for torch.compile.
        self.register_buffer("positions", torch.zeros(self.axes, size + 1, dtype=torch.long), persistent=False)
        self.tower_tokens = max(size, vllm_config.scheduler_config.max_num_encoder_input_tokens)
        self.rows_cache = RowsCache(ROWS_CACHE_BYTES)
        if not config.includes_base_model:
            source = base_source(model_config.model, config)
            self.secondary_weights = [DefaultModelLoader.Source(source, config.base_model_revision)]
        self.source = model_config.model
        self.adapter = read_adapter(self.source, model_config.revision) if config.includes_adapter else {}

    def make_policy(self) -> TokenPruner:
        config = self.config
        with set_default_torch_dtype(torch.float32):  # whatever the LLM's
            self.autoencoder = TokenAutoencoder(config.token_dim, config.autoencoder_dim, config.latent_dim)
            self.policy = PruningPolicy.of(config)
        return LearnedPruner(self.policy, self.autoencoder, config.num_steps)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        ours: dict[str, Tensor] = {}

        def of_base():
            for name, value in weights:
                if name.startswith(POLICY_PREFIXES):
                    ours[name] = value
                else:
                    yield self.family.rename(name.removeprefix(BASE_PREFIX)), value

        base = with_adapter(of_base(), self.adapter, self.name_in_vllm, self.source)
        loaded = {f"{BASE_PREFIX}{name}" for name in self.lvlm.load_weights(base)}
        if isinstance(self.pruner, LearnedPruner):
            load_policy(self, ours, "the checkpoint")
            loaded.update(ours)
        return loaded

    def name_in_vllm(self, name: str) -> str:
        return self.lvlm.hf_to_vllm_mapper.map_name(name) or name

    # ---- choosing ----

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        if kwargs.get("image_embeds") is not None:  # encoded and pruned elsewhere
            return [rows[:, : self.config.token_dim + 2 * self.is_original] for rows in kwargs["image_embeds"]]
        if kwargs.get("tprl_keep") is None:
            return []
        ours = {name: list(kwargs.pop(name)) for name in FIELDS}
        layouts = [TokenLayout.from_blocks([read_blocks(blocks)]) for blocks in ours["tprl_blocks"]]
        sizes = [len(layout.image) for layout in layouts]
        rows = self.encode(kwargs, [tuple(key.tolist()) for key in ours["tprl_key"]], sizes)
        counts = [int(count) or size for count, size in zip(ours["tprl_keep"], sizes, strict=True)]
        kept: list[Tensor] = [torch.empty(0)] * len(rows)
        for count in set(counts):  # a pruner takes one budget for all samples of its batch
            which = [index for index, own in enumerate(counts) if own == count]
            masks = self.choose(rows, layouts, ours["tprl_question"], which, count)
            for index, mask in zip(which, masks, strict=True):
                is_pruned = bool(ours["tprl_keep"][index])
                kept[index] = self.with_places(rows[index], mask, layouts[index], is_pruned)
        return kept

    def encode(self, kwargs: dict[str, Any], keys: list[tuple[int, ...]], sizes: list[int]) -> list[Tensor]:
        """Rows `[N, D]` of each image before pruning, from the cache or from tower and projector."""
        cached = {key: self.rows_cache.get(key, self.places.device) for key in keys}
        found = {key: rows for key, rows in cached.items() if rows is not None}
        missing = [keys.index(key) for key in cached if key not in found]
        # vLLM counts kept tokens when it says how many images are encoded at once; the tower computes all.
        for batch in batches(missing, sizes, self.tower_tokens):
            rows = self.lvlm.embed_multimodal(**select_images(kwargs, batch, len(keys)))
            for index, own in zip(batch, rows, strict=True):
                found[keys[index]] = own
                self.rows_cache.put(keys[index], own)
        return [found[key] for key in keys]

    def choose(
        self, rows: list[Tensor], layouts: list[TokenLayout], questions: list[Tensor], which: list[int], count: int
    ) -> list[Tensor]:
        """Which tokens of the images `which` are kept, `bool [N]` each; merged rows replace those in `rows`."""
        sizes = torch.tensor([len(rows[index]) for index in which])
        if bool((sizes <= count).all()):
            return [rows[index].new_ones(len(rows[index]), dtype=torch.bool) for index in which]
        device, width = self.places.device, self.config.token_dim
        tokens, valid = pad_rows(torch.cat([rows[index][:, :width] for index in which]), sizes)
        padded = pad_rows(torch.cat([layouts[index].stacked().T for index in which]), sizes)[0].permute(2, 0, 1)
        padded[4:6].clamp_(min=1)
        layout = TokenLayout.from_stacked(padded.to(device))
        lengths = torch.tensor([questions[index].numel() for index in which])
        ids, words = pad_rows(torch.cat([questions[index].flatten() for index in which]), lengths)
        inputs = PruningInputs(
            tokens=tokens,
            valid=valid.to(device),
            num_visual=sizes,
            layout=layout,
            protected=layout.protected if padded[6].any() else None,
            query=self.lvlm.get_language_model().embed_input_ids(ids.to(device)),
            query_valid=words.to(device),
            sample_keys=[0] * len(which),
        )
        masks, _ = self.pruner.choose(inputs, Budget(num_keep=count))
        merged = self.pruner.merge(inputs, masks)
        if merged is not None:
            for index, own, size in zip(which, merged, sizes.tolist(), strict=True):
                rows[index] = torch.cat([own[:size].to(rows[index]), rows[index][:, width:]], dim=1)
        return [mask[:size] for mask, size in zip(masks, sizes.tolist(), strict=True)]

    def with_places(self, rows: Tensor, mask: Tensor, layout: TokenLayout, is_pruned: bool) -> Tensor:
        kept = rows[mask]
        if not self.has_places:
            return kept
        if is_pruned and not self.is_original:
            places = torch.zeros(self.axes, len(kept), dtype=torch.long, device=kept.device)
        elif self.axes == 1:
            places = mask.nonzero().T
        else:
            places = torch.stack([layout.block, layout.row, layout.column]).to(mask.device)[:, mask]
        return torch.cat([kept, place_columns(places, kept.dtype)], dim=1)

    # ---- positions ----

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions `[3, L]` of the full prompt: each kept token at its image's start, [`forward`] adds its place."""
        is_pruned = any("tprl_keep" not in f.data or bool(f.data["tprl_keep"].data) for f in mm_features)
        if is_pruned and not self.is_original:
            return torch.arange(len(input_tokens)).expand(3, -1).contiguous(), 0
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        images = []
        for feature in features:
            if "image_embeds" in feature.data:
                total = int(read_places(feature.data["image_embeds"].data[:1, -2:]))
            else:
                total = sum(block.num_tokens for block in read_blocks(feature.data["tprl_blocks"].data))
            images.append((feature.mm_position.offset, feature.mm_position.length, total))
        full, starts, columns = full_prompt(input_tokens, images, self.config.image_token_id)
        if self.axes == 1:
            positions, delta = torch.arange(len(full)).expand(3, -1), 0
        else:
            whole = [
                replace(feature, mm_position=PlaceholderRange(offset=start, length=total))
                for feature, start, (_, _, total) in zip(features, starts, images, strict=True)
            ]
            positions, delta = self.lvlm.get_mrope_input_positions(full, whole)
        return positions[:, columns].contiguous(), delta + len(full) - len(input_tokens)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        if self.has_places:
            self.places.zero_()  # behind the ids too, where the engine pads
            if multimodal_embeddings is not None and len(multimodal_embeddings):
                assert is_multimodal is not None
                width = 2 * self.axes
                columns = torch.cat([rows[:, -width:] for rows in multimodal_embeddings])
                self.places[:, : len(input_ids)][:, is_multimodal.to(self.places.device)] = read_places(columns)
                multimodal_embeddings = [rows[:, :-width] for rows in multimodal_embeddings]
        return self.lvlm.embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.has_places:
            number = positions.shape[1]
            placed = self.positions[:, :number]
            torch.add(positions[: self.axes], self.places[:, :number], out=placed)
            positions = placed[0] if self.axes == 1 else placed
        return self.lvlm(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    # ---- as the base model ----

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.lvlm.compute_logits(hidden_states)

    def get_language_model(self) -> Any:
        return self.lvlm.get_language_model()


def read_blocks(blocks: Tensor) -> list[Block]:
    """The grids of an image from `int64 [blocks, 4]`."""
    return [Block(height, width, bool(row), bool(alone)) for height, width, row, alone in blocks.tolist()]


def batches(which: list[int], sizes: list[int], most: int) -> Iterator[list[int]]:
    """The images `which` in groups of at most `most` tokens, or of one image."""
    batch: list[int] = []
    for index in which:
        if batch and sum(sizes[i] for i in [*batch, index]) > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def select_images(kwargs: dict[str, Any], which: list[int], count: int) -> dict[str, Any]:
    """The inputs of the images `which` among `count`."""
    if which == list(range(count)):
        return kwargs
    selected: dict[str, Any] = {}
    for name, value in kwargs.items():
        parts = value
        if name == "pixel_values" and "image_grid_thw" in kwargs:  # the patches of all images in a row
            parts = value.split([int(grid.prod()) for grid in kwargs["image_grid_thw"]])
        chosen = [parts[index] for index in which]
        if parts is not value:
            selected[name] = torch.cat(chosen)
        else:
            selected[name] = torch.stack(chosen) if torch.is_tensor(value) else chosen
    return selected
