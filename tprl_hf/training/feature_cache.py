"""Visual features of images that were encoded before: one pass through the frozen vision tower for each image."""

from collections import OrderedDict
from collections.abc import Callable

import torch

from tprl_hf.modeling.visual_features import EncodedModality, VisualFeatures


def num_bytes(features: VisualFeatures) -> int:
    """Memory that the tokens of `features` take."""
    tensors = [rows for m in features.modalities.values() for rows in (m.rows, *m.deepstack)]
    return sum(rows.numel() * rows.element_size() for rows in tensors)


class FeatureCache:
    """Keeps the most recently used features within a bound.

    Args:
        max_bytes (`int`): room for tokens; what was not used for longest goes first.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.entries: OrderedDict[str, VisualFeatures] = OrderedDict()

    def get(self, key: str, encode: Callable[[], VisualFeatures]) -> VisualFeatures:
        """The features stored under `key`, or those that `encode` makes."""
        if key in self.entries:
            self.entries.move_to_end(key)
            return self.entries[key]
        features = encode()
        self.entries[key] = features
        self.used_bytes += num_bytes(features)
        while self.used_bytes > self.max_bytes and len(self.entries) > 1:
            _, oldest = self.entries.popitem(last=False)
            self.used_bytes -= num_bytes(oldest)
        return features


def join_features(parts: list[VisualFeatures]) -> VisualFeatures:
    """Features of single samples as those of one batch; a part may hold no image."""
    modalities = {}
    for name in dict.fromkeys(name for part in parts for name in part.modalities):
        encoded = [part.modalities.get(name) for part in parts]
        present = [one for one in encoded if one is not None]
        first = present[0]
        zero = torch.zeros(1, dtype=first.counts.dtype, device=first.counts.device)
        attention = [one.attention for one in present if one.attention is not None]
        modalities[name] = EncodedModality(
            rows=torch.cat([one.rows for one in present]),
            blocks=[blocks for one in present for blocks in one.blocks],
            counts=torch.cat([zero if one is None else one.counts for one in encoded]),
            output_class=first.output_class,
            container=first.container,
            deepstack=[torch.cat(layer) for layer in zip(*(one.deepstack for one in present), strict=True)],
            extra=first.extra,
            attention=torch.cat(attention) if len(attention) == len(present) else None,
        )
    names = dict.fromkeys(name for part in parts for name in part.geometry)
    geometry = {name: torch.cat([part.geometry[name] for part in parts if name in part.geometry]) for name in names}
    return VisualFeatures(modalities, geometry)
