"""Which weights and which questions a result was measured with."""

import hashlib
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn

from tprl_hf.training.answer_batches import undecoded


def fingerprint(model: nn.Module) -> str:
    """A digest of some entries of every weight: another model, or the same one trained on, has another."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // 256)].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def questions_digest(samples: Dataset) -> str:
    """A digest of the images, questions, references and boxes of samples, whatever their files are called."""
    digest = hashlib.sha256()
    for sample in undecoded(samples):
        for image in sample["images"]:
            digest.update(hashlib.sha256(image["bytes"] or Path(image["path"]).read_bytes()).digest())
        digest.update(repr((sample["prompt"], sample["answer"], sample["boxes"])).encode())
    return digest.hexdigest()[:16]
