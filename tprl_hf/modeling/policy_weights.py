"""Weights of a policy: read from a checkpoint, checked, and put into a model."""

import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from .checkpoint_checks import POLICY_PREFIXES, cached, no_safetensors


def policy_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that are ours: autoencoder and policy."""
    return {name: value for name, value in state.items() if name.startswith(POLICY_PREFIXES)}


def read_policy(path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a policy-only checkpoint.

    Raises:
        `OSError`: when there is no weight file in safetensors.
        `ValueError`: when it cannot be read.
    """
    filename = cached(str(path), SAFE_WEIGHTS_NAME, hub_kwargs)
    if filename is None:
        raise no_safetensors(str(path), f"no {SAFE_WEIGHTS_NAME}")
    try:
        return load_file(filename)
    except SafetensorError as error:
        size = os.path.getsize(filename)
        raise ValueError(
            f"{filename} ({size} bytes) is truncated or no safetensors file ({error}): copy or download it again."
        ) from error


def policy_in_files(source: str, names: list[str], hub_kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The policy's weights in files of the merged checkpoint `source`, as they are stored."""
    found = {}
    for name in names:
        path = cached(source, name, hub_kwargs)
        assert path is not None  # its index names it
        with safe_open(path, framework="pt") as file:
            own = [weight for weight in file.keys() if weight.startswith(POLICY_PREFIXES)]
            found.update({weight: file.get_tensor(weight) for weight in own})
    return found


def load_policy(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads autoencoder and policy into `model`.

    Raises:
        `ValueError`: for missing, foreign and broken weights, and for weights of another width.
    """
    own = policy_state(model.state_dict())
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
    refuse_broken(state, source)
    model.load_state_dict(state, strict=False)


def place_beside_embeddings(model: PreTrainedModel) -> None:
    """Moves autoencoder and policy to where the base model's first tokens are.

    `device_map` and quantisation place the base model alone, and a map of a merged checkpoint may place them anywhere.
    """
    embedding = model.get_input_embeddings()
    place = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    device = torch.device(embedding.weight.device if place is None else place)
    networks = [model.get_submodule(prefix.rstrip(".")) for prefix in POLICY_PREFIXES]
    if "meta" in {device.type, *(weight.device.type for one in networks for weight in one.parameters())}:
        return  # still to be filled, or offloaded
    for network in networks:
        network.to(device)
        for module in network.modules():
            if hasattr(module, "_hf_hook"):
                module._hf_hook.execution_device = device


def refuse_broken(weights: dict[str, Tensor], source: str) -> None:
    """Raises `ValueError` for weights of a policy that are not floats, or not finite in the policy's precision."""
    for name, value in sorted(weights.items()):
        is_float = value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if not is_float:
            found = f"is of {value.dtype}"
        elif not value.float().isfinite().all():
            found = f"holds {value.float()[~value.float().isfinite()][0].item()}"
        else:
            continue
        raise ValueError(f"{name} in {source} {found}, which no policy has: copy or download it again, or train anew.")
