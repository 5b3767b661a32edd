"""Wall-clock and memory of one prompt, part by part: unpruned, pruned, and the floor that no pruner can go below."""

import functools
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tprl_hf.modeling.generation_tprl import GREEDY
from tprl_hf.modeling.token_pruner import TokenPruner
from tprl_hf.modeling.visual_features import VisualFeatures


@dataclass(frozen=True)
class Spread:
    """
    Median over the rounds, and the middle half.

    Args:
        median, low, high (`float`): The median and the two quartiles.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass
class Times:
    """
    What one call took in each round, in milliseconds.

    Args:
        wall (`list[float]`): By the clock on the wall.
        cpu (`list[float]`): Time that this process was given by its processors, all threads together. With one
            thread it is the wall-clock of a machine that has nothing else to do.
        cuda (`list[float]`): By CUDA events, the GPU's own clock. Empty without one.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    cuda: list[float] = field(default_factory=list)


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int = 7,
    warmup: int = 2,
    after_call: Callable[[], Any] = lambda: None,
) -> dict[str, Times]:
    """
    Times calls in turns (a, b, c, c, b, a, ...), so that a machine that slows down slows all of them, and nobody
    profits from who went before.

    Args:
        calls (`Mapping[str, Callable]`): By name, functions without arguments.
        rounds (`int`, *optional*, defaults to 7): Timed rounds, at least 2.
        warmup (`int`, *optional*, defaults to 2): Rounds before them that are not timed.
        after_call (`Callable`, *optional*): Called after each call, outside of its time, for progress.

    Returns:
        `dict[str, Times]`: In the order of `calls`.

    Raises:
        `ValueError`: If `rounds` is below 2, which has no quartiles.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {rounds}.")
    times = {name: Times() for name in calls}
    with torch.no_grad():
        for number in range(warmup + rounds):
            for name in list(calls)[:: -1 if number % 2 else 1]:
                for clock, milliseconds in time_once(calls[name]).items():
                    if number >= warmup:
                        getattr(times[name], clock).append(milliseconds)
                after_call()
    return times


def time_once(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of one call, by each clock of [`Times`] that there is."""
    synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if torch.cuda.is_available() else []
    start, cpu_start = time.perf_counter(), time.process_time()
    if events:
        events[0].record()
    call()
    if events:
        events[1].record()
    synchronize()
    taken = {"wall": 1000 * (time.perf_counter() - start), "cpu": 1000 * (time.process_time() - cpu_start)}
    return {**taken, "cuda": events[0].elapsed_time(events[1])} if events else taken


@dataclass(frozen=True)
class PrefillTime:
    """
    Medians over the rounds, in milliseconds.

    Args:
        llm_ms (`float`):
            The LLM's part: what pruning makes cheaper.
        total_ms (`float`):
            The whole forward: vision tower, pruner and LLM. What a user waits for.
    """

    llm_ms: float
    total_ms: float


def measure_prefill(
    llm: torch.nn.Module, calls: Mapping[str, Callable[[], Any]], rounds: int = 7, warmup: int = 2
) -> dict[str, PrefillTime]:
    """
    Times forward calls by [`time_in_turns`], and the LLM inside them.

    Args:
        llm (`torch.nn.Module`): The module whose share is told apart. It must run to its end once in each call; where
            a pruner runs a part of it before, that is the pruner's share.
        calls (`Mapping[str, Callable]`): By name, functions without arguments that run one forward.
        rounds (`int`, *optional*, defaults to 7): Timed rounds, at least 2.
        warmup (`int`, *optional*, defaults to 2): Rounds before them that are not timed.

    Returns:
        `dict[str, PrefillTime]`: Medians by name, in the order of `calls`.

    Raises:
        `ValueError`: If a call does not run `llm` to its end exactly once, or `rounds` is below 2.
    """
    starts: list[float] = []
    ends: list[float] = []
    llm_times: dict[str, list[float]] = {name: [] for name in calls}

    def mark(marks: list[float]) -> None:
        synchronize()
        marks.append(1000 * time.perf_counter())

    def run(name: str) -> None:
        starts.clear()
        ends.clear()
        calls[name]()
        if len(ends) != 1:
            raise ValueError(f"The call {name!r} ran the LLM {len(ends)} times instead of once.")
        llm_times[name].append(ends[0] - starts[-1])

    hooks = [
        llm.register_forward_pre_hook(lambda *_: mark(starts)),
        llm.register_forward_hook(lambda *_: mark(ends)),
    ]
    try:
        times = time_in_turns({name: functools.partial(run, name) for name in calls}, rounds, warmup)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: PrefillTime(statistics.median(llm_times[name][warmup:]), statistics.median(times[name].wall))
        for name in calls
    }


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """How two calls compare round by round, which cancels what a round did to both."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])


def requests_per_second(batch_size: int, milliseconds: Sequence[float]) -> Spread:
    """Requests that are answered in a second, when one batch follows the other."""
    return Spread.of([1000 * batch_size / one for one in milliseconds])


class LiveTensors(TorchDispatchMode):
    """
    Inside the `with`, counts the bytes of the tensors that operations make, for as long as these are alive.

    What was there before, such as weights, does not count, nor what an operation uses within itself.

    Attributes:
        now, peak (`int`): Bytes that are alive, and the most that were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.note((args, kwargs), is_new=False)
        output = func(*args, **(kwargs or {}))
        self.note(output, is_new=True)
        return output

    def note(self, values: Any, is_new: bool) -> None:
        """Counts the storages of `values` that were not seen before, if an operation has just made them."""
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor) or tensor.untyped_storage()._cdata in self.known:
                continue
            storage = tensor.untyped_storage()
            size = storage.nbytes() if is_new else 0
            self.known.add(storage._cdata)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata, size)

    def forget(self, address: int, size: int) -> None:
        """A storage is gone."""
        self.known.discard(address)
        self.now -= size


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made in `call` take at once: activations, logits and KV cache, without weights."""
    with torch.no_grad(), LiveTensors() as live:
        call()
    return live.peak


@torch.no_grad()
def kv_bytes(model, inputs: Mapping[str, Any], **choice: Any) -> int:
    """
    Size of the keys and values that a batch of prompts leaves in the cache. Layers without them, such as those of
    linear attention, count nothing, and windows what they hold.

    Args:
        model ([`TPRLForConditionalGeneration`]): The model, with whatever pruner it uses at the moment.
        inputs (`Mapping[str, Any]`): The batch as the processor returned it.
        choice: The budget as `forward` takes it.
    """
    layers = model(**inputs, **choice, use_cache=True, logits_to_keep=1).past_key_values.layers
    held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(one.nbytes for one in held if one is not None)


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

    return {
        "vision": lambda: model.encode_images(**inputs),
        "pruner": lambda: model.prune(**inputs, visual_features=features, num_keep=num_keep),
        "prefill unpruned": lambda: prefill(prune=False),
        "prefill pruned": lambda: prefill(keep_mask=plan.keep_mask),
        "prefill floor": lambda: model.lvlm(inputs_embeds=embeddings, logits_to_keep=1),
        **{f"answer {name}": call for name, call in answer_calls(model, inputs, num_keep, new_tokens).items()},
    }


def answer_calls(model, inputs: Mapping[str, Any], num_keep: int, new_tokens: int) -> dict[str, Callable[[], Any]]:
    """Whole answers of a batch, from pixels to the last of `new_tokens` tokens, "unpruned" and "pruned"."""

    def answer(**choice: Any) -> Any:
        return model.generate(
            **inputs,
            **choice,
            **GREEDY,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            stop_strings=None,  # of the checkpoint: all answers are as long
        )

    return {"unpruned": lambda: answer(prune=False), "pruned": lambda: answer(num_keep=num_keep)}


def pruner_calls(
    model, inputs: Mapping[str, Any], num_keep: int, pruners: Mapping[str, TokenPruner]
) -> dict[str, Callable[[], Any]]:
    """
    What each pruner costs before the LLM runs on the kept tokens, for one batch of prompts.

    Args:
        model ([`TPRLForConditionalGeneration`]): The model.
        inputs (`Mapping[str, Any]`): The batch as the processor returned it.
        num_keep (`int`): Visual tokens to keep of each prompt.
        pruners (`Mapping[str, TokenPruner]`): By name.

    Returns:
        `dict[str, Callable]`: "tower" (vision tower and projector as the base model runs them) and "prefill" (the LLM
        on the unpruned prompt); "tower NAME" and "choose NAME" for each pruner, of which some make the tower eager.
    """
    features = model.encode_images(**inputs, with_attention=False)

    def encode(pruner: TokenPruner) -> VisualFeatures:
        return model.encode_images(**inputs, with_attention=pruner.needs_attention)

    def choose(pruner: TokenPruner, own: VisualFeatures) -> Any:
        with model.using(pruner):
            return model.prune(**inputs, visual_features=own, num_keep=num_keep)

    calls: dict[str, Callable[[], Any]] = {
        "tower": lambda: model.encode_images(**inputs, with_attention=False),
        "prefill": lambda: model(**inputs, visual_features=features, prune=False, logits_to_keep=1),
    }
    for name, pruner in pruners.items():
        calls[f"tower {name}"] = functools.partial(encode, pruner)
        calls[f"choose {name}"] = functools.partial(choose, pruner, encode(pruner))
    return calls


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
