"""What training a policy costs: tokens that the LLM reads, images that the tower encodes, bytes of their features.

`python -m tprl_hf.evaluation.training_costs`

plans the paper's recipe with LLaVA-1.5-7B on one H100. The same arithmetic, with the speed of the machine at hand, is
what `tprl train` prints before it starts.
"""

import argparse
from dataclasses import dataclass, fields
from typing import Any

from tprl_hf.training import AutoencoderConfig, LfDConfig, TPRLPPOConfig

# Of a token that is still there, before the discount of its step: what the review of the paper's recipe assumed.
KEEP_PROBABILITY = 0.7
# Of questions whose first rollouts differ, so that GRPO with probes scores all: 0.22 in docs/results/paper/rival.
SHARE_SCORED = 0.25


@dataclass
class Prompts:
    """
    How long the prompts of a dataset are.

    Args:
        visual, text (`float`): tokens of one, on average; `text` with the answer.
        images (`float`): images of one question, on average, which no other question has.
    """

    visual: float
    text: float
    images: float = 1.0


@dataclass
class Work:
    """
    What a stage does.

    Args:
        images (`float`): passes through processor, vision tower and projector.
        llm_tokens (`float`): that the LLM reads without a gradient; with one, three times as many are counted.
        policy_tokens (`float`): visual tokens that policy or autoencoder read to learn.
        updates (`float`): steps of the optimizer.
        read_bytes (`float`): of features that come from a cache. They are read ahead, while the LLM works.
    """

    images: float = 0.0
    llm_tokens: float = 0.0
    policy_tokens: float = 0.0
    updates: float = 0.0
    read_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass
class Speed:
    """Seconds for each unit of [`Work`]."""

    image: float
    llm_token: float
    policy_token: float = 0.0
    update: float = 0.0
    read_byte: float = 0.0

    def seconds(self, work: Work) -> float:
        """What a stage takes: one thing after the other, and reading beside it."""
        computing = (
            work.images * self.image
            + work.llm_tokens * self.llm_token
            + work.policy_tokens * self.policy_token
            + work.updates * self.update
        )
        return max(computing, work.read_bytes * self.read_byte)


def kept_in_rollouts(config: Any) -> list[float]:
    """The fraction of visual tokens in each keep mask that is scored at a visit of a question, without unpruned."""
    copies = config.num_generations
    if probes := getattr(config, "num_probes", 0):
        copies = round(probes + SHARE_SCORED * (copies - probes))
    budgets: list[float] = getattr(config, "rollout_keep_ratios", None) or []
    if hasattr(config, "num_flips"):
        return [sum(budgets) / len(budgets)] * copies * (1 + config.num_flips)
    kept, left = [], 1.0
    for step in range(config.num_steps):
        if budgets:
            left = sum(budgets) / len(budgets) if step == config.num_steps - 1 else left * 0.5
        else:
            left *= KEEP_PROBABILITY * config.lambda_disc**step
        kept.append(left)
    return (kept if getattr(config, "score_every_step", True) else kept[-1:]) * copies


def scores_unpruned(config: Any) -> bool:
    """Whether an algorithm scores unpruned prompts: once for each question."""
    if isinstance(config, TPRLPPOConfig):
        return True
    return not hasattr(config, "num_flips") and getattr(config, "score_every_step", True)


def rollout_work(config: Any, questions: int, prompts: Prompts, bytes_of_image: float, hits: float) -> Work:
    """Of a stage that learns from rollouts; `hits` is the share of features that a cache keeps."""
    asked = config.per_device_train_batch_size
    updates = config.passes_per_buffer * config.num_mini_batches
    buffers = config.num_train_epochs * max(questions // asked, 1)
    if config.max_steps > 0:
        buffers = config.max_steps / updates
    visits = buffers * asked
    kept = kept_in_rollouts(config)
    if config.max_llm_passes:
        visits = min(visits, config.max_llm_passes / len(kept))
    met = min(visits, questions)
    unpruned = met * (prompts.visual + prompts.text) if scores_unpruned(config) else 0.0
    repeated = max(visits - questions, 0) * prompts.images
    steps = getattr(config, "num_steps", 1) * config.num_generations * config.passes_per_buffer
    return Work(
        images=met * prompts.images + repeated * (1 - hits),
        llm_tokens=visits * (sum(kept) * prompts.visual + len(kept) * prompts.text) + unpruned,
        policy_tokens=visits * prompts.visual * steps,
        updates=visits / asked * updates,
        read_bytes=repeated * hits * bytes_of_image,
    )


def supervised_work(config: Any, rows: int, prompts: Prompts, bytes_of_image: float, hits: float) -> Work:
    """Of the autoencoder and of learning from demonstrations."""
    samples = config.num_train_epochs * rows
    if config.max_steps > 0:
        samples = config.max_steps * config.per_device_train_batch_size
    repeated = max(samples - rows, 0) * prompts.images
    return Work(
        images=min(samples, rows) * prompts.images + repeated * (1 - hits),
        policy_tokens=samples * prompts.visual,
        updates=samples / config.per_device_train_batch_size,
        read_bytes=repeated * hits * bytes_of_image,
    )


def noise_gate_work(config: Any, questions: int, prompts: Prompts, bytes_of_image: float, hits: float) -> Work:
    """Of noise gates: the LLM reads each prompt forwards and backwards, with all its visual tokens."""
    work = supervised_work(config, questions, prompts, bytes_of_image, hits)
    visits = work.updates * config.per_device_train_batch_size
    return work + Work(llm_tokens=3 * visits * (prompts.visual + prompts.text))


def demonstration_work(teacher: str, rows: int, prompts: Prompts) -> Work:
    """Of a teacher; one that knows the answer runs the LLM forwards and backwards."""
    reads = {"gradient": 3.0, "leave-out": prompts.visual / 4}.get(teacher, 0.0)
    return Work(images=rows * prompts.images, llm_tokens=rows * reads * (prompts.visual + prompts.text))


def evaluation_work(config: Any, rows: int, times: float, prompts: Prompts, hits: float) -> Work:
    """Of `times` evaluations of the policy on `rows` samples."""
    ratios = config.eval_keep_ratios
    tokens = sum(ratios) * prompts.visual + len(ratios) * prompts.text
    images = rows * prompts.images * (1 + (times - 1) * (1 - hits)) if times else 0.0
    return Work(images=images, llm_tokens=times * rows * tokens)


def plan_paper(
    questions: int, epochs: float, speed: Speed, score_every_step: bool = True
) -> list[tuple[str, Work, float]]:
    """Each stage of recipes/paper.yaml with LLaVA-1.5-7B and a cache of all features: its work and its hours."""
    prompts, size = Prompts(visual=576, text=65), 576 * 4096 * 2.0
    ppo = TPRLPPOConfig("x", num_steps=3, lambda_disc=0.5, num_train_epochs=epochs, score_every_step=score_every_step)
    filled = Work(images=-questions, read_bytes=questions * size)  # by the first stage
    stages = {
        "autoencoder": supervised_work(AutoencoderConfig("x"), questions, prompts, size, 1.0),
        "demonstrations": demonstration_work("vispruner", questions, prompts),  # with attention: not from the cache
        "lfd": supervised_work(LfDConfig("x"), questions, prompts, size, 1.0) + filled,
        "ppo": rollout_work(ppo, questions, prompts, size, 1.0) + filled,
    }
    return [(name, work, speed.seconds(work) / 3600) for name, work in stages.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=50_000, help="each about an image of its own")
    parser.add_argument("--epochs", type=float, default=200, help="of PPO: passes over the questions")
    parser.add_argument("--parameters", type=float, default=6.74e9, help="of the LLM")
    parser.add_argument("--tflops", type=float, default=400, help="sustained, of the LLM")
    parser.add_argument("--images-per-second", type=float, default=33, help="through processor and tower")
    parser.add_argument("--read-gb", type=float, default=2, help="a second, of the disk with the cache")
    parser.add_argument("--update-ms", type=float, default=15, help="an optimizer step of the policy")
    parser.add_argument("--last-masks", action="store_true", help="with ppo.score_every_step=false")
    given = parser.parse_args()
    speed = Speed(
        image=1 / given.images_per_second,
        llm_token=2 * given.parameters / (given.tflops * 1e12),
        update=given.update_ms / 1000,
        read_byte=1 / (given.read_gb * 1e9),
    )
    plan = plan_paper(given.questions, given.epochs, speed, not given.last_masks)
    print(
        f"{'stage':15} {'images':>8} {'LLM tokens':>11} {'updates':>9} {'TB read':>8} {'MB/s read':>10} {'hours':>7}"
    )
    for name, work, hours in plan:
        rate = work.read_bytes / 1e6 / max(hours * 3600, 1e-9)
        print(
            f"{name:15} {work.images:8.3g} {work.llm_tokens:11.3g} {work.updates:9.3g} {work.read_bytes / 1e12:8.3g} "
            f"{rate:10.0f} {hours:7.1f}"
        )
    print(f"{'sum':65} {sum(hours for _, _, hours in plan):7.1f}")


if __name__ == "__main__":
    main()
