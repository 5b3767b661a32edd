"""Memory of a process that goes through many images twice, with their features on disk.

`python -m tests.training.memory 10000 40000`

Prints for each number of images the largest private memory (RssAnon of Linux) in MiB, and seconds. What the system
keeps of files is not counted: it gives this back as soon as a program needs it. The model is a tiny random LLaVA
whose tokens are as many and as wide as those of a small model, 64 KiB an image.
"""

import argparse
import multiprocessing
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from tests.families.tiny_models import build
from tests.families.tiny_processor import make_processor
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.data import SAMPLE_FEATURES
from tprl_hf.data.samples import png_bytes
from tprl_hf.training.answer_batches import SampleEncoder, undecoded
from tprl_hf.training.feature_cache import FeatureCache
from tprl_hf.training.stored_features import mapped

BATCH = 50
WIDTH = 1024  # float32 of 16 tokens: 64 KiB


class WideEncoder(SampleEncoder):
    """Whose tokens take more memory than those of the tiny model."""

    def encode_images(self, processed):
        return mapped(super().encode_images(processed), lambda rows: rows.repeat(1, WIDTH // rows.shape[1]))


def rows(count: int):
    """Questions about images of noise."""
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (24, 24, 3), dtype=np.uint8)
        yield {
            "images": [{"bytes": png_bytes(Image.fromarray(pixels)), "path": None}],
            "prompt": f"word{number % 50 + 5} word{number // 50 % 50 + 5}",
            "answer": "word7",
            "question_type": "existence",
            "boxes": [],
            "image_id": str(number),
            "objects": [],
        }


def private_memory() -> float:
    """MiB."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) / 1024


def measure(count: int, directory: str) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    started, room = time.monotonic(), count * 80_000 // 2  # half of them find room
    data = Dataset.from_generator(
        rows, gen_kwargs={"count": count}, features=SAMPLE_FEATURES, cache_dir=directory, writer_batch_size=100
    )
    data = undecoded(data)
    base = build("llava")
    base.generation_config.eos_token_id = 2
    model = TPRLForConditionalGeneration.from_base_model(base, latent_dim=16, policy_num_heads=4, policy_dim=16)
    encoder = WideEncoder(model.eval(), make_processor(), FeatureCache(room, Path(directory) / "features" / "model"))
    peak = 0.0
    for epoch in range(2):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).tolist()
        for start in range(0, count, BATCH):
            encoder.encode_rows([data[index] for index in order[start : start + BATCH]])
            peak = max(peak, private_memory())
    print(f"{count} images: {peak:.1f} MiB, {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=int, nargs="+")
    parser.add_argument("--directory", type=Path, help="for images and features (default: a temporary one)")
    arguments = parser.parse_args()
    for count in arguments.counts:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
            process = multiprocessing.get_context("spawn").Process(target=measure, args=(count, scratch))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
