"""Wall-clock of a model, part by part: unpruned, pruned, and the floor of feeding the LLM as few tokens."""

import argparse
import itertools
import json
from collections.abc import Callable
from typing import Any

from .arguments import (
    DEFAULT_KEEP_RATIO,
    OldSpelling,
    add_loading_arguments,
    add_model_argument,
    keep_ratio,
    loading_options,
    loading_words,
    method_names,
    positive_int,
    pruner_names,
    rounds,
    seed,
)
from .progress import bar, note

NAME = "benchmark"
HELP = "time a model's vision tower, pruner, prefill and answers, unpruned and pruned"
# What the targets are stated in; smaller is better but for the speed-ups.
RATIOS = {
    "prefill pruned / floor": ("prefill pruned", "prefill floor"),
    "pruner / prefill unpruned": ("pruner", "prefill unpruned"),
    "prefill speed-up": ("prefill unpruned", "prefill pruned"),
    "prefill speed-up of the floor": ("prefill unpruned", "prefill floor"),
    "answer speed-up": ("answer unpruned", "answer pruned"),
}

# Beside the wall, on the device of that name: the time that others' work hardly lengthens. See `Times`.
SECOND_CLOCKS = ("cpu", "cuda")
CLOCK_WORDS = {"cpu": "processor time of this process", "cuda": "by the GPU's clock", "wall": "by the clock"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(
        parser,
        "a model as a directory or a name on the Hub, or a LLaVA-shaped preset of `tprl flops --list`, which gets "
        "random weights (default: the embedded model)",
    )
    parser.add_argument(
        "--keep-ratio",
        type=keep_ratio,
        default=DEFAULT_KEEP_RATIO,
        metavar="FRACTION",
        help="fraction of visual tokens to keep, in (0, 1] (default: 1/3)",
    )
    parser.add_argument("--keep", action=OldSpelling, new="--keep-ratio", dest="keep_ratio", type=keep_ratio)
    parser.add_argument("--batch-size", type=positive_int, default=1, metavar="N", help="prompts at once (default: 1)")
    parser.add_argument("--batch", action=OldSpelling, new="--batch-size", dest="batch_size", type=positive_int)
    parser.add_argument(
        "--load",
        type=batch_sizes,
        default=(),
        metavar="B,B,...",
        help="also whole answers in batches of these sizes: requests per second, unpruned and pruned",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=16, metavar="N", help="tokens of the answer (default: 16)"
    )
    parser.add_argument(
        "--new-tokens", action=OldSpelling, new="--max-new-tokens", dest="max_new_tokens", type=positive_int
    )
    parser.add_argument(
        "--text-tokens", type=positive_int, default=64, metavar="L", help="of a preset's prompts (default: 64)"
    )
    parser.add_argument(
        "--pruner",
        choices=[name for name in method_names() if name != "none"],
        default="learned",
        help="default: learned; its cost does not depend on its training",
    )
    parser.add_argument(
        "--pruners",
        type=lambda text: list(method_names()) if text == "all" else pruner_names(text),
        metavar="NAME,...",
        help="instead: what each of these pruners costs in the vision tower and by itself; 'all' for all of them",
    )
    parser.add_argument("--rounds", type=rounds, default=7, metavar="N", help="timed rounds (default: 7)")
    parser.add_argument("--seed", type=seed, default=0, help="of random weights and prompts (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_loading_arguments(parser)


def batch_sizes(text: str) -> tuple[int, ...]:
    """Sizes with commas between them."""
    return tuple(positive_int(size) for size in text.split(","))


def run(arguments: argparse.Namespace) -> int:
    from tprl_hf.pruners.by_name import make_pruner

    model, make_inputs, weights = prepare(arguments)
    inputs = make_inputs(arguments.batch_size)
    num_visual = int(model.prune(**inputs, prune=False).num_visual[0])
    num_keep = max(1, round(arguments.keep_ratio * num_visual))
    if arguments.pruners:
        found = compare(model, inputs, num_keep, arguments)
        print(json.dumps(found, indent=1) if arguments.json else comparison_text(found))
        return 0
    if arguments.pruner == "learned":
        pruner = model.learned_pruner()  # an untrained one takes as long
    else:
        pruner = make_pruner(model, arguments.pruner, arguments.seed)
    with model.using(pruner):
        found = {
            "command": command_of(arguments),
            **surroundings(model),
            "weights": weights,
            "pruner": arguments.pruner,
            "num_visual": num_visual,
            "num_keep": num_keep,
            "batch": arguments.batch_size,
            "length": inputs["input_ids"].shape[1],
            "new_tokens": arguments.max_new_tokens,
            "rounds": arguments.rounds,
            **time_parts(model, inputs, num_keep, arguments),
            **memory(model, inputs, num_keep),
        }
        if arguments.load:
            found["load"] = time_load(model, make_inputs, num_keep, arguments)
    print(json.dumps(found, indent=1) if arguments.json else as_text(found))
    return 0


def prepare(arguments: argparse.Namespace) -> tuple[Any, Callable[[int], Any], str]:
    """The model, what makes a batch of prompts on its device, and what its weights are."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    import tprl_hf
    from tprl_hf.evaluation.answers import chat_inputs
    from tprl_hf.evaluation.benchmark import random_prompts
    from tprl_hf.evaluation.presets import PRESETS, preset_config
    from tprl_hf.loading import device_named, pretrained_arguments

    if arguments.model not in PRESETS:
        from .loading import load_named_model

        model, processor = load_named_model(arguments)
        noise = np.random.default_rng(arguments.seed).integers(0, 255, (336, 336, 3), dtype=np.uint8)
        sample = {"images": [Image.fromarray(noise)], "prompt": "What color is the star?"}
        return model, lambda batch: chat_inputs(processor, [sample] * batch, model.device), "of the checkpoint"
    config = preset_config(arguments.model)
    random_prompts(config, 1, arguments.text_tokens)  # refuses other families before any weights are made
    if arguments.device_map or arguments.load_in_4bit:
        raise ValueError(f"{arguments.model} gets random weights on one device: leave out --device-map and 4 bits.")
    how = pretrained_arguments(**loading_options(arguments))
    if how["dtype"] == "auto":  # random weights have none of their own
        how["dtype"] = "bfloat16"
    torch.manual_seed(arguments.seed)
    device = device_named(arguments.device)
    with device:
        base = AutoModelForImageTextToText.from_config(config, **how)
    model = tprl_hf.TPRLForConditionalGeneration.from_base_model(base).to(device).eval()

    def make_inputs(batch: int) -> dict[str, Any]:
        prompts = random_prompts(config, batch, arguments.text_tokens, arguments.seed)
        moved = {name: value.to(device) for name, value in prompts.items()}
        return {**moved, "pixel_values": moved["pixel_values"].to(base.dtype)}

    return model, make_inputs, "random"


def command_of(arguments: argparse.Namespace) -> str:
    """What gives these numbers, defaults and all."""
    command = (
        f"tprl benchmark{f' {arguments.model}' if arguments.model else ''} --keep-ratio {arguments.keep_ratio:.4g}"
    )
    if arguments.load:
        command += f" --load {','.join(map(str, arguments.load))}"
    command += f" --batch-size {arguments.batch_size} --max-new-tokens {arguments.max_new_tokens}"
    command += f" --text-tokens {arguments.text_tokens}"
    command += f" --pruner {arguments.pruner} --rounds {arguments.rounds} --seed {arguments.seed}"
    return command + loading_words(arguments)


def surroundings(model) -> dict[str, Any]:
    """Device, processor and versions."""
    import platform
    from importlib.metadata import version

    from .tables import describe_device

    packages = ("torch", "transformers")
    return {
        "device": describe_device(model),
        "machine": platform.machine(),
        "versions": {"tprl_hf": version("tprl_hf"), **{name: version(name) for name in packages}},
    }


def time_parts(model, inputs, num_keep: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every part, its memory, and the ratios of the targets, by the wall and by CPU time or the GPU's clock."""
    from dataclasses import asdict

    from tprl_hf.evaluation.benchmark import Spread, benchmark_calls, peak_bytes, ratio, time_in_turns

    calls = benchmark_calls(model, inputs, num_keep, arguments.max_new_tokens)
    with bar((2 + arguments.rounds) * len(calls), "call", f"Timing {arguments.rounds} rounds") as done:
        times = time_in_turns(calls, arguments.rounds, after_call=done.update)
    note("Measuring memory ...")
    found: dict[str, Any] = {"peak_bytes": {name: peak_bytes(call) for name, call in calls.items()}}
    second = {f"{clock}_": clock for clock in SECOND_CLOCKS if clock == model.device.type}
    for prefix, clock in {"": "wall", **second}.items():
        values = {name: getattr(one, clock) for name, one in times.items()}
        found[f"{prefix}milliseconds"] = {name: asdict(Spread.of(one)) for name, one in values.items()}
        found[f"{prefix}ratios"] = {
            name: asdict(ratio(values[over], values[under])) for name, (over, under) in RATIOS.items()
        }
    return found


def compare(model, inputs, num_keep: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tower and choice of each pruner in `--pruners`, in turns; pruners that the model cannot have are left out."""
    from dataclasses import asdict

    from tprl_hf.evaluation.benchmark import Spread, pruner_calls, ratio, time_in_turns
    from tprl_hf.pruners import NoPruner
    from tprl_hf.pruners.by_name import make_pruner

    pruners, refused = {}, {}
    for name in dict.fromkeys(arguments.pruners):
        pruner = (
            model.learned_pruner() if name == "learned" else make_pruner(model, name, arguments.seed) or NoPruner()
        )
        try:
            with model.using(pruner):
                model.prune(**inputs, num_keep=num_keep)
            pruners[name] = pruner
        except ValueError as error:
            refused[name] = str(error)
    # not the clock on the wall, where what else the machine does would count
    clock = next((name for name in SECOND_CLOCKS if name == model.device.type), "wall")
    calls = pruner_calls(model, inputs, num_keep, pruners)
    with bar((2 + arguments.rounds) * len(calls), "call", f"Timing {len(pruners)} pruners") as done:
        timed = time_in_turns(calls, arguments.rounds, after_call=done.update)
    times = {name: getattr(one, clock) for name, one in timed.items()}
    rows = []
    for name in pruners:
        pairs = zip(times[f"tower {name}"], times["tower"], times[f"choose {name}"], strict=True)
        extra = [tower - plain + choice for tower, plain, choice in pairs]
        rows.append(
            {
                "pruner": name,
                "tower_ms": asdict(Spread.of(times[f"tower {name}"])),
                "tower_ratio": asdict(ratio(times[f"tower {name}"], times["tower"])),
                "choose_ms": asdict(Spread.of(times[f"choose {name}"])),
                "of_prefill": asdict(ratio(extra, times["prefill"])),
            }
        )
    return {
        "command": f"{command_of(arguments)} --pruners {','.join(arguments.pruners)}",
        **surroundings(model),
        "num_keep": num_keep,
        "num_visual": int(model.prune(**inputs, prune=False).num_visual[0]),
        "batch": arguments.batch_size,
        "clock": clock,
        "tower_ms": asdict(Spread.of(times["tower"])),
        "prefill_ms": asdict(Spread.of(times["prefill"])),
        "pruners": rows,
        "refused": refused,
    }


def comparison_text(found: dict[str, Any]) -> str:
    """The table of `--pruners`, and the lines below it."""
    from .tables import format_table

    heads = ["pruner", "tower ms", "tower / plain", "middle half", "choosing ms", "extra / prefill", "middle half"]
    rows = [heads]
    for one in found["pruners"]:
        times = [f"{one[name]['median']:.1f}" for name in ("tower_ms", "choose_ms")]
        rows.append(
            [one["pruner"], times[0], *spread_words(one["tower_ratio"]), times[1], *spread_words(one["of_prefill"])]
        )
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return "\n".join(
        [
            format_table(rows),
            *(f"Without {name}: {why}" for name, why in found["refused"].items()),
            f"{found['num_keep']} of {found['num_visual']} visual tokens kept, batch {found['batch']}; tower: vision "
            f"tower and projector, {found['tower_ms']['median']:.1f} ms without a pruner; extra: what the tower takes "
            f"longer, and choosing; prefill: the LLM unpruned, {found['prefill_ms']['median']:.1f} ms. In turns, "
            f"{CLOCK_WORDS[found['clock']]}.",
            f"Device: {found['device']}, {found['machine']}; {versions}.",
            f"Command: {found['command']}",
        ]
    )


def time_load(model, make_inputs, num_keep: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Requests per second against batch size; sizes take turns too."""
    from dataclasses import asdict

    from tprl_hf.evaluation.benchmark import answer_calls, ratio, requests_per_second, time_in_turns

    calls = {
        f"{name} {size}": call
        for size in arguments.load
        for name, call in answer_calls(model, make_inputs(size), num_keep, arguments.max_new_tokens).items()
    }
    sizes = ", ".join(map(str, arguments.load))
    with bar((1 + arguments.rounds) * len(calls), "call", f"Timing batches of {sizes}") as done:
        times = time_in_turns(calls, arguments.rounds, warmup=1, after_call=done.update)
    found = []
    for size in arguments.load:
        unpruned, pruned = times[f"unpruned {size}"], times[f"pruned {size}"]
        spreads = {
            "unpruned": requests_per_second(size, unpruned.wall),
            "pruned": requests_per_second(size, pruned.wall),
            "speed_up": ratio(unpruned.wall, pruned.wall),
        }
        if model.device.type == "cpu":
            spreads["cpu_speed_up"] = ratio(unpruned.cpu, pruned.cpu)
        found.append({"batch": size, **{name: asdict(one) for name, one in spreads.items()}})
    return found


def memory(model, inputs, num_keep: int) -> dict[str, int]:
    """KV cache of the prompts in bytes, as the model fills it, and all that was allocated on a GPU at most."""
    import torch

    from tprl_hf.evaluation.benchmark import kv_bytes

    found = {
        "kv_bytes_unpruned": kv_bytes(model, inputs, prune=False),
        "kv_bytes_pruned": kv_bytes(model, inputs, num_keep=num_keep),
    }
    if model.device.type == "cuda":
        found["allocated_bytes"] = torch.cuda.max_memory_allocated(model.device)
    return found


def as_text(found: dict[str, Any]) -> str:
    """The tables, and the lines below them."""
    from .tables import format_table

    clocks = [clock for clock in SECOND_CLOCKS if f"{clock}_ratios" in found]
    rows = [["part", "ms (median)", "middle half", *(f"{clock.upper()} ms" for clock in clocks), "peak MB"]]
    for name, one in found["milliseconds"].items():
        others = [f"{found[f'{clock}_milliseconds'][name]['median']:.1f}" for clock in clocks]
        peak = f"{found['peak_bytes'][name] / 1e6:.1f}"
        rows.append([name, f"{one['median']:.1f}", f"{one['low']:.1f} to {one['high']:.1f}", *others, peak])
    tables = [format_table(rows)]
    headings = [heading for clock in clocks for heading in (f"by {clock.upper()} time", "middle half")]
    rows = [["ratio, round by round", "median", "middle half", *headings]]
    for name, one in found["ratios"].items():
        words = [spread_words(found[f"{clock}_ratios"][name]) for clock in clocks]
        rows.append([name, *spread_words(one), *itertools.chain(*words)])
    tables.append(format_table(rows))
    if "load" in found:
        rows = [["batch", "requests/s unpruned", "middle half", "pruned", "middle half", "speed-up"]]
        for one in found["load"]:
            speed_up = f"{one['speed_up']['median']:.3f}"
            rows.append([str(one["batch"]), *spread_words(one["unpruned"]), *spread_words(one["pruned"]), speed_up])
        tables.append(format_table(rows))
    return "\n".join([*tables, *notes(found)])


def spread_words(spread: dict[str, float]) -> list[str]:
    return [f"{spread['median']:.3f}", f"{spread['low']:.3f} to {spread['high']:.3f}"]


def notes(found: dict[str, Any]) -> list[str]:
    """The lines below the tables."""
    kv = " -> ".join(f"{found[f'kv_bytes_{name}'] / 1e6:.2f}" for name in ("unpruned", "pruned"))
    return [
        f"{found['num_keep']} of {found['num_visual']} visual tokens kept by {found['pruner']}, prompts of "
        f"{found['length']} tokens, batch {found['batch']}, {found['new_tokens']} new tokens; KV cache {kv} MB; "
        f"weights {found['weights']}.",
        "Parts take turns; prefill: one row of logits, features given; floor: the base model fed as many embeddings; "
        "answer: from pixels to the last token; requests: whole answers, one batch after the other; peak: bytes of "
        "the tensors made that are alive at once.",
        f"Device: {found['device']}, {found['machine']}; "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        + ".",
        f"Command: {found['command']}",
    ]
