"""How long the stages of a recipe will take on this machine: their work by arithmetic, its speed by a short trial."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tprl_hf.training.stages import STAGES

if TYPE_CHECKING:
    from tprl_hf.evaluation.training_costs import Prompts, Speed
    from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration

TRIED = 4  # questions of the trial
LOOKED_AT = 60  # questions whose images are counted


def expected_seconds(
    stages: list[str], recipe: dict[str, Any], model: "TPRLForConditionalGeneration", processor: Any
) -> dict[str, float]:
    """
    What each stage is expected to take, by its name; `tune`, which TRL trains, is left out.

    Args:
        stages (`list[str]`): those of the recipe that are to run.
        model, processor: what the first of them starts with.
    """
    from tprl_hf.pictures import images_of
    from tprl_hf.training.answer_batches import undecoded

    from .train import read_source, sources_of, training_data

    name = training_data(STAGES[stages[0]].learns_from or stages[0], recipe)
    looked_at = undecoded(read_source(sources_of(recipe, name)[0], name, LOOKED_AT))
    rows = [row for row in map(looked_at.__getitem__, range(len(looked_at))) if images_of(row)]
    if not rows:
        return {}
    prompts, speed = trial(model, processor, rows)
    size = prompts.visual * model.config.token_dim * model.lvlm.dtype.itemsize
    return {stage: speed.seconds(work_of(stage, recipe, prompts, size)) for stage in stages if stage != "tune"}


def work_of(stage: str, recipe: dict[str, Any], prompts: "Prompts", size: float) -> Any:
    """The work of a stage; `size` is that of a question's features, in bytes."""
    from tprl_hf.evaluation import training_costs as costs

    from .train import make_config, training_data

    source = STAGES[stage].learns_from
    if stage == "demonstrations" or source == "demonstrations":
        name = training_data("demonstrations", recipe)
        count = recipe.get("demonstrations", {}).get("num_samples") or num_rows(recipe, name)
        if stage == "demonstrations":
            return costs.demonstration_work(recipe[stage].get("teacher", "vispruner"), count, prompts)
    else:
        count = num_rows(recipe, training_data(stage, recipe))
    config = make_config(stage, recipe)
    hits = min(1.0, config.feature_cache_mb * 2**20 / (count * prompts.images * size))
    count_work = costs.rollout_work if STAGES[stage].takes_rewards else costs.supervised_work
    if stage == "noise_gate":
        count_work = costs.noise_gate_work
    work = count_work(config, count, prompts, size, hits)
    if stage == "autoencoder" or "validation" not in recipe.get("data", {}):
        return work
    times = 2.0  # at the start and at the end
    if config.eval_strategy == "steps" and config.eval_steps >= 1:
        times += work.updates // config.eval_steps
    return work + costs.evaluation_work(config, num_rows(recipe, "validation"), times, prompts, hits)


def num_rows(recipe: dict[str, Any], name: str) -> int:
    """How many samples `data.NAME` has; they are loaded only where the recipe does not say it."""
    from .train import load_data, sources_of

    sources = sources_of(recipe, name)
    counts = [int(source["num_samples"]) for source in sources if source.get("num_samples")]
    return sum(counts) if len(counts) == len(sources) else len(load_data(recipe, name))


def trial(
    model: "TPRLForConditionalGeneration", processor: Any, rows: list[dict[str, Any]]
) -> tuple["Prompts", "Speed"]:
    """Lengths of the prompts of some rows, and how fast this machine encodes, reads and learns from a few of them."""
    import torch

    from tprl_hf.evaluation.training_costs import Prompts, Speed
    from tprl_hf.pictures import image_digest
    from tprl_hf.training.answer_batches import SampleEncoder
    from tprl_hf.training.rollouts import policy_on_trajectories

    images = {image_digest(row): row for row in rows}
    some = list(images.values())[:TRIED]
    encoder = SampleEncoder(model, processor)
    encoding = seconds_of(lambda: SampleEncoder(model, processor).encode_rows(some), model.device)
    batch = encoder(some)
    visual = sum(sample.num_visual for sample in batch.samples)
    prompt_tokens = sum(len(sample.prompt_ids) for sample in batch.samples)
    answers = sum(0 if sample.answer_ids is None else len(sample.answer_ids) for sample in batch.samples)
    text = prompt_tokens - visual + answers
    everyone = torch.arange(len(some), device=model.device)
    model.policy.requires_grad_(True)  # PEFT freezes all that is loaded with a LoRA; a trainer says what it trains

    def read() -> None:
        with torch.no_grad():
            keep_mask = batch.inputs.valid[batch.inputs.valid]
            model(**batch.prompts(everyone.tolist()), keep_mask=keep_mask, use_cache=False, logits_to_keep=1)

    def learn() -> None:
        inputs = replace(batch.inputs, keep_ratio=torch.full((len(some),), 0.5, device=model.device))
        codes = model.autoencoder.encode(inputs.tokens)
        output = policy_on_trajectories(model.policy, codes, inputs, everyone, [inputs.valid])
        output.logits.sum().backward()
        model.zero_grad()

    prompts = Prompts(visual / len(some), text / len(some), len(images) / len(rows))
    speed = Speed(
        image=encoding / len(some),
        llm_token=seconds_of(read, model.device) / prompt_tokens,
        policy_token=seconds_of(learn, model.device) / max(visual, 1),
    )
    return prompts, speed


def seconds_of(call: Callable[[], Any], device: Any) -> float:
    """Of the second of two calls; the first one warms up."""
    import torch

    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - started
    return seconds
