"""Visual features as bytes: a safetensors file that is memory-mapped when it is read."""

import json
from dataclasses import astuple, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.utils import ModelOutput

from tprl_hf.modeling.token_layout import Block
from tprl_hf.modeling.visual_features import EncodedModality, VisualFeatures


def mapped(features: VisualFeatures, change: Any) -> VisualFeatures:
    """The same features with `change` done to each tensor `[V, D]` of tokens."""
    modalities = {
        name: replace(one, rows=change(one.rows), deepstack=[change(rows) for rows in one.deepstack])
        for name, one in features.modalities.items()
    }
    return VisualFeatures(modalities, features.geometry)


def moved(features: VisualFeatures, device: torch.device) -> VisualFeatures:
    """The same features on `device`; the counts of samples stay where they are."""
    found = mapped(features, lambda rows: rows.to(device))
    for one in found.modalities.values():
        one.attention = None if one.attention is None else one.attention.to(device)
        one.extra = {name: value.to(device) if torch.is_tensor(value) else value for name, value in one.extra.items()}
    return VisualFeatures(found.modalities, {name: value.to(device) for name, value in features.geometry.items()})


def num_bytes(features: VisualFeatures) -> int:
    """Memory that the tokens of `features` take."""
    tensors = [rows for m in features.modalities.values() for rows in (m.rows, *m.deepstack)]
    return sum(rows.numel() * rows.element_size() for rows in tensors)


def dtype_of(features: VisualFeatures) -> torch.dtype:
    """That of the tokens; float32 without any."""
    return next((one.rows.dtype for one in features.modalities.values()), torch.float32)


def to_bytes(features: VisualFeatures, dtype: torch.dtype | None = None) -> bytes:
    """
    A safetensors file of features on the CPU, whose tokens are `dtype` there.

    Raises:
        `ValueError`: where an encoder returned something besides tensors and plain values.
    """
    own_dtype = dtype_of(features)
    features = features if dtype is None else mapped(features, lambda rows: rows.to(dtype))
    tensors: dict[str, Tensor] = {f"geometry.{name}": value for name, value in features.geometry.items()}
    described = {}
    for name, one in features.modalities.items():
        tensors |= {f"{name}.rows": one.rows, f"{name}.counts": one.counts}
        tensors |= {f"{name}.deepstack.{layer}": rows for layer, rows in enumerate(one.deepstack)}
        tensors |= {f"{name}.extra.{key}": value for key, value in one.extra.items() if torch.is_tensor(value)}
        if one.attention is not None:
            tensors[f"{name}.attention"] = one.attention
        described[name] = {
            "blocks": [[astuple(block) for block in blocks] for blocks in one.blocks],
            "output_class": [one.output_class.__module__, one.output_class.__qualname__],
            "container": one.container,
            "num_deepstack": len(one.deepstack),
            "extra": {key: value for key, value in one.extra.items() if not torch.is_tensor(value)},
        }
    try:
        text = json.dumps({"dtype": str(own_dtype).removeprefix("torch."), "modalities": described})
    except TypeError as error:
        raise ValueError(f"Features of this model cannot be kept on disk ({error}): leave out cache_dir.") from error
    return save({name: value.contiguous() for name, value in tensors.items()}, {"features": text})


def from_file(path: Path) -> VisualFeatures:
    """
    What [`to_bytes`] wrote, in the dtype that the tokens had before. They are read from disk where they are used.

    Raises:
        `SafetensorError`, `ValueError`: for a file that is not whole, or is another one.
    """
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        described = json.loads((file.metadata() or {})["features"])
    modalities = {}
    for name, one in described["modalities"].items():
        extra = {
            key.removeprefix(f"{name}.extra."): value for key, value in tensors.items() if f"{name}.extra." in key
        }
        modalities[name] = EncodedModality(
            rows=tensors[f"{name}.rows"],
            blocks=[[Block(*block) for block in blocks] for blocks in one["blocks"]],
            counts=tensors[f"{name}.counts"],
            output_class=output_class(*one["output_class"]),
            container=one["container"],
            deepstack=[tensors[f"{name}.deepstack.{layer}"] for layer in range(one["num_deepstack"])],
            extra={**one["extra"], **extra},
            attention=tensors.get(f"{name}.attention"),
        )
    start = "geometry."
    geometry = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
    own_dtype = getattr(torch, described["dtype"])
    return mapped(VisualFeatures(modalities, geometry), lambda rows: rows.to(own_dtype))


def output_class(module: str, name: str) -> type[ModelOutput]:
    """An output class of transformers; a file cannot name any other."""
    found = getattr(import_module(module), name, None) if module.startswith("transformers.") else None
    if not (isinstance(found, type) and issubclass(found, ModelOutput)):
        raise ValueError(f"{module}.{name} is not an output class of transformers.")
    return found
