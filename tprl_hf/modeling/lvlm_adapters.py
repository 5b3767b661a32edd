"""What differs between LVLM families. The default serves all that take `mm_encoder_outputs`; few need more.

An adapter knows how to encode images and videos with the base model's own `get_image_features` and
`get_video_features`, where the placeholders of their tokens are, which positions the full prompt has, where each token
lies in its image, and how pruned features are handed back. It decides nothing.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from .columns import count_positions, find_visual, pad_rows_left, run_lengths
from .token_layout import Block, grid_blocks, join_tiles, sized_block, square_block
from .values import wrong
from .vision_attention import (
    ObservedLayer,
    choose_layer,
    lay_over_blocks,
    merged_side,
    observed_tower,
    received_by_patches,
)
from .visual_features import EncodedModality, VisualFeatures

logger = logging.get_logger(__name__)


# Inputs that tell heights and widths, in whatever unit.
SIZE_NAMES = ("target_sizes", "spatial_shapes", "image_grid_hw")
# The argument of base models that hands over what their encoders have made already.
HANDED = "mm_encoder_outputs"
# An argument of towers with a fixed grid: the positions of the patches are interpolated for pictures of another size.
INTERPOLATE = "interpolate_pos_encoding"
# What encoders return besides what belongs to a family alone.
ENCODER_FIELDS = ("last_hidden_state", "pooler_output", "hidden_states", "attentions", "deepstack_features")


class LVLMAdapter:
    """The default adapter: what most families have in common.

    Args:
        base (`PreTrainedModel`): the wrapped LVLM.
    """

    # Whether the base model respects the positions it is passed, gaps included.
    keeps_positions = True
    # Field of the encoder's output that holds the rows.
    output_field = "pooler_output"
    # Whether the base model takes what the LLM sees, so that rows can be changed. Otherwise it projects them itself.
    takes_projected = True
    # Where the tower has its [CLS] token, if it has one: 0 before the patches, -1 behind them.
    class_token = 0
    # Whether the base model puts images and videos on the same tokens, so that it takes them in one output.
    hands_over_as_one = False
    # Whether the tower's patches come row by row also where an `image_grid_thw` counts them, not token by token.
    patches_row_by_row = False
    # Whether a first axis of the positions counts text, gaps closed, as the base model's `generate` adds it.
    has_text_axis = False
    # Added to position ids in a direct forward, where the base model's `generate` adds it itself.
    forward_position_offset = 0
    # Type of answer tokens in `token_type_ids`, for training on reference answers.
    answer_token_type = 0
    # Inputs that only serve to compute positions; the gathered positions replace them.
    geometry_names: tuple[str, ...] = (
        "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "image_grid_hws", "image_merge_sizes",
        "video_merge_sizes",
    )  # fmt: skip

    def __init__(self, base: PreTrainedModel):
        self.base = base
        self.core = base.base_model
        self.config = base.config
        self.encoder_names: dict[str, list[str]] = {}  # inputs of each modality's
        for modality in self.own_token_ids():
            encoder = getattr(self.core, f"get_{modality}_features")
            names = [name for name in inspect.signature(encoder).parameters if name != "kwargs"]
            # the encoder hands such on to the tower
            self.encoder_names[modality] = [*names, *(self.smaller_picture_options.keys() - set(names))]

    def own_token_ids(self) -> dict[str, int]:
        """The placeholder of each modality that has an encoder and a placeholder of its own."""
        token_ids: dict[str, int] = {}
        for modality in ("image", "video"):
            token_id = getattr(self.config, f"{modality}_token_id", None)
            if token_id in token_ids.values():  # shared: what it stands for could not be told
                continue
            if token_id is not None and hasattr(self.core, f"get_{modality}_features"):
                token_ids[modality] = token_id
        return token_ids

    @property
    def token_ids(self) -> dict[str, int]:
        """The placeholder of each modality, as the config says now: it may have been edited."""
        return self.own_token_ids()

    @property
    def smaller_picture_options(self) -> dict[str, bool]:
        """What a tower with a fixed grid is to be passed along with pictures of another size."""
        parts = self.core.children()
        return (
            {INTERPOLATE: True} if any(INTERPOLATE in inspect.signature(p.forward).parameters for p in parts) else {}
        )

    def find_visual(self, input_ids: Tensor) -> Tensor:
        """Placeholders of images and videos, `bool` of the shape of `input_ids`."""
        return find_visual(input_ids, list(self.token_ids.values()))

    def placeholders(self, modality: str, input_ids: Tensor) -> Tensor:
        """Those of one modality, `bool` of the shape of `input_ids [B, L]`."""
        return input_ids == self.token_ids[modality]

    # ---- encoding ----

    def encoder_inputs(self, modality: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs that the encoder of `modality` takes, by its signature; empty when its pixels are absent."""
        taken = {name: inputs[name] for name in self.encoder_names[modality] if inputs.get(name) is not None}
        pixels = [name for name in taken if name.startswith("pixel_values")]
        return taken if pixels else {}

    def has_pixels(self, inputs: dict[str, Any]) -> bool:
        """Whether `inputs` hold an image or a video."""
        return any(self.encoder_inputs(modality, inputs) for modality in self.encoder_names)

    def consumed_names(self) -> set[str]:
        """Names of inputs that encoding or positions use up, so that the base model must not see them again."""
        return set(self.geometry_names).union(*self.encoder_names.values())

    def encode(self, input_ids: Tensor, inputs: dict[str, Any], with_attention: bool = False) -> VisualFeatures:
        """Runs the vision tower and the projector on what `inputs` holds.

        Args:
            input_ids (`int64 [B, L]`): prompts, whose placeholders are counted.
            inputs: what the processor returned.
            with_attention (`bool`): also note how much attention each token received in the tower, which then runs
                with eager attention.

        Raises:
            `ValueError`: for pixels that are not finite, when features and placeholders differ in number, and when
                attention is wanted and cannot be read.
        """
        input_ids = input_ids.cpu()  # see `PromptBatch`
        modalities = {}
        for modality in self.encoder_names:
            encoded = self.encode_modality(modality, input_ids, inputs, with_attention)
            if encoded is not None:
                modalities[modality] = encoded
        sizes = {name: inputs[name] for name in self.geometry_names if inputs.get(name) is not None}
        # seconds may come as a list
        geometry = {n: v if torch.is_tensor(v) else torch.tensor(v, device="cpu") for n, v in sizes.items()}
        features = VisualFeatures(modalities, geometry)
        self.check(input_ids, features)
        return features

    def encode_modality(
        self, modality: str, input_ids: Tensor, inputs: dict[str, Any], with_attention: bool
    ) -> EncodedModality | None:
        """The images or the videos of [`encode`]; `None` where `inputs` holds none."""
        placeholders = self.placeholders(modality, input_ids)
        counts = placeholders.sum(1)
        taken = self.encoder_inputs(modality, inputs)
        if not taken and counts.any():
            raise ValueError(
                f"The prompt has {int(counts.sum())} {modality} tokens, but no {modality} was passed. Pass "
                f"the {modality}s' pixel values, or `visual_features`."
            )
        if not taken:
            return None
        refuse_other_pixels(taken)
        notes: AbstractContextManager[tuple[Any, list[ObservedLayer]]] = nullcontext((self.core, []))
        if with_attention:
            notes = observed_tower(self.base)
        with notes as (core, layers):
            output = getattr(core, f"get_{modality}_features")(**taken, return_dict=True)
        encoded = self.unpack(modality, output, counts, inputs)
        if with_attention:
            layer = choose_layer(layers, self.feature_layer, self.config.model_type)
            encoded.attention = self.received_attention(modality, layer, encoded, inputs)
        if encoded.container == "tensor":  # of tiles, whose images only the prompt tells apart
            encoded.blocks = join_tiles(encoded.blocks, run_lengths(placeholders))
        return encoded

    def unpack(self, modality: str, output: ModelOutput, counts: Tensor, inputs: dict[str, Any]) -> EncodedModality:
        """The base model's encoder output as one tensor of rows."""
        pooled = output.get(self.output_field)
        layers = output.get("deepstack_features") or []
        if pooled is None or any(not isinstance(rows, Tensor) for layer in layers for rows in layer):
            raise ValueError(
                f"The {modality} encoder of {self.config.model_type!r} returns features in a form that no adapter "
                "knows. docs/families.md lists the supported families, and says how to add one."
            )
        entries = list(pooled)
        if isinstance(pooled, Tensor):
            container = "tensor"
        else:
            container = "list3d" if any(entry.ndim == 3 for entry in entries) else "list"
        deepstack = [torch.cat([rows.flatten(0, -2) for rows in layer]) for layer in layers]
        return EncodedModality(
            rows=torch.cat([entry.flatten(0, -2) for entry in entries]),
            blocks=self.blocks(modality, entries, inputs),
            counts=counts,
            output_class=type(output),
            container=container,
            deepstack=deepstack,
            extra={name: value for name, value in output.items() if name not in ENCODER_FIELDS},
        )

    @property
    def feature_layer(self) -> int:
        """Index into the tower's hidden states of what the LLM gets; of several, the last layer."""
        layer = getattr(self.config, "vision_feature_layer", None)
        return layer if isinstance(layer, int) else -1

    def received_attention(
        self, modality: str, layer: ObservedLayer, encoded: EncodedModality, inputs: dict[str, Any]
    ) -> Tensor:
        """Attention that each token received in the tower layer whose features the LLM gets, float `[V]`."""
        blocks = [block for entry in encoded.blocks for block in entry]
        num_tokens = sum(block.height * block.width for block in blocks if not block.separator)
        patches = received_by_patches(layer, self.valid_patches(modality, inputs), num_tokens, self.class_token)
        side = merged_side(len(patches), num_tokens)
        merged = f"{modality}_grid_thw" in inputs and not self.patches_row_by_row
        if side:
            patches = self.row_by_row(patches, blocks, side)
        return lay_over_blocks(patches, blocks, merged, self.config.model_type)

    def row_by_row(self, patches: Tensor, blocks: list[Block], side: int) -> Tensor:
        """`patches [P]` of a tower that has them in an order of its own; each token stands for `side` by `side`."""
        return patches

    def valid_patches(self, modality: str, inputs: dict[str, Any]) -> Tensor | None:
        """Which patches are not padding, `bool [tiles, patches]`, where the tower is handed padding."""
        mask = inputs.get("pixel_attention_mask")
        return None if mask is None else mask.bool()

    def check(self, input_ids: Tensor, features: VisualFeatures) -> None:
        """Raises `ValueError` where the placeholders of a prompt and the features differ in number."""
        for modality in self.token_ids:
            num_tokens = int(self.placeholders(modality, input_ids).sum())
            num_rows = len(features.modalities[modality].rows) if modality in features.modalities else 0
            if num_tokens != num_rows:
                raise ValueError(
                    f"{modality.capitalize()} tokens and {modality} features do not match: tokens: {num_tokens}, "
                    f"features: {num_rows}. Build the prompt and the pixel values in one call of the processor, and "
                    "do not truncate the prompt."
                )

    # ---- layout ----

    def blocks(self, modality: str, entries: list[Tensor], inputs: dict[str, Any]) -> list[list[Block]]:
        """The grids of each entry, `[L, D]` or `[frames, L, D]`, of the encoder's output, as the inputs tell sizes.

        Without any size, an entry is a square where that is possible.
        """
        grids = inputs.get(f"{modality}_grid_thw")
        if grids is not None and len(grids) == len(entries):
            return [grid_blocks(g, e.shape[:-1].numel()) for g, e in zip(grids.tolist(), entries, strict=True)]
        names = SIZE_NAMES if modality == "image" else [f"{name}_videos" for name in SIZE_NAMES]
        sizes = next((inputs[n] for n in (f"{modality}_sizes", *names) if inputs.get(n) is not None), None)
        if sizes is not None and len(sizes) == len(entries):
            return [[sized_block(s, e.shape[:-1].numel())] for s, e in zip(sizes.tolist(), entries, strict=True)]
        return [[square_block(e.shape[-2])] * e.shape[:-2].numel() for e in entries]

    # ---- positions ----

    def position_ids(self, input_ids: Tensor, attention_mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Positions of the full prompt, `[B, L]`, or `[R, B, L]` with R axes for multi-axis rotary embeddings.

        Ids, mask and positions lie on the CPU.
        """
        return count_positions(attention_mask)

    def forward_positions(self, attention_mask: Tensor) -> Tensor | None:
        """
        Positions that a direct forward of the base model counts where a caller gives none, `[B, L]`: those of columns,
        hidden ones too. `None` where they are those of [`position_ids`].
        """
        return torch.arange(attention_mask.shape[1], device="cpu").expand(attention_mask.shape)

    def complete_positions(self, positions: Tensor, attention_mask: Tensor) -> Tensor:
        """Positions of the full prompt that a caller passed, in the form of [`position_ids`].

        Raises:
            `ValueError`: for another shape than the base model takes.
        """
        if (
            positions.ndim != 2
            or positions.shape[1] != attention_mask.shape[1]
            or len(positions)
            not in (
                1,
                len(attention_mask),
            )
        ):
            raise ValueError(
                f"position_ids must have the shape of input_ids, {tuple(attention_mask.shape)}; got "
                f"{tuple(positions.shape)}."
            )
        return positions.expand(len(attention_mask), -1)

    def knows_positions(self, inputs: dict[str, Any]) -> bool:
        """Whether `inputs` have what positions of visual tokens depend on."""
        return True

    def spread_positions(self, positions: Tensor, valid: Tensor) -> Tensor:
        """Text positions `[B, P]` with as many axes as the base model wants."""
        return positions

    def renumber_text_axis(self, positions: Tensor, valid: Tensor) -> Tensor:
        """Positions gathered from the full prompt, with an axis that only counts tokens counted anew."""
        return positions

    def largest_positions(self, positions: Tensor) -> Tensor:
        """The largest of each column's axes but the one that counts text, `[B, P]`."""
        return positions

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
            if not kept.any() and not encoded.extra:
                continue
            fields: dict[str, Any] = {
                **encoded.extra,
                self.output_field: pack_rows(encoded.rows[kept], num_kept, encoded, same_length),
            }
            if encoded.deepstack:
                fields["deepstack_features"] = [
                    pack_rows(rows[kept], num_kept, encoded, same_length) for rows in encoded.deepstack
                ]
            outputs[modality] = encoded.output_class(**fields)
        return outputs


class RopeIndexAdapter(LVLMAdapter):
    """Families with multi-axis rotary positions: the base model counts them on the full prompt."""

    has_text_axis = True

    def forward_positions(self, attention_mask: Tensor) -> Tensor | None:
        return None

    def position_ids(self, input_ids: Tensor, attention_mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        names = inspect.signature(self.core.get_rope_index).parameters
        taken = {name: inputs[name] for name in names if inputs.get(name) is not None}
        taken = {name: value.cpu() if torch.is_tensor(value) else value for name, value in taken.items()}
        if "mm_token_type_ids" in names and "mm_token_type_ids" not in taken:
            types = torch.zeros_like(input_ids)
            for index, modality in enumerate(("image", "video"), start=1):
                if modality in self.token_ids:
                    types[self.placeholders(modality, input_ids)] = index
            taken["mm_token_type_ids"] = types
        taken.update(input_ids=input_ids, attention_mask=attention_mask)
        positions, _ = self.core.get_rope_index(**taken)
        if self.has_text_axis:
            positions = torch.cat([count_positions(attention_mask)[None], positions])
        return positions

    def complete_positions(self, positions: Tensor, attention_mask: Tensor) -> Tensor:
        if positions.ndim == 2:  # the same on all axes
            positions = super().complete_positions(positions, attention_mask)
            return positions.expand(3 + self.has_text_axis, -1, -1)
        num_axes, *shape = positions.shape
        if num_axes not in (3, 3 + self.has_text_axis) or shape != list(attention_mask.shape):
            raise ValueError(
                f"position_ids must have the shape of input_ids, {tuple(attention_mask.shape)}, or that with 3 axes "
                f"before it{' (4 with one that counts text)' if self.has_text_axis else ''}; got "
                f"{tuple(positions.shape)}."
            )
        if num_axes == 3 and self.has_text_axis:
            return torch.cat([count_positions(attention_mask)[None].to(positions.device), positions])
        return positions

    def knows_positions(self, inputs: dict[str, Any]) -> bool:
        return any(inputs.get(name) is not None for name in (*self.geometry_names, *SIZE_NAMES))

    def spread_positions(self, positions: Tensor, valid: Tensor) -> Tensor:
        return self.renumber_text_axis(positions.expand(3 + self.has_text_axis, -1, -1), valid)

    def renumber_text_axis(self, positions: Tensor, valid: Tensor) -> Tensor:
        if not self.has_text_axis:
            return positions
        return torch.cat([count_positions(valid)[None], positions[1:]])

    def largest_positions(self, positions: Tensor) -> Tensor:
        return positions[int(self.has_text_axis) :].amax(0)


def refuse_other_pixels(inputs: dict[str, Any]) -> None:
    """Raises `ValueError` for pixels that are not tensors of floats, and where an input has a NaN or an infinity."""
    for name, value in inputs.items():
        each = value if isinstance(value, (list, tuple)) and value else [value]
        if name.startswith("pixel_values") and not all(is_float(one) for one in each):
            what = "a tensor of floats, as the processor returns it with return_tensors='pt'"
            raise wrong(name, value, what)
        if torch.is_tensor(value) and value.is_floating_point() and not value.isfinite().all():
            bad = value[~value.isfinite()][0].item()
            raise ValueError(f"{name} holds {bad}: check how the image was read and normalised.")


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def pack_rows(rows: Tensor, counts: Tensor, encoded: EncodedModality, same_length: bool) -> Any:
    """Rows `[K, D]` in the container that the base model's own encoder returns."""
    if encoded.container == "tensor":
        return pad_rows_left(rows, counts, int(counts.max()))[0] if same_length else rows[None]
    entries = list(rows.split(counts.tolist()))
    return [entry[None] for entry in entries] if encoded.container == "list3d" else entries
