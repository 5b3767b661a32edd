"""Which weights and which questions a result was measured with."""

import hashlib
from pathlib import Path

from datasets import Dataset

from tprl_hf.pictures import images_of, stored_picture, to_rgb
from tprl_hf.training.answer_batches import undecoded
from tprl_hf.training.fingerprint import fingerprint, lora_in_checkpoint, policy_of_model, processor_digest

__all__ = ["fingerprint", "lora_in_checkpoint", "policy_of_model", "processor_digest", "questions_digest"]


def questions_digest(samples: Dataset) -> str:
    """A digest of the images, questions, references and boxes of samples, whatever their files are called."""
    digest = hashlib.sha256()
    for sample in undecoded(samples):
        for image in map(stored_picture, images_of(sample)):
            if isinstance(image, str):
                image = Path(image).read_bytes()
            content = image if isinstance(image, bytes) else to_rgb(image).tobytes()
            digest.update(hashlib.sha256(content).digest())
        digest.update(repr((sample["prompt"], sample.get("answer"), sample.get("boxes") or [])).encode())
    return digest.hexdigest()[:16]
