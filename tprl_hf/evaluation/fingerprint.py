"""Which weights and which questions a result was measured with."""

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from tprl_hf.pictures import images_of, stored_picture, to_rgb
from tprl_hf.training.answer_batches import undecoded
from tprl_hf.training.fingerprint import fingerprint

__all__ = ["fingerprint", "processor_digest", "questions_digest"]


def processor_digest(processor: Any) -> str:
    """A digest of how a processor puts pictures and words before the model, wherever it was loaded from."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    said = repr((processor.to_json_string(), processor.chat_template, words))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


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
