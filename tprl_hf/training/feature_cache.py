"""Visual features of images that were encoded before: one pass through the frozen vision tower for each image."""

import hashlib
import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.visual_features import EncodedModality, VisualFeatures

from .fingerprint import config_digest, fingerprint
from .stored_features import dtype_of, from_file, mapped, num_bytes, to_bytes

logger = logging.get_logger(__name__)

SUFFIX = ".safetensors"
# Of several processes each sees what the others wrote when it has written so large a part of the room itself.
COUNT_AGAIN = 0.02
AN_HOUR = 3600.0  # in which a file is written, even to a slow disk


class FeatureCache:
    """
    Keeps features of the images that come first, until its room is full; what comes later is encoded each time.

    Training visits all images in a new order each epoch. A cache that replaced what was used longest ago would have
    lost each image before its next visit, as soon as the data are larger than the room. Keeping those that came first
    gives a hit rate of room over data.

    It never takes memory of an accelerator. With a directory each image is a file there: written beside and renamed,
    so that a killed run leaves whole files only, and memory-mapped when it is read. Stages, epochs and processes share
    the directory.

    Args:
        max_bytes (`int`): room, in memory or on disk.
        directory (`Path`, *optional*): where features lie; without it in memory.
        dtype (`torch.dtype`, *optional*): of the tokens on disk. By default as the model made them, so that nothing
            changes. A narrower one rounds; tokens are rounded alike before they are first used.
    """

    def __init__(self, max_bytes: int, directory: Path | None = None, dtype: torch.dtype | None = None):
        self.max_bytes = max_bytes
        self.directory = directory
        self.dtype = dtype
        self.entries: dict[str, VisualFeatures] = {}
        self.hits = self.misses = 0
        self.is_full = False
        self.since_counted = 0
        self.used_bytes = self.count()
        self.lock = threading.Lock()

    def count(self) -> int:
        """Bytes that lie in the directory, by whomever they were written, for whatever model."""
        self.since_counted = 0
        if self.directory is None or not self.directory.parent.exists():
            return 0
        for left in self.directory.parent.rglob(f".*{SUFFIX}.*"):  # of runs that were killed
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > AN_HOUR:
                    left.unlink()
        return sum(path.stat().st_size for path in self.directory.parent.rglob(f"*{SUFFIX}"))

    def path(self, key: str) -> Path:
        """Where the features of an image lie, or would."""
        assert self.directory is not None
        return self.directory / key[:2] / f"{key}{SUFFIX}"

    def __contains__(self, key: str) -> bool:
        return key in self.entries if self.directory is None else self.path(key).exists()

    def get(self, key: str) -> VisualFeatures | None:
        """The features under `key`, on the CPU, or `None`."""
        found = self.entries.get(key)
        if self.directory is not None and self.path(key).exists():
            try:
                found = from_file(self.path(key))
            except (SafetensorError, ValueError, KeyError) as error:  # of a machine that lost its power
                logger.warning(f"{self.path(key)} is damaged ({error}): the image is encoded again.")
                self.path(key).unlink(missing_ok=True)
        self.hits += found is not None
        self.misses += found is None
        return found

    def rounded(self, features: VisualFeatures) -> VisualFeatures:
        """
        Features as they come back from the cache.

        Raises:
            `ValueError`: where `float16` cannot hold them.
        """
        if self.dtype is None:
            return features
        own_dtype = dtype_of(features)
        found = mapped(features, lambda rows: rows.to(self.dtype).to(own_dtype))
        if not all(rows.isfinite().all() for one in found.modalities.values() for rows in (one.rows, *one.deepstack)):
            raise ValueError(
                f"Tokens of this model do not fit into {self.dtype}: set feature_cache_dtype to bfloat16, which has "
                "the range of float32."
            )
        return found

    def add(self, key: str, features: VisualFeatures) -> None:
        """Takes features on the CPU that [`rounded`] gave, while there is room."""
        with self.lock:
            if self.is_full or key in self:
                return
            content = None if self.directory is None else to_bytes(features, self.dtype)
            size = num_bytes(features) if content is None else len(content)
            if self.directory is not None and self.since_counted > COUNT_AGAIN * self.max_bytes:
                self.used_bytes = self.count()
            if self.used_bytes + size > self.max_bytes:
                self.is_full = True
                logger.info(
                    f"The feature cache is full with {self.used_bytes / 2**20:.0f} MiB: later images stay out."
                )
                return
            self.used_bytes += size
            self.since_counted += size
            if content is None:
                self.entries[key] = features
            else:
                write_whole(self.path(key), content)

    def read_ahead(self, key: str) -> None:
        """Lets the operating system have the features in memory before they are used."""
        if self.directory is not None and self.path(key).exists():
            self.path(key).read_bytes()


def cache_of(
    model: TPRLForConditionalGeneration, processor: Any, room: int, directory: str | None, dtype: str | None
) -> FeatureCache:
    """
    The cache of a model's features.

    Args:
        room (`int`): MiB.
        directory (`str`, *optional*): of the caches of all models; without it features lie in memory.
        dtype (`str`, *optional*): that of tokens on disk.
    """
    if directory is None:
        return FeatureCache(room * 2**20)
    # features follow from the weights, the precision in which they are used, and how images are processed
    how = json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str)
    about = f"{fingerprint(model.lvlm)} {config_digest(model)} {dtype} {how}"
    name = hashlib.sha256(about.encode()).hexdigest()[:16]
    return FeatureCache(room * 2**20, Path(directory) / name, None if dtype is None else getattr(torch, dtype))


def write_whole(path: Path, content: bytes) -> None:
    """
    Writes a file beside `path` and renames it.

    Raises:
        `OSError`: where the disk is full, with what to do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(
            f"{path.parent.parent} could not be written ({error}): lower feature_cache_mb, or make room and resume."
        ) from error


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
