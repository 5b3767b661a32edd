"""
`tprl serve` and `vllm serve` one after the other, on a small model and on a larger one: the table in docs/serving.md.

    .venv-vllm/bin/python -m tests.serving.vllm.compare_servers servers.json

The small model is the embedded one. The larger one is a LLaVA of 120 million random parameters that turns an image
into 576 tokens, as LLaVA-1.5 does, and is pruned by DivPrune: its answers mean nothing, its times do. Either server
computes in one thread. Run it on a machine that does nothing else; it takes about 15 minutes on two cores.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.serving.raw_requests import served
from tests.serving.vllm.requests_per_second import HEADER, NEW_TOKENS, line, measured
from tests.serving.vllm.test_served import serving
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.loading import load_model

DTYPES = {"small": "float32", "larger": "bfloat16"}
BUDGETS = [{"prune": False}, {"keep_ratio": 1 / 3}, {"keep_ratio": 1 / 9}]
IMAGE_SIZE, PATCH_SIZE = 336, 14
LARGER_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 9,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
}


def save_small(folder: Path) -> None:
    model, processor = load_model()
    model.save_pretrained(folder, save_base_model=True)
    processor.save_pretrained(folder)


def save_larger(folder: Path) -> None:
    """A random LLaVA with the embedded model's words, and pictures of 24 x 24 patches."""
    model, processor = load_model()
    config = LlavaConfig.from_dict(model.lvlm.config.to_dict())
    for name, value in LARGER_TEXT.items():
        setattr(config.text_config, name, value)
    config.vision_config.image_size, config.vision_config.patch_size = IMAGE_SIZE, PATCH_SIZE
    config.image_seq_length = (IMAGE_SIZE // PATCH_SIZE) ** 2
    torch.manual_seed(0)
    base = LlavaForConditionalGeneration(config).eval()
    processor.image_processor.size = {"shortest_edge": IMAGE_SIZE}
    processor.image_processor.crop_size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor.patch_size = PATCH_SIZE
    pruned = TPRLForConditionalGeneration.from_base_model(base, pruner="divprune", keep_ratio=1 / 3)
    pruned.read_chat_template(processor)
    pruned.save_pretrained(folder, save_base_model=True)
    processor.save_pretrained(folder)


def rows_of(folder: Path, dtype: str, requests: int, repetitions: int) -> Iterator[dict]:
    asked = {"budgets": BUDGETS, "clients": [1, 12], "requests": requests, "repetitions": repetitions, "seed": 7}
    with (
        folder.with_suffix(".log").open("w") as log,
        served(str(folder), "--dtype", dtype, stderr=log) as (_, _, (host, port)),
    ):
        yield from measured(f"http://{host}:{port}", **asked)
    words = ["--limit-mm-per-prompt", '{"image": 1}', "--trust-request-mm-kwargs", "--max-model-len", "1024"]
    words += ["--dtype", dtype]
    with serving(folder, *words) as url:
        yield from measured(url, **asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a JSON file")
    parser.add_argument("--requests", type=int, nargs=2, default=[60, 12], help="of the small, the larger model")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    result: dict = {
        "command": "python -m tests.serving.vllm.compare_servers",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {name: version(name) for name in ("vllm", "torch", "transformers", "tprl_hf")},
        "dtypes": DTYPES,
        "requests": dict(zip(("small", "larger"), arguments.requests, strict=True)),
        "repetitions": arguments.repetitions,
        "new_tokens": NEW_TOKENS,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for (name, save), requests in zip(
            [("small", save_small), ("larger", save_larger)], arguments.requests, strict=True
        ):
            save(Path(folder) / name)
            print(f"{name}\n{HEADER}", flush=True)
            for row in rows_of(Path(folder) / name, DTYPES[name], requests, arguments.repetitions):
                result["rows"].append({"model": name, "dtype": DTYPES[name], **row})
                print(line(row), flush=True)
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
