"""Whether a base model's weights are still those of the checkpoint that it is named after.

Tensors are compared by shape and checksum, and by the end of their names: families name them otherwise in their files
than in memory. Files are read once, a tensor at a time; a model is compared where it lies.
"""

import functools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import get_checkpoint_shard_files

from .checkpoint_checks import cached, find_base, refuse_endless
from .configuration_tprl import TPRLConfig

ROW = 64  # words of 8 bytes whose sum is weighted by where it lies
# Classes of base models whose tensors are in files as they are in memory, as far as is known by now.
only_renamed: set[type] = set()
ADAPTER_MARKS = (".lora_", ".base_layer.", ".original_module.", ".modules_to_save.", ".token_adapter.")
Digest = tuple[tuple[int, ...], torch.dtype, int]
Held = Mapping[str, frozenset[Digest]]


def checksum(tensor: Tensor) -> int:
    """Of all bits of a tensor, by integers: the same on each device and for any number of threads."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    raw = flat.view(torch.uint8)
    whole = len(raw) // (8 * ROW) * (8 * ROW)
    sums = torch.cat([raw[:whole].view(torch.int64).view(-1, ROW).sum(1), raw[whole:].long()])
    place = torch.arange(1, len(sums) + 1, device=sums.device)
    return int((sums * (2654435761 * place + 1)).sum())


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor, or the tensors within one that quantisation made."""
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor.data
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from parts(getattr(tensor, name))


def digest(tensor: Tensor) -> tuple[Digest, ...]:
    return tuple((tuple(part.shape), part.dtype, checksum(part)) for part in parts(tensor))


def digests(state: dict[str, Tensor]) -> dict[str, tuple[Digest, ...]]:
    """What tells whether a weight was changed, by its name."""
    return {name: digest(value) for name, value in state.items()}


def weight_files(name: str | None, revision: str | None, cache_dir: Any = None) -> list[str]:
    """The local weight files of a base model; empty when they are not on this machine."""
    hub_kwargs: dict[str, Any] = {"revision": revision, "local_files_only": True, "cache_dir": cache_dir}
    try:
        if name is None or cached(name, CONFIG_NAME, hub_kwargs) is None:
            return []
        refuse_endless(name, hub_kwargs)
        config, _ = PreTrainedConfig.get_config_dict(name, **hub_kwargs)
        if config.get("model_type") == TPRLConfig.model_type and config.get("includes_base_model") is False:
            ours = TPRLConfig.from_pretrained(name, **hub_kwargs)
            return weight_files(find_base(ours, name), ours.base_model_revision, cache_dir)
        single = cached(name, SAFE_WEIGHTS_NAME, hub_kwargs)
        if single is not None:
            return [single]
        index = cached(name, SAFE_WEIGHTS_INDEX_NAME, hub_kwargs)
        return [] if index is None else get_checkpoint_shard_files(name, index, **hub_kwargs)[0]
    except OSError:  # a directory that is gone, a name that is in no cache, policies that name each other
        return []


@functools.lru_cache(maxsize=4)
def _digests_of_files(files: tuple[tuple[str, int, int], ...], dtypes: frozenset[torch.dtype]) -> Held:
    found: dict[str, frozenset[Digest]] = {}
    for path, *_ in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                value = file.get_tensor(name)
                casts = dtypes if value.is_floating_point() else {value.dtype}
                found[name] = frozenset(digest(value.to(dtype))[0] for dtype in casts)
    return found


def held_by_files(files: Iterable[str | os.PathLike], dtypes: Iterable[torch.dtype]) -> Held:
    """Digests of all tensors of some safetensors files by name, floating ones cast to each of `dtypes`."""
    stats = [(str(path), os.stat(path)) for path in files]
    known = tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)
    return _digests_of_files(known, frozenset(dtypes))


def not_held(found: Mapping[str, Iterable[Digest]], held: Held) -> list[str]:
    """Names of tensors that `held` has not at their place, or has nowhere where it has no such place."""
    anywhere: frozenset[Digest] = frozenset().union(*held.values())
    places: dict[str, frozenset[Digest]] = {}
    for name, values in held.items():
        places[place_of(name)] = places.get(place_of(name), frozenset()) | values
    return [name for name, values in found.items() if not places.get(place_of(name), anywhere).issuperset(values)]


def place_of(name: str) -> str:
    """
    The end of a weight's name that says which layer it is of; what is before it differs between files and memory.

    Example:

    ```python
    >>> place_of("language_model.model.layers.0.mlp.up_proj.weight"), place_of("model.lm_head.weight")
    ('layers.0.mlp.up_proj.weight', 'lm_head.weight')
    ```
    """
    parts = name.split(".")
    numbers = [number for number, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[max(numbers[0] - 1, 0) :] if numbers else parts[-2:])


def changed_weights(base: PreTrainedModel, state: dict[str, Tensor], files: list[str]) -> list[str]:
    """
    Names of the base model's weights that its files do not hold.

    Args:
        base: the base model.
        state: its weights, which may have been gathered from several processes.
        files: where they came from.
    """
    dtypes = frozenset(value.dtype for value in state.values() if value.is_floating_point())
    held = held_by_files(files, dtypes)
    found = digests(state)
    changed = not_held(found, held)
    anywhere: frozenset[Digest] = frozenset().union(*held.values())
    is_new = not all(anywhere.issuperset(found[name]) for name in changed)
    if not changed or (is_new and type(base) in only_renamed):
        return changed
    # Some families cut or turn tensors when they are read, such as experts: compared is what they would write.
    with tempfile.TemporaryDirectory() as scratch:
        base.save_pretrained(scratch, state_dict=dict(state))
        written = held_by_files(Path(scratch).glob("*.safetensors"), dtypes)
    if not not_held(written, held):
        return []
    if not not_held(written, {"": frozenset(value for values in found.values() for value in values)}):
        only_renamed.add(type(base))
    return changed


def refuse_what_no_checkpoint_holds(base: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Raises `ValueError` for weights that `from_pretrained` would not bring back.

    Args:
        base: the base model.
        state: its weights.
    """
    with torch.device("meta"):
        made = AutoModelForImageTextToText.from_config(base.config)
    expected = {name: value.shape for name, value in made.state_dict().items()}
    found = {name: value.shape for name, value in state.items()}
    strange = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if strange:
        raise ValueError(
            f"{len(strange)} weights of the base model are not those that its config describes (such as "
            f"{', '.join(strange[:3])}), so that from_pretrained would not bring them back: change model.lvlm.config "
            "with them, or save model.lvlm.state_dict() yourself."
        )


def refuse_quantised(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a wrapped base model that is quantised."""
    if is_quantised(model):
        raise ValueError(
            "The base model is quantised, and a checkpoint that holds it could not be loaded. Save adapters with "
            "PeftModel.save_pretrained, or call model.dequantize() first."
        )


def refuse_adapters(names: Iterable[str]) -> None:
    """Raises `ValueError` where weights of these names are adapters of PEFT, which no checkpoint would bring back."""
    found = sorted(name for name in names if any(mark in f".{name}" for mark in ADAPTER_MARKS))
    if found:
        raise ValueError(
            f"The model holds {len(found)} weights of adapters (such as {found[0]}), which from_pretrained would not "
            "bring back: save them with save_pretrained of the PeftModel that get_peft_model gives, or merge them "
            "first with its merge_and_unload()."
        )


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether an LVLM, wrapped or not, is quantised."""
    return any(hasattr(module.config, "quantization_config") for module in (model, getattr(model, "lvlm", model)))
