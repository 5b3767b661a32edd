"""Wall-clock of one prompt, part by part: unpruned, pruned, and the floor that no pruner can go below."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Time:
    """
    Median over the rounds, and the middle half, in milliseconds.

    Args:
        median, low, high (`float`): The median and the two quartiles.
    """

    median: float
    low: float
    high: float


def time_in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int = 7, warmup: int = 2) -> dict[str, Time]:
    """
    Times calls in turns (a, b, c, a, b, c, ...), so that a machine that slows down slows all of them.

    Args:
        calls (`Mapping[str, Callable]`): By name, functions without arguments.
        rounds (`int`, *optional*, defaults to 7): Timed rounds, at least 2.
        warmup (`int`, *optional*, defaults to 2): Rounds before them that are not timed.

    Returns:
        `dict[str, Time]`: In the order of `calls`.

    Raises:
        `ValueError`: If `rounds` is below 2, which has no quartiles.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {rounds}.")
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for number in range(warmup + rounds):
            for name, call in calls.items():
                synchronize()
                start = time.perf_counter()
                call()
                synchronize()
                if number >= warmup:
                    times[name].append(1000 * (time.perf_counter() - start))
    quartiles = {name: statistics.quantiles(values, n=4, method="inclusive") for name, values in times.items()}
    return {name: Time(median, low, high) for name, (low, median, high) in quartiles.items()}


def synchronize() -> None:
    """Waits until the device has finished what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def benchmark_calls(model, inputs: Mapping[str, Any], num_keep: int, new_tokens: int) -> dict[str, Callable[[], Any]]:
    """
    What there is to time, by name, for one batch of prompts of equal length.

    "vision" is tower and projector; "pruner" everything between them and the LLM; "prefill" the LLM on the prompt, for
    one row of logits: unpruned, pruned without the choosing, and the floor, the base model fed as many embeddings;
    "answer" the whole way from pixels to the last of `new_tokens` tokens.

    Args:
        model ([`TPRLForConditionalGeneration`]): The model, with whatever pruner it uses at the moment.
        inputs (`Mapping[str, Any]`): The batch as the processor returned it.
        num_keep (`int`): Visual tokens to keep of each prompt.
        new_tokens (`int`): Length of the answers.
    """
    features = model.encode_images(**inputs)
    plan = model.prune(**inputs, visual_features=features, num_keep=num_keep)
    length = inputs["input_ids"].shape[1] - int(plan.num_visual[0]) + num_keep
    width = model.lvlm.config.get_text_config().hidden_size
    embeddings = torch.randn(len(inputs["input_ids"]), length, width, device=model.device, dtype=model.dtype)

    def prefill(**choice: Any) -> Any:
        return model(**inputs, visual_features=features, logits_to_keep=1, **choice)

    def answer(**choice: Any) -> Any:
        return model.generate(
            **inputs, **choice, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens
        )

    return {
        "vision": lambda: model.encode_images(**inputs),
        "pruner": lambda: model.prune(**inputs, visual_features=features, num_keep=num_keep),
        "prefill unpruned": lambda: prefill(prune=False),
        "prefill pruned": lambda: prefill(keep_mask=plan.keep_mask),
        "prefill floor": lambda: model.lvlm(inputs_embeds=embeddings, logits_to_keep=1),
        "answer unpruned": lambda: answer(prune=False),
        "answer pruned": lambda: answer(num_keep=num_keep),
    }


def random_prompts(config: Any, batch_size: int, text_tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """
    Prompts of random words and one random image each, for a model without a processor.

    Args:
        config (`PreTrainedConfig`): Of a LLaVA.
        batch_size, text_tokens (`int`): How many prompts, and their tokens besides the visual ones.
        seed (`int`, *optional*, defaults to 0): Of words and pixels.

    Raises:
        `ValueError`: For another family, whose pixels look otherwise.
    """
    if config.model_type != "llava":
        raise ValueError(
            f"Random prompts are made for LLaVA-shaped presets; for {config.model_type!r} pass a model with its "
            "processor."
        )
    generator = torch.Generator().manual_seed(seed)
    side = config.vision_config.image_size
    num_visual = (side // config.vision_config.patch_size) ** 2
    words = torch.randint(5, 1000, (batch_size, text_tokens), generator=generator)
    visual = torch.full((batch_size, num_visual), config.image_token_id)
    ids = torch.cat([words[:, :1], visual, words[:, 1:]], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch_size, 3, side, side, generator=generator),
    }
