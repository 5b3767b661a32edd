"""What the vision tower and the projector made of a batch, ready to be cached and reused."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .token_layout import Block


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
        extra: further fields of the encoder's output that belong to no token, handed back as they are.
    """

    rows: Tensor
    blocks: list[list[Block]]
    counts: Tensor
    output_class: type[ModelOutput]
    container: str
    deepstack: list[Tensor] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
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
        rows = [row for sample in samples for row in range(starts[sample], starts[sample] + sizes[sample])]
        index = torch.tensor(rows, dtype=torch.long, device=self.rows.device)
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
            is_of_videos = "video" in name or name.startswith("second_per_grid")
            modality = self.modalities["video" if is_of_videos else "image"]
            entries = modality.entries_of_samples()
            if len(values) != len(modality.blocks):
                raise ValueError(f"{name} has {len(values)} rows for {len(modality.blocks)} encoded entries.")
            geometry[name] = values[[i for s in samples for i in entries[s]]]
        return VisualFeatures({name: m.take(samples) for name, m in self.modalities.items()}, geometry)
