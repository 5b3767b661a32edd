"""Wall-clock of a model, part by part: unpruned, pruned, and the floor of feeding the LLM as few tokens."""

import argparse
import json
import sys
from typing import Any

from .arguments import METHODS, keep_ratio, positive_int

NAME = "benchmark"
HELP = "time a model's vision tower, pruner, prefill and answers, unpruned and pruned"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a model as a directory or a name on the Hub, or a LLaVA-shaped preset of `tprl flops --list`, which "
        "gets random weights (default: the embedded model)",
    )
    parser.add_argument(
        "--keep", type=keep_ratio, default=1 / 3, metavar="FRACTION", help="of the visual tokens (default: 1/3)"
    )
    parser.add_argument("--batch", type=positive_int, default=1, metavar="B", help="prompts at once (default: 1)")
    parser.add_argument("--new-tokens", type=positive_int, default=16, metavar="N", help="answer tokens (default: 16)")
    parser.add_argument(
        "--text-tokens", type=positive_int, default=64, metavar="L", help="of a preset's prompts (default: 64)"
    )
    parser.add_argument(
        "--pruner",
        choices=[name for name in METHODS if name != "none"],
        default="learned",
        help="default: learned; its cost does not depend on its training",
    )
    parser.add_argument("--rounds", type=positive_int, default=7, metavar="N", help="timed rounds (default: 7)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and prompts (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    import contextlib
    from dataclasses import asdict

    from tprl_hf.evaluation.benchmark import benchmark_calls, time_in_turns

    from .demo import describe_device, format_table
    from .loading import make_pruner

    model, inputs, weights = prepare(arguments)
    num_visual = int(model.prune(**inputs, prune=False).num_visual[0])
    num_keep = max(1, round(arguments.keep * num_visual))
    pruner = None if arguments.pruner == "learned" else make_pruner(model, arguments.pruner, arguments.seed)
    print(f"Timing {2 + arguments.rounds} rounds ...", file=sys.stderr)
    with contextlib.nullcontext() if pruner is None else model.using(pruner):
        calls = benchmark_calls(model, inputs, num_keep, arguments.new_tokens)
        times = time_in_turns(calls, arguments.rounds)
    command = f"tprl benchmark{f' {arguments.model}' if arguments.model else ''} --keep {arguments.keep:.4g}"
    command += f" --batch {arguments.batch} --new-tokens {arguments.new_tokens} --text-tokens {arguments.text_tokens}"
    command += f" --pruner {arguments.pruner} --rounds {arguments.rounds} --seed {arguments.seed}"
    found = {
        "command": command,
        "device": describe_device(model),
        "weights": weights,
        "pruner": arguments.pruner,
        "num_visual": num_visual,
        "num_keep": num_keep,
        "batch": arguments.batch,
        "length": inputs["input_ids"].shape[1],
        "new_tokens": arguments.new_tokens,
        "milliseconds": {name: asdict(one) for name, one in times.items()},
        "ratios": ratios(times),
        **memory(model, inputs["input_ids"].shape[1], num_visual - num_keep, arguments.batch),
    }
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    rows = [["part", "ms (median)", "middle half"]]
    rows += [[name, f"{one.median:.1f}", f"{one.low:.1f} to {one.high:.1f}"] for name, one in times.items()]
    print(format_table(rows))
    print(format_table([["ratio", "value"], *([name, f"{value:.3f}"] for name, value in found["ratios"].items())]))
    print("\n".join(notes(found)))
    return 0


def prepare(arguments: argparse.Namespace) -> tuple[Any, Any, str]:
    """The model, a batch of prompts on its device, and what its weights are."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    import tprl_hf
    from tprl_hf.evaluation.answers import chat_inputs
    from tprl_hf.evaluation.benchmark import random_prompts
    from tprl_hf.evaluation.presets import PRESETS, preset_config

    from .loading import load_model

    if arguments.model not in PRESETS:
        model, processor = load_model(arguments.model)
        noise = np.random.default_rng(arguments.seed).integers(0, 255, (336, 336, 3), dtype=np.uint8)
        sample = {"images": [Image.fromarray(noise)], "prompt": "What color is the star?"}
        return model, chat_inputs(processor, [sample] * arguments.batch, model.device), "of the checkpoint"
    config = preset_config(arguments.model)
    prompts = random_prompts(config, arguments.batch, arguments.text_tokens, arguments.seed)
    torch.manual_seed(arguments.seed)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = torch.float32 if device is None or device.type == "cpu" else torch.bfloat16
    with torch.device(device or "cpu"):
        base = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model = tprl_hf.TPRLForConditionalGeneration.from_base_model(base).to(device).eval()
    moved = {name: value.to(device) for name, value in prompts.items()}
    return model, {**moved, "pixel_values": moved["pixel_values"].to(dtype)}, "random"


def ratios(times) -> dict[str, float]:
    """What the targets are stated in; smaller is better but for the speed-ups."""
    median = {name: one.median for name, one in times.items()}
    return {
        "prefill pruned / floor": median["prefill pruned"] / median["prefill floor"],
        "pruner / prefill unpruned": median["pruner"] / median["prefill unpruned"],
        "prefill speed-up": median["prefill unpruned"] / median["prefill pruned"],
        "prefill speed-up of the floor": median["prefill unpruned"] / median["prefill floor"],
        "answer speed-up": median["answer unpruned"] / median["answer pruned"],
    }


def memory(model, length: int, num_removed: int, batch: int) -> dict[str, int]:
    """KV cache of the prompts in bytes, in the model's own precision, and the peak on a GPU."""
    import torch

    from tprl_hf.evaluation.flops import llm_shape

    llm = llm_shape(model.lvlm.config)
    size = torch.empty(0, dtype=model.dtype).element_size()
    found = {
        "kv_bytes_unpruned": batch * llm.kv_bytes(length, size),
        "kv_bytes_pruned": batch * llm.kv_bytes(length - num_removed, size),
    }
    if model.device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(model.device)
    return found


def notes(found: dict[str, Any]) -> list[str]:
    """The lines below the tables."""
    kv = " -> ".join(f"{found[f'kv_bytes_{name}'] / 1e6:.2f}" for name in ("unpruned", "pruned"))
    return [
        f"{found['num_keep']} of {found['num_visual']} visual tokens kept by {found['pruner']}, prompts of "
        f"{found['length']} tokens, batch {found['batch']}, {found['new_tokens']} new tokens; KV cache {kv} MB; "
        f"weights {found['weights']}.",
        "Parts take turns; prefill: one row of logits, features given; floor: the base model fed as many embeddings; "
        "answer: from pixels to the last token.",
        f"Device: {found['device']}.",
        f"Command: {found['command']}",
    ]
