"""What `device.py` offers, of a GPU that is there."""

import contextlib
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

DEVICE = torch.device("cuda:0")
PretendMode = contextlib.nullcontext
# Nothing is counted here.
launches: Counter[str] = Counter()
waits: Counter[str] = Counter()

torch.backends.cudnn.allow_tf32 = False  # numbers are compared with the CPU's


def inner_of(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def on_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, (Tensor, nn.Module)) else value
