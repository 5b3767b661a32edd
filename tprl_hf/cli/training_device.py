"""Where the stages of `tprl train` compute."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def training_device(loading: dict[str, Any]) -> "torch.device":
    """
    The device of this process: the CPU if `--device cpu` says so, else the accelerator that the trainers take too.

    Args:
        loading (`dict`): the options by which the model is loaded.

    Raises:
        `ValueError`: for one of several accelerators by its number, and for what this machine does not have.
    """
    import torch

    from tprl_hf.loading import device_named

    named = loading.get("device")
    device = device_named(named)
    if named is not None and device.index:
        raise ValueError(
            f"--device {named}: the trainers take the first accelerator that they see. To choose another one set "
            f"CUDA_VISIBLE_DEVICES={device.index}; to use several start the command with torchrun."
        )
    if device.type == "cpu":
        return device
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))


def training_arguments(loading: dict[str, Any]) -> dict[str, Any]:
    """What makes a trainer compute on [`training_device`] where `--device` names it."""
    return {"use_cpu": True} if loading.get("device") and training_device(loading).type == "cpu" else {}
