"""Which weights a result was made with."""

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """A digest of some entries of every weight: another model, or the same one trained on, has another."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // 256)].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]
