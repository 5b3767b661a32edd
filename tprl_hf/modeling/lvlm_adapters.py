"""What differs between LVLM families. The default serves all that take `mm_encoder_outputs`; few need more.

An adapter knows how to encode images and videos with the base model's own `get_image_features` and
`get_video_features`, where the placeholders of their tokens are, which positions the full prompt has, where each token
lies in its image, and how pruned features are handed back. It decides nothing.
"""

import inspect
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .pruned_inputs import count_positions, pad_rows_left


@dataclass(frozen=True)
class Block:
    """Consecutive visual tokens that form a grid, row by row.

    Args:
        height, width (`int`): tokens of content.
        row_newline (`bool`): each row ends in one separator token more.
        separator (`bool`): the block itself is a separator.
    """

    height: int
    width: int
    row_newline: bool = False
    separator: bool = False

    @property
    def num_tokens(self) -> int:
        return self.height * (self.width + self.row_newline)


@dataclass
class TokenLayout:
    """Where each visual token lies. All fields are tensors `[V]`, V tokens in placeholder order.

    Args:
        image (`int64`): index of the image or video in the batch.
        block (`int64`): index of the crop, tile or frame in that image.
        row, column (`int64`): place in the block's grid.
        height, width (`int64`): size of the block's grid.
        protected (`bool`): separator tokens (row ends), which pruning keeps.
    """

    image: Tensor
    block: Tensor
    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor
    protected: Tensor

    def __getitem__(self, index: Tensor) -> "TokenLayout":
        return TokenLayout(**{name: value[index] for name, value in vars(self).items()})

    def positions(self) -> Tensor:
        """Row and column in [0, 1], float `[V, 2]`."""
        row = (self.row + 0.5) / self.height
        column = (self.column + 0.5) / self.width
        return torch.stack([row, column.clamp(max=1.0)], dim=-1)

    @classmethod
    def from_blocks(cls, entries: list[list[Block]]) -> "TokenLayout":
        """Layout of all tokens from the blocks of each image."""
        columns: list[Tensor] = []
        for image, blocks in enumerate(entries):
            for index, block in enumerate(blocks):
                width = block.width + block.row_newline
                row = torch.arange(block.height).repeat_interleave(width)
                column = torch.arange(width).repeat(block.height)
                protected = torch.full_like(row, block.separator) | (column == block.width)
                sizes = [torch.full_like(row, value) for value in (image, index, block.height, block.width)]
                columns.append(torch.stack([sizes[0], sizes[1], row, column, sizes[2], sizes[3], protected.long()]))
        merged = torch.cat(columns, dim=1) if columns else torch.zeros(7, 0, dtype=torch.long)
        return cls(*merged[:6], protected=merged[6].bool())


@dataclass
class EncodedModality:
    """The tokens of all images (or all videos) of a batch, as the LLM would get them.

    Args:
        rows (`[V, D]`): feature row i fills the i-th placeholder of its modality.
        blocks: the grids of each image, in the order of the rows.
        counts (`int64 [B]`): rows of each sample.
        deepstack (`[V, D]` each): rows that go into deeper LLM layers at the same places.
        attention (`float [V]`, *optional*): attention that each token received in the vision tower.
        container: how the base model wants the rows: "list" of `[L, D]`, "list3d" of `[1, L, D]`, or "tensor".
        output_class: the base model's output class.
    """

    rows: Tensor
    blocks: list[list[Block]]
    counts: Tensor
    output_class: type[ModelOutput]
    container: str
    deepstack: list[Tensor] = field(default_factory=list)
    attention: Tensor | None = None

    def entries_of_samples(self) -> list[list[int]]:
        """Indices into `blocks` of the images of each sample."""
        ends = self.counts.cumsum(0).tolist()
        entries: list[list[int]] = [[] for _ in ends]
        position = sample = 0
        for index, blocks in enumerate(self.blocks):
            num_tokens = sum(block.num_tokens for block in blocks)
            while num_tokens and position >= ends[sample]:
                sample += 1
            entries[sample].append(index)
            position += num_tokens
        return entries

    def take(self, samples: list[int]) -> "EncodedModality":
        """The tokens of `samples`, which may repeat."""
        starts = (self.counts.cumsum(0) - self.counts).tolist()
        sizes = self.counts.tolist()
        index = torch.cat([torch.arange(starts[s], starts[s] + sizes[s]) for s in samples] or [torch.arange(0)]).to(
            self.rows.device
        )
        entries = self.entries_of_samples()
        return replace(
            self,
            rows=self.rows[index],
            blocks=[self.blocks[i] for s in samples for i in entries[s]],
            counts=self.counts[samples],
            deepstack=[rows[index] for rows in self.deepstack],
            attention=None if self.attention is None else self.attention[index],
        )


@dataclass
class VisualFeatures:
    """What the vision tower and the projector made of a batch: encode once, prune and answer many times.

    Made by [`TPRLForConditionalGeneration.encode_images`]; passed as `visual_features` to `prune`, `forward` and
    `generate` in place of the pixels.

    Args:
        modalities: "image" and "video" to their tokens; a modality that does not occur is absent.
        geometry: inputs that tell sizes of images (such as `image_grid_thw`), needed for positions.
    """

    modalities: dict[str, EncodedModality]
    geometry: dict[str, Tensor] = field(default_factory=dict)

    def take(self, samples: list[int]) -> "VisualFeatures":
        """Features of `samples` of the batch, which may repeat, e.g. `[0] * 8` to score eight masks of one image."""
        geometry = {}
        for name, values in self.geometry.items():
            modality = self.modalities["video" if "video" in name else "image"]
            entries = modality.entries_of_samples()
            if len(values) != len(modality.blocks):
                raise ValueError(f"{name} has {len(values)} rows for {len(modality.blocks)} encoded entries.")
            geometry[name] = values[[i for s in samples for i in entries[s]]]
        return VisualFeatures({name: m.take(samples) for name, m in self.modalities.items()}, geometry)


class LVLMAdapter:
    """The default adapter: what most families have in common.

    Args:
        base (`PreTrainedModel`): the wrapped LVLM.

    Raises:
        `ValueError`: when the base model does not take `mm_encoder_outputs` or has no image encoder of its own.
    """

    # Added to position ids in a direct forward, where the base model's `generate` adds it itself.
    forward_position_offset = 0
    # Inputs that only serve to compute positions; the gathered positions replace them.
    geometry_names: tuple[str, ...] = (
        "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "image_grid_hws", "image_merge_sizes",
        "video_merge_sizes",
    )  # fmt: skip

    def __init__(self, base: PreTrainedModel):
        self.core = base.base_model
        self.config = base.config
        if "mm_encoder_outputs" not in inspect.signature(base.forward).parameters:
            raise ValueError(
                f"Models of type {base.config.model_type!r} cannot be pruned: their forward does not take "
                f"`mm_encoder_outputs`. Supported are, among others: {', '.join(SUPPORTED)}."
            )
        self.encoders = {}
        self.token_ids = {}
        for modality in ("image", "video"):
            token_id = getattr(base.config, f"{modality}_token_id", None)
            encoder = getattr(self.core, f"get_{modality}_features", None)
            if token_id is not None and encoder is not None:
                self.encoders[modality] = encoder
                self.token_ids[modality] = token_id
        if not self.encoders:
            raise ValueError(
                f"Models of type {base.config.model_type!r} cannot be pruned: they have no placeholder token with an "
                f"encoder (`get_image_features`). Supported are, among others: {', '.join(SUPPORTED)}."
            )

    # ---- encoding ----

    def encoder_inputs(self, modality: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs that the encoder of `modality` takes, by its signature; empty when its pixels are absent."""
        names = inspect.signature(self.encoders[modality]).parameters
        taken = {name: inputs[name] for name in names if inputs.get(name) is not None}
        pixels = [name for name in taken if name.startswith("pixel_values")]
        return taken if pixels else {}

    def consumed_names(self) -> set[str]:
        """Names of inputs that encoding or positions use up, so that the base model must not see them again."""
        names = set(self.geometry_names)
        for encoder in self.encoders.values():
            names.update(inspect.signature(encoder).parameters)
        return names - {"kwargs"}

    def encode(self, input_ids: Tensor, inputs: dict[str, Any]) -> VisualFeatures:
        """Runs the vision tower and the projector on what `inputs` holds.

        Raises:
            `ValueError`: for pixels that are not finite, and when features and placeholders differ in number.
        """
        modalities = {}
        for modality, encoder in self.encoders.items():
            counts = (input_ids == self.token_ids[modality]).sum(1)
            taken = self.encoder_inputs(modality, inputs)
            if not taken:
                if counts.any():
                    raise ValueError(
                        f"The prompt has {int(counts.sum())} {modality} tokens, but no {modality} was passed. Pass "
                        f"the {modality}s' pixel values, or `visual_features`."
                    )
                continue
            for name, value in taken.items():
                if torch.is_tensor(value) and value.is_floating_point() and not value.isfinite().all():
                    bad = value[~value.isfinite()][0].item()
                    raise ValueError(f"{name} holds {bad}: check how the image was read and normalised.")
            modalities[modality] = self.unpack(modality, encoder(**taken, return_dict=True), counts, inputs)
        geometry = {name: inputs[name] for name in self.geometry_names if torch.is_tensor(inputs.get(name))}
        features = VisualFeatures(modalities, geometry)
        self.check(input_ids, features)
        return features

    def unpack(self, modality: str, output: ModelOutput, counts: Tensor, inputs: dict[str, Any]) -> EncodedModality:
        """The base model's encoder output as one tensor of rows."""
        pooled = output["pooler_output"]
        entries = list(pooled)
        if isinstance(pooled, Tensor):
            container = "tensor"
        else:
            container = "list3d" if any(entry.ndim == 3 for entry in entries) else "list"
        lengths = [entry.shape[:-1].numel() for entry in entries]
        layers = output.get("deepstack_features") or []
        deepstack = [torch.cat([rows.flatten(0, -2) for rows in layer]) for layer in layers]
        return EncodedModality(
            rows=torch.cat([entry.flatten(0, -2) for entry in entries]),
            blocks=self.blocks(modality, lengths, inputs),
            counts=counts,
            output_class=type(output),
            container=container,
            deepstack=deepstack,
        )

    def check(self, input_ids: Tensor, features: VisualFeatures) -> None:
        """Raises `ValueError` where the placeholders of a prompt and the features differ in number."""
        for modality, token_id in self.token_ids.items():
            num_tokens = int((input_ids == token_id).sum())
            num_rows = len(features.modalities[modality].rows) if modality in features.modalities else 0
            if num_tokens != num_rows:
                raise ValueError(
                    f"{modality.capitalize()} tokens and {modality} features do not match: tokens: {num_tokens}, "
                    f"features: {num_rows}. Build the prompt and the pixel values in one call of the processor, and "
                    "do not truncate the prompt."
                )

    # ---- layout ----

    def blocks(self, modality: str, lengths: list[int], inputs: dict[str, Any]) -> list[list[Block]]:
        """The grids of each entry of the encoder's output, from what the inputs tell; by default one square."""
        grids = inputs.get(f"{modality}_grid_thw")
        if grids is not None and len(grids) == len(lengths):
            return [grid_blocks(grid, length) for grid, length in zip(grids.tolist(), lengths, strict=True)]
        return [[square_block(length)] for length in lengths]

    # ---- positions ----

    def position_ids(self, input_ids: Tensor, attention_mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Positions of the full prompt, `[B, L]`, or `[R, B, L]` with R axes for multi-axis rotary embeddings."""
        return count_positions(attention_mask)

    def spread_positions(self, positions: Tensor, valid: Tensor) -> Tensor:
        """Text positions `[B, P]` with as many axes as the base model wants."""
        return positions

    def renumber_text_axis(self, positions: Tensor, valid: Tensor) -> Tensor:
        """Positions gathered from the full prompt, with an axis that only counts tokens counted anew."""
        return positions

    def last_position(self, positions: Tensor) -> Tensor:
        """Largest position of the last column, `[B]`."""
        return positions[:, -1]

    def remember_positions(self, next_position: Tensor, num_attended: Tensor) -> None:
        """Lets the base model go on from `next_position [B]` where it counts positions by itself."""

    # ---- handing over ----

    def mm_encoder_outputs(
        self, features: VisualFeatures, keep: dict[str, Tensor], counts: dict[str, Tensor], same_length: bool
    ) -> dict[str, ModelOutput]:
        """Kept features in the form in which the base model takes them.

        Args:
            features: of the unpruned batch.
            keep (`bool [V]` per modality): rows that stay.
            counts (`int64 [B]` per modality): how many stay of each sample.
            same_length (`bool`): give each sample the same number of rows, with zeros before its own. A tensor of all
                samples is the only form of it that `generate` can repeat for beams.
        """
        outputs = {}
        for modality, encoded in features.modalities.items():
            kept, num_kept = keep[modality], counts[modality]
            if not kept.any():
                continue
            fields: dict[str, Any] = {"pooler_output": pack_rows(encoded.rows[kept], num_kept, encoded, same_length)}
            if encoded.deepstack:
                fields["deepstack_features"] = [
                    pack_rows(rows[kept], num_kept, encoded, same_length) for rows in encoded.deepstack
                ]
            outputs[modality] = encoded.output_class(**fields)
        return outputs


class RopeIndexAdapter(LVLMAdapter):
    """Families with multi-axis rotary positions: the base model counts them on the full prompt."""

    # Whether a first axis counts text positions, as the base model's `generate` adds it.
    has_text_axis = True

    def position_ids(self, input_ids: Tensor, attention_mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        names = inspect.signature(self.core.get_rope_index).parameters
        taken = {name: inputs[name] for name in names if inputs.get(name) is not None}
        if "mm_token_type_ids" in names and "mm_token_type_ids" not in taken:
            types = torch.zeros_like(input_ids)
            for index, modality in enumerate(("image", "video"), start=1):
                if modality in self.token_ids:
                    types[input_ids == self.token_ids[modality]] = index
            taken["mm_token_type_ids"] = types
        taken.update(input_ids=input_ids, attention_mask=attention_mask)
        positions, _ = self.core.get_rope_index(**taken)
        if self.has_text_axis:
            positions = torch.cat([count_positions(attention_mask)[None], positions])
        return positions

    def spread_positions(self, positions: Tensor, valid: Tensor) -> Tensor:
        return self.renumber_text_axis(positions.expand(3 + self.has_text_axis, -1, -1), valid)

    def renumber_text_axis(self, positions: Tensor, valid: Tensor) -> Tensor:
        if not self.has_text_axis:
            return positions
        return torch.cat([count_positions(valid)[None], positions[1:]])

    def last_position(self, positions: Tensor) -> Tensor:
        return positions[int(self.has_text_axis) :, :, -1].max(dim=0).values

    def remember_positions(self, next_position: Tensor, num_attended: Tensor) -> None:
        self.core.rope_deltas = (next_position - num_attended)[:, None]


def pack_rows(rows: Tensor, counts: Tensor, encoded: EncodedModality, same_length: bool) -> Any:
    """Rows `[K, D]` in the container that the base model's own encoder returns."""
    if encoded.container == "tensor":
        return pad_rows_left(rows, counts, int(counts.max())) if same_length else rows[None]
    entries = list(rows.split(counts.tolist()))
    return [entry[None] for entry in entries] if encoded.container == "list3d" else entries


def square_block(length: int) -> Block:
    side = math.isqrt(length)
    return Block(side, side) if side * side == length else Block(1, length)


def grid_blocks(grid: list[int], length: int) -> list[Block]:
    """Blocks of an image or video of `grid` = (frames, height, width) patches that became `length` tokens."""
    frames, height, width = grid
    merge = math.isqrt(max(frames * height * width // max(length, 1), 1))
    block = Block(height // merge, width // merge)
    if frames * block.num_tokens != length:
        return [Block(1, length)]
    return [block] * frames


class PaliGemmaAdapter(LVLMAdapter):
    """PaliGemma counts positions from 1; its `generate` adds the 1 itself, its forward does not."""

    forward_position_offset = 1


SUPPORTED = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm",
    "paligemma", "gemma3", "mistral3", "aya_vision",
)  # fmt: skip

# Only families that the default does not serve have an entry.
ADAPTERS: dict[str, type[LVLMAdapter]] = {"paligemma": PaliGemmaAdapter}


def adapter_for(base: PreTrainedModel) -> LVLMAdapter:
    """The adapter of `base`, by its model type and by what it can do."""
    if base.config.model_type in ADAPTERS:
        return ADAPTERS[base.config.model_type](base)
    if hasattr(base.base_model, "get_rope_index"):
        return RopeIndexAdapter(base)
    return LVLMAdapter(base)
