"""What both recipes share: options, sizes of pictures, processes that average gradients, a state to resume from."""

from __future__ import annotations

import argparse
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Config = TypeVar("Config")
Moments = dict[int, dict[str, Tensor]]


def config_of(config_class: Callable[..., Config], description: str | None) -> Config:
    """The settings that the command line names, an option for each field of a dataclass. Makes its `output_dir`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", required=True)
    defaults: Any = config_class("")
    for name, default in asdict(defaults).items():
        if name != "output_dir":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = parser.parse_args()
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    return config_class(**vars(arguments))


def run_processes(train: Callable[..., None], num_processes: int, *arguments: Any) -> None:
    """Calls `train(rank, *arguments, port)` in so many processes, which can meet at the port; a single one is this."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if num_processes == 1:
        train(0, *arguments, port)
    else:
        torch.multiprocessing.spawn(train, (*arguments, port), nprocs=num_processes)


def join_processes(rank: int, num_processes: int, port: int) -> None:
    """Waits until all processes have come here, the first one after what it does alone."""
    if num_processes > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=num_processes,
            timeout=timedelta(hours=2),
        )
        dist.barrier()


def leave_processes() -> None:
    """Waits for the others, if there are any, and parts from them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def average_gradients(parameters: list[nn.Parameter], value: float = 0.0) -> float:
    """Averages gradients over the processes, and `value` with them, which it returns."""
    if not dist.is_initialized():
        return value
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients] + [torch.tensor([value])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
    return flat[-1].item()


def drawn_side(rng: np.random.Generator, smallest: int, full: int) -> int:
    """Patches a side of a batch's pictures: in a third of the draws `full`, else from `smallest` on.

    The logarithm of the side is uniform: from 16 to 8 is as often drawn as from 8 to 4.
    """
    if smallest >= full or rng.random() < 1 / 3:
        return full
    return int(smallest * (full / smallest) ** rng.random())


def shrunk(pixels: np.ndarray, instances: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 `[S, S, 3]` and its map of objects `[S, S]`, at `size` pixels a side instead of S."""
    if size == len(pixels):
        return pixels, instances
    small = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
    owners = Image.fromarray(instances.astype(np.int16)).resize((size, size), Image.Resampling.NEAREST)
    return np.asarray(small), np.asarray(owners)


def write_state(
    path: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None, progress: dict[str, str]
) -> None:
    """Writes weights and the optimizer's moments in one safetensors file, atomically; the progress as its metadata."""
    tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in weights.items()}
    if optimizer is not None:
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    temporary = path.with_suffix(".tmp")
    # copies, since what shares memory cannot be saved
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, temporary, progress)
    os.replace(temporary, path)


def read_state(path: Path) -> tuple[dict[str, str], dict[str, Tensor], Moments]:
    """What [`write_state`] wrote: progress, weights, and the optimizer's moments by the number of the parameter."""
    moments: Moments = defaultdict(dict)
    weights = {}
    with safe_open(path, "pt") as file:
        progress = file.metadata()
        for name in file.keys():
            if name.startswith("model."):
                weights[name.removeprefix("model.")] = file.get_tensor(name)
            else:
                _, i, key = name.split(".")
                moments[int(i)][key] = file.get_tensor(name)
    return progress, weights, dict(moments)


def load_moments(optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """Puts moments into an optimizer; a finished state has none."""
    if moments:
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
