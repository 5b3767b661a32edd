"""Reading and writing of checkpoints: the policy alone with the name of its base, or everything in one place."""

import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

POLICY_PREFIXES = ("autoencoder.", "policy.")


def policy_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are ours: autoencoder and policy."""
    return {name: value for name, value in model.state_dict().items() if name.startswith(POLICY_PREFIXES)}


def move_into(source: Path, target: Path) -> None:
    """Moves all files below `source` into `target`, each at once, so that no reader sees half of one."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            destination = target / path.relative_to(source)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, destination)


def scratch_directory(beside: Path) -> "tempfile.TemporaryDirectory[str]":
    """A temporary directory on the same disk as `beside`."""
    beside.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=beside, prefix=".writing-")


def read_policy(path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a policy-only checkpoint.

    Raises:
        `OSError`: when there is no weight file.
        `ValueError`: when it cannot be read.
    """
    filename = cached_file(str(path), SAFE_WEIGHTS_NAME, **hub_kwargs)
    try:
        return load_file(filename)
    except SafetensorError as error:
        size = os.path.getsize(filename)
        raise ValueError(
            f"{filename} ({size} bytes) is truncated or no safetensors file ({error}): copy or download it again."
        ) from error


def load_policy(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads autoencoder and policy into `model`.

    Raises:
        `ValueError`: for missing or foreign weights, and for weights of another width.
    """
    own = policy_state(model)
    missing, foreign = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or foreign:
        raise ValueError(
            f"{source} does not fit the policy that its config describes: missing weights {missing[:3]}, unknown "
            f"weights {foreign[:3]}. Use the config.json that was saved with it."
        )
    for name, value in own.items():
        if state[name].shape != value.shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)} in {source}, but the model needs {tuple(value.shape)}: "
                "this policy was made for a base model of another width, or its config.json was changed."
            )
    model.load_state_dict(state, strict=False)
