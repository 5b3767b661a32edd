"""How many rollouts are drawn and scored in a second, compared with the naive loop, in one run.

`OMP_NUM_THREADS=1 python -m tprl_hf.evaluation.rollout_speed docs/results/mosaic_llava/rollout_speed.json`

The setting is that of the paper: three steps, and a score before the first and after each. The naive loop takes one
question at a time: one image through the tower, one step of the policy, one `generate` for each score.

`python -m tprl_hf.evaluation.rollout_speed --model llava-1.5-7b --text-tokens 65 --device cuda rollout_speed.json`

does the same with random weights of that shape. Only times are then to be read, and how many tokens the LLM read in
them; `training_costs` works out from these what a training run takes.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tprl_hf
from tprl_hf.data import mosaic_vqa
from tprl_hf.loading import device_named, load_model
from tprl_hf.training import TPRLPPOConfig, TPRLPPOTrainer
from tprl_hf.training.answer_batches import SampleEncoder
from tprl_hf.training.feature_cache import FeatureCache
from tprl_hf.training.rewards import generate_completions
from tprl_hf.training.rollouts import collect_rollouts

from .presets import PRESETS, preset_config

NUM_STEPS, LAMBDA_DISC = 3, 0.5
NAIVE, NAIVE_CACHED, FIRST, LATER, UPDATED = (
    "naive loop", "naive loop, features cached", "first visit", "later visits", "later visits and updates",
)  # fmt: skip


def naive_loop(trainer: TPRLPPOTrainer, rows: Sequence[dict[str, Any]], encoder: SampleEncoder) -> None:
    """Draws and scores one rollout of each of `rows`, one after the other."""
    model = trainer.tprl_model
    generator = torch.Generator(model.device).manual_seed(0)
    with torch.no_grad():
        for row in rows:
            batch = encoder([row])
            rollouts = collect_rollouts(
                model.policy, model.autoencoder, batch.inputs, 1, NUM_STEPS, LAMBDA_DISC, generator
            )
            answer_ids = batch.samples[0].answer_ids
            length = 1 if answer_ids is None else len(answer_ids)
            for keep_mask in rollouts.keep_masks:
                generate_completions(model, trainer.processing_class, batch, keep_mask, [0], length)


def random_model(preset: str, device: str | None) -> tuple[Any, Any]:
    """A LLaVA of that shape with random weights in bfloat16, and the embedded model's processor for its images."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessor, LlavaProcessor

    config = preset_config(preset)
    if config.model_type != "llava":
        raise ValueError(
            f"{preset} is not a LLaVA: name a LLaVA-shaped preset of `tprl flops --list`, or a checkpoint."
        )
    own = AutoProcessor.from_pretrained(tprl_hf.embedded_checkpoint())
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}), own.tokenizer,
        patch_size=patch, vision_feature_select_strategy="default", chat_template=own.chat_template,
        num_additional_image_tokens=1,
    )  # fmt: skip
    config.image_token_id = processor.image_token_id
    torch.manual_seed(0)
    with device_named(device):
        base = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    return tprl_hf.TPRLForConditionalGeneration.from_base_model(base).to(base.device).eval(), processor


def longer(row: dict[str, Any], processor: Any, text_tokens: int) -> dict[str, Any]:
    """The row with its question repeated until about so many tokens are text, answer and template included."""
    words = row["prompt"].split()
    length = len(processor.tokenizer(row["prompt"])["input_ids"]) / len(words)
    count = max(round((text_tokens - 6) / length), 1)
    return {**row, "prompt": " ".join((words * count)[:count])}


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds: of the process on a CPU, which other processes do not change; of a clock on an accelerator."""
    if device.type == "cpu":
        started = time.process_time()
        call()
        return time.process_time() - started
    torch.accelerator.synchronize()
    started = time.perf_counter()
    call()
    torch.accelerator.synchronize()
    return time.perf_counter() - started


def measure(trainer: TPRLPPOTrainer, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Rollouts in a second of each way, and tokens of the LLM for each rollout, padding included, in each round; the
    ways take turns, with other questions in each round."""
    ways = (NAIVE, NAIVE_CACHED, FIRST, LATER, UPDATED)
    found: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[float]] = {name: [] for name in ways}
    model, processor = trainer.tprl_model, trainer.processing_class
    read = 0

    def count(module: Any, positional: Any, named: dict[str, Any]) -> None:
        nonlocal read
        embeds = named.get("inputs_embeds")
        read += named["input_ids"].numel() if embeds is None else embeds[..., 0].numel()

    hook = model.lvlm.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    for buffer in range(rounds + 1):  # the first one warms up
        rows = trainer.questions(buffer)
        kept = SampleEncoder(model, processor)

        def update(buffer: int = buffer) -> None:
            for step in range(trainer.updates_per_buffer):
                trainer.state.global_step = buffer * trainer.updates_per_buffer + step
                trainer.training_step(trainer.model, None)

        calls: dict[str, Callable[[], Any]] = {
            NAIVE: partial(naive_loop, trainer, rows, SampleEncoder(model, processor, FeatureCache(0))),
            NAIVE_CACHED: partial(naive_loop, trainer, rows, kept),
            FIRST: partial(trainer.collect, buffer),
            LATER: partial(trainer.collect, buffer),
            UPDATED: update,
        }
        kept(rows)
        for name, call in calls.items():
            read = 0
            seconds = timed(call, model.device)
            if buffer:
                found[name].append(len(rows) / seconds)
                tokens[name].append(read / len(rows))
            trainer.model.zero_grad()
    hook.remove()
    return found, tokens


def report(found: dict[str, list[float]], tokens: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Medians with their spread over the rounds, and ratios to the naive loops within a round."""
    table = []
    for name, speeds in found.items():
        row: dict[str, Any] = {"way": name, "rollouts_per_second": median(speeds), "lowest": min(speeds)}
        row["highest"] = max(speeds)
        row["llm_tokens_per_rollout"] = median(tokens[name])
        for naive in (NAIVE, NAIVE_CACHED):
            ratios = [one / other for one, other in zip(speeds, found[naive], strict=True)]
            row[f"times the {naive}"] = {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", help="a JSON file")
    parser.add_argument(
        "--model", help="a TPRL checkpoint, or a LLaVA-shaped preset with random weights (default: the embedded one)"
    )
    parser.add_argument("--device", help="such as cpu or cuda (default: the accelerator, if there is one)")
    parser.add_argument("--text-tokens", type=int, help="of a prompt; its question is repeated (default: as it is)")
    parser.add_argument("--questions", type=int, default=64, help="in a buffer")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.model in PRESETS:
        model, processor = random_model(arguments.model, arguments.device)
    else:
        model, processor = load_model(arguments.model, device=arguments.device)
    data = mosaic_vqa("train", seed=100, num_samples=arguments.questions * (arguments.rounds + 1))
    if arguments.text_tokens:
        data = data.map(longer, fn_kwargs={"processor": processor, "text_tokens": arguments.text_tokens})
    with tempfile.TemporaryDirectory() as scratch:
        config = TPRLPPOConfig(
            scratch, use_cpu=model.device.type == "cpu", per_device_train_batch_size=arguments.questions,
            num_steps=NUM_STEPS, lambda_disc=LAMBDA_DISC, disable_tqdm=True, prefetch_threads=0,
        )  # fmt: skip
        trainer = TPRLPPOTrainer(model, config, processing_class=processor, train_dataset=data)
        trainer.create_optimizer()
        table = report(*measure(trainer, arguments.rounds))
    unit = "CPU second" if model.device.type == "cpu" else "second"
    print(
        f"{arguments.questions} questions, {NUM_STEPS} steps, {arguments.rounds} rounds, {model.dtype}, {model.device}"
    )
    print(f"rollouts in a {unit}, median (lowest to highest); times the naive loop, with the tower and with features")
    for row in table:
        ratios = [row[f"times the {naive}"] for naive in (NAIVE, NAIVE_CACHED)]
        print(
            f"{row['way']:28} {row['rollouts_per_second']:7.2f} ({row['lowest']:.2f} to {row['highest']:.2f})  "
            + "  ".join(f"{one['median']:.2f} ({one['lowest']:.2f} to {one['highest']:.2f})" for one in ratios)
            + f"  {row['llm_tokens_per_rollout']:.0f} tokens of the LLM"
        )
    if arguments.output:
        said = {
            "command": "python -m tprl_hf.evaluation.rollout_speed " + " ".join(sys.argv[1:]),
            "unit": f"rollouts in a {unit}", "threads": torch.get_num_threads(), "dtype": str(model.dtype),
            "device": torch.cuda.get_device_name() if model.device.type == "cuda" else str(model.device),
            "model": arguments.model, "text_tokens": arguments.text_tokens, "questions": arguments.questions,
            "steps": NUM_STEPS, "rounds": arguments.rounds, "version": tprl_hf.__version__, "ways": table,
        }  # fmt: skip
        arguments.output.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
