"""
vLLM's engine with checkpoints of ours, and what `generate` answers to the same requests.

With `TRITON_INTERPRET=1` engines of this process have the runner that vLLM takes on a GPU ("V2"): its kernels are
Triton's, and run in Triton's interpreter.
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.families.stock_processors import save
from tests.families.tiny_models import build, config_of

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    os.environ[RUNNER] = "1"
    from triton.backends import backends

    # vLLM's CPU build takes a Triton that has a backend of this name; without a device the interpreter needs none.
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

try:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
except ImportError:
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)

# For the processes of vLLM, which inherit them.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
# One process starts much sooner; test_served.py has them apart, as users do.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
NEW_TOKENS = 8


@dataclass
class Request:
    """
    Args:
        question (`str`): the text of the user's turn.
        images (`list`): what lies before it.
        budget (`dict`): of the request.
    """

    question: str
    images: list[Image.Image]
    budget: dict[str, Any] = field(default_factory=dict)

    def prompt(self, processor) -> str:
        parts = [{"type": "image"} for _ in self.images] + [{"type": "text", "text": self.question}]
        chat = [{"role": "user", "content": parts}]
        return processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


@contextlib.contextmanager
def engine(path: str | Path, **settings) -> Iterator[LLM]:
    """vLLM with the checkpoint `path`, in this process."""
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16, "seed": 0}
    llm = LLM(str(path), **{**defaults, "limit_mm_per_prompt": {"image": 1}, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def ask(llm: LLM, processor, requests: list[Request], new_tokens: int = NEW_TOKENS):
    """vLLM's outputs for requests that come all at once."""
    prompts = []
    for request in requests:
        ids = processor.tokenizer(request.prompt(processor), add_special_tokens=False)["input_ids"]
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if request.images:
            prompt["multi_modal_data"] = {"image": request.images}
        if request.budget:
            prompt["mm_processor_kwargs"] = request.budget
        prompts.append(prompt)
    return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new_tokens), use_tqdm=False)


def answers(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def generated(model, processor, requests: list[Request], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """The tokens that `generate` answers, requests of one budget in batches."""
    batches = defaultdict(list)
    for index, request in enumerate(requests):
        batches[str(request.budget), len(request.images)].append(index)
    found: list[list[int]] = [[] for _ in requests]
    for which in batches.values():
        for start in range(0, len(which), 20):
            indices = which[start : start + 20]
            batch = [requests[index] for index in indices]
            inputs = model_inputs(processor, batch)
            sequences = model.generate(**inputs, **batch[0].budget, max_new_tokens=new_tokens, do_sample=False)
            for index, row in zip(indices, sequences[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                end = processor.tokenizer.eos_token_id
                found[index] = row[: row.index(end) + 1] if end in row else row
    return found


def model_inputs(processor, batch: list[Request]):
    images = [request.images for request in batch]
    texts = [request.prompt(processor) for request in batch]
    return processor(
        images=images if any(images) else None,
        text=texts,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=False,
    )


def save_tiny(family: str, directory: Path) -> None:
    """A tiny random base model with its processor, with heads as wide as vLLM's attention on CPUs wants them."""
    config = config_of(family).to_dict()
    text = {**config["text_config"], "hidden_size": 128, "head_dim": 32}
    changes: dict[str, Any] = {"text_config": text}
    settings = directory / "processor_config.json"
    save(family, directory)
    if family.startswith("qwen"):
        interleaved = family == "qwen3_vl"  # vLLM takes the word of the config, transformers always does it
        section = [4, 6, 6] if interleaved else [4, 4, 8]
        rope = {**text["rope_parameters"], "mrope_section": section, "mrope_interleaved": interleaved}
        changes["text_config"] = {**text, "rope_parameters": rope}
        changes["vision_config"] = {**config["vision_config"], "out_hidden_size": 128}
    if family == "llava_onevision":  # the only way that vLLM knows
        changes["vision_aspect_ratio"] = "anyres_max_9"
        settings.write_text(settings.read_text().replace("anyres_max_1", "anyres_max_9"))
    build(family, **changes).save_pretrained(directory)
