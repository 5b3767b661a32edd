"""Train Photo-LLaVA from its parts: `python -m tprl_hf.test_bed.photo_train --output-dir DIR`.

1. The parts are fetched where they are missing, and joined (`photo_parts.py`).
2. The projector alone learns to say of each patch of the picture, in word embeddings of the LLM, what it shows and
   where it lies (`photo_model.py`).
3. Projector and corrections of the LLM learn to answer packed questions, first from few visual tokens: all patches of
   things and some others; from `full_share` on from all 256. A loss draws heads of the LLM that match words, also
   before any training, to the things asked about; its weight falls to zero. From the nouns of a question linear
   readings ask where their things lie, and from the second noun which of two lies first.

Processes average their gradients (gloo), one thread each. The state is saved every few minutes, atomically; the same
command resumes from it, with the batches that an unbroken run would see.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaAttention

from tprl_hf.data.photo import photo_directory, photo_scenes, pictures_root

from .photo_batches import ANSWER, IGNORE, NOUN, PhotoBatch, label_scene, pack, training_batches
from .photo_model import (
    align_projector,
    freeze_and_correct,
    load_trained,
    put_together,
    save_trained,
    tower_features,
    trained_weights,
)
from .photo_parts import PATCHES_PER_SIDE, PartMissingError, build_untrained
from .training_run import (
    Moments,
    average_gradients,
    config_of,
    join_processes,
    leave_processes,
    load_moments,
    read_state,
    run_processes,
    write_state,
)

# Heads of SmolLM2, by layer, that look from a word at the same word before it (those of layer 9 also at things of a
# kind), also before any training: 30 to 45 % of their attention. What predicts the answer has to learn it.
MATCHING_HEADS: dict[int, dict[int, tuple[int, ...]]] = {
    NOUN: {8: (0,), 9: (0, 2), 15: (6,)},
    ANSWER: {17: (3, 4), 18: (6, 7)},
}
NOUN_READ, ORDER_READ = 11, 15  # hidden states, counted from the embeddings as 0, that the readings take
TYPE = torch.bfloat16
LATER_TOKENS = 0.3  # weight of an answer's end beside its first token


@dataclass
class PhotoLVLMConfig:
    """
    Settings of the recipe; the defaults are those of the shipped weights.

    Args:
        output_dir (`str`): Where the trained weights, the log and the resumable state go.
        seed (`int`): Of the corrections' start and of the training scenes (never those of validation and test).
        steps (`int`): Steps of the optimizer. A resumed run may have fewer, to end sooner: rate and tokens follow.
        num_processes (`int`): Processes of one thread each.
        scenes (`int`): Scenes in a process's batch, about fourteen questions each.
        full_share (`float`): Share of the steps after which a batch has all visual tokens.
        learning_rate, projector_learning_rate (`float`): Peaks, of the corrections and of the projector.
        warmup_steps (`int`): Steps until the peak.
        grounding_weight (`float`), grounding_share (`float`): First weight of the loss on the LLM's attention, and the
            share of the steps after which it is zero.
        reading_weight (`float`): Weight of reading places and orders from the LLM.
        validation_scenes (`int`), validate_every (`int`): Scenes, seven questions each, and steps between validations.
        save_minutes (`float`), log_steps (`int`): Minutes between saved states, and steps between log lines.
        start_from (`str`): A file of trained weights to continue from, in place of the projector's training alone.
        smallest_side (`int`): Patches a side of the smallest pictures in training, 16 at full size, which a third of
            the batches has. The others have one of the sizes between, the smaller more often.
    """

    output_dir: str
    seed: int = 0
    steps: int = 1000
    num_processes: int = 2
    scenes: int = 2
    full_share: float = 0.65
    learning_rate: float = 6e-4
    projector_learning_rate: float = 2e-4
    warmup_steps: int = 60
    grounding_weight: float = 0.3
    grounding_share: float = 0.8
    reading_weight: float = 0.5
    validation_scenes: int = 50
    validate_every: int = 150
    save_minutes: float = 8.0
    log_steps: int = 10
    start_from: str = ""
    smallest_side: int = PATCHES_PER_SIDE

    def __post_init__(self) -> None:
        if not 1 <= self.smallest_side <= PATCHES_PER_SIDE:
            raise ValueError(f"smallest_side is a number from 1 to {PATCHES_PER_SIDE}, got {self.smallest_side}.")


class ReadingHeads(nn.Module):
    """Linear readings of the LLM that training needs, thrown away afterwards."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.noun_norm, self.order_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.place, self.order = nn.Linear(hidden_size, 2), nn.Linear(hidden_size, 2)

    def forward(self, hidden_states: tuple[torch.Tensor, ...], batch: PhotoBatch) -> torch.Tensor:
        """Loss of reading where a noun's thing lies, and which of two things lies first, at the second noun.

        Whether "left of" is correct is an exclusive or of relation and order: a model that is not told the order keeps
        guessing.
        """
        loss = torch.zeros(())
        if len(batch.noun_rows):
            found = hidden_states[NOUN_READ][batch.noun_rows[:, 0], batch.noun_rows[:, 1]]
            loss = loss + 2 * F.mse_loss(self.place(self.noun_norm(found.float())), batch.noun_places)
        if len(batch.order_rows):
            compared = hidden_states[ORDER_READ][batch.order_rows[:, 0], batch.order_rows[:, 1]]
            guesses = self.order(self.order_norm(compared.float()))
            loss = loss + F.binary_cross_entropy_with_logits(guesses, batch.orders)
        return loss


def grounding_losses(attention: LlamaAttention, heads: tuple[int, ...], role: int, arguments: dict, batch: PhotoBatch):
    """-log of the attention that some heads of a layer pay to the things asked about, `[Q', H]`.

    Only the rows asked for are computed, from what the layer was called with.
    """
    mine = batch.look_rows[:, 2] == role
    samples, rows = batch.look_rows[mine, 0], batch.look_rows[mine, 1]
    hidden = arguments["hidden_states"]
    cos, sin = (table.expand(len(hidden), -1, -1) for table in arguments["position_embeddings"])

    def turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        low, high = states.chunk(2, dim=-1)
        return states * cos[..., None, :] + torch.cat([-high, low], dim=-1) * sin[..., None, :]

    size, group = attention.head_dim, attention.num_key_value_groups
    query = attention.q_proj(hidden[samples, rows]).unflatten(-1, (-1, size))[:, list(heads)]
    keys = attention.k_proj(hidden).unflatten(-1, (-1, size))[:, :, [head // group for head in heads]]
    query, keys = turned(query, cos[samples, rows], sin[samples, rows]), turned(keys, cos, sin)
    scores = torch.einsum("qhd,qlhd->qhl", query.float(), keys.float()[samples]) * attention.scaling
    weights = (scores + arguments["attention_mask"][samples, 0, rows].float()[:, None]).softmax(-1)
    return -((weights * batch.look_targets[mine][:, None]).sum(-1) + 1e-6).log()


@dataclass
class AnswerLosses:
    """Losses of a batch; by row of `labels` that is not -100, its logits' guess; by answer, its first token's loss."""

    answer: torch.Tensor
    grounding: torch.Tensor
    reading: torch.Tensor
    guesses: torch.Tensor


def answer_losses(
    model: LlavaForConditionalGeneration, heads: ReadingHeads, batch: PhotoBatch, with_grounding: bool = False
) -> AnswerLosses:
    """Cross-entropy of the answers, and the auxiliary losses of the LLM; `grounding` is zero unless asked for."""
    llm = model.model.language_model
    image = model.model.multi_modal_projector(tower_features(model, batch.pixel_values).float())
    embeds = model.get_input_embeddings()(batch.input_ids)
    embeds = embeds.masked_scatter(batch.visual[..., None], image[batch.kept].to(embeds.dtype))
    called: dict[int, dict] = {}

    def remember(module: LlamaAttention, args: tuple, kwargs: dict) -> None:
        called[module.layer_idx] = kwargs

    grounded = [(role, layer) for role in MATCHING_HEADS for layer in MATCHING_HEADS[role]] if with_grounding else []
    hooks = [llm.layers[i].self_attn.register_forward_pre_hook(remember, with_kwargs=True) for _, i in grounded]
    output = llm(
        inputs_embeds=embeds,
        attention_mask=batch.attention_mask(embeds.dtype),
        position_ids=batch.position_ids,
        output_hidden_states=True,
        use_cache=False,
    )
    for hook in hooks:
        hook.remove()
    asked = batch.labels != IGNORE
    logits = model.lm_head(output.last_hidden_state[asked]).float()
    weight = torch.where(batch.first[asked], 1.0, LATER_TOKENS)
    answer = (F.cross_entropy(logits, batch.labels[asked], reduction="none") * weight).sum() / weight.sum()
    grounding = torch.zeros(())
    for role, layer in grounded:
        attention = llm.layers[layer].self_attn
        losses = grounding_losses(attention, MATCHING_HEADS[role][layer], role, called[layer], batch)
        grounding = grounding + losses.mean() / len(grounded)
    guesses = torch.full_like(batch.labels, IGNORE)
    guesses[asked] = logits.argmax(-1)
    return AnswerLosses(answer, grounding, heads(output.hidden_states, batch), guesses)


def score(batch: PhotoBatch, guesses: torch.Tensor) -> dict[str, list[float]]:
    """By question type, whether each answer is correct: all its tokens, teacher-forced, which is greedy decoding."""
    hits = guesses == batch.labels
    correct: dict[str, list[float]] = defaultdict(list)
    for question_type, (i, first, stop) in zip(batch.question_types, batch.answer_rows, strict=True):
        correct[question_type].append(hits[i, first:stop].all().float().item())
    return correct


@torch.inference_mode()
def evaluate(model: LlavaForConditionalGeneration, heads: ReadingHeads, batches: list[PhotoBatch]) -> dict[str, float]:
    """Accuracy by question type, with all visual tokens."""
    correct: dict[str, list[float]] = defaultdict(list)
    for batch in batches:
        for name, hits in score(batch, answer_losses(model, heads, batch).guesses).items():
            correct[name] += hits
    every = [hit for hits in correct.values() for hit in hits]
    return {name: sum(hits) / len(hits) for name, hits in sorted(correct.items())} | {"all": sum(every) / len(every)}


def save_state(path: Path, modules: nn.Module, optimizer: torch.optim.Optimizer | None, step: int) -> None:
    """Write what is trained and the optimizer's moments in one safetensors file, atomically; the step as metadata."""
    weights = {name: value for name, value in modules.named_parameters() if value.requires_grad}
    write_state(path, weights, optimizer, {"step": str(step)})


def load_state(path: Path, modules: nn.Module) -> tuple[int, Moments]:
    """Load what is trained in place; return the step and the optimizer's state by parameter."""
    progress, weights, moments = read_state(path)
    parameters = {name: value for name, value in modules.named_parameters() if value.requires_grad}
    if weights.keys() != parameters.keys():
        other = sorted(weights.keys() ^ parameters.keys())[:3]
        raise ValueError(f"{path} is of another model ({other}); delete it to restart.")
    modules.load_state_dict(weights, strict=False)
    return int(progress["step"]), moments


def rate_at(step: int, config: PhotoLVLMConfig) -> float:
    """The share of the peak learning rate at a step: up in a line, down as a cosine to 2 %."""
    return min(1.0, (step + 1) / config.warmup_steps) * max(0.5 * (1 + math.cos(math.pi * step / config.steps)), 0.02)


def train_answers(
    config: PhotoLVLMConfig,
    model: LlavaForConditionalGeneration,
    heads: ReadingHeads,
    tokenizer: PreTrainedTokenizerBase,
    validation: list[PhotoBatch],
    rank: int,
) -> None:
    """Train from the start or from the saved state to the last step."""
    directory = Path(config.output_dir)
    state_path = directory / "state.safetensors"
    modules = nn.ModuleDict({"lvlm": model, "heads": heads})
    projector = list(model.model.multi_modal_projector.parameters())
    others = [value for value in model.model.language_model.parameters() if value.requires_grad]
    groups = [
        {"params": [*others, *heads.parameters()], "peak": config.learning_rate},
        {"params": projector, "peak": config.projector_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    step = 0
    if state_path.exists():
        step, moments = load_state(state_path, modules)
        load_moments(optimizer, moments)
    full_from = round(config.full_share * config.steps)
    batches = training_batches(
        tokenizer,
        pictures_root(),
        config.scenes,
        config.seed,
        rank,
        config.num_processes,
        step,
        full_from,
        config.smallest_side,
    )
    sums: dict[str, float] = defaultdict(float)
    correct: dict[str, list[float]] = defaultdict(list)
    since, since_step, saved, processor_time = time.monotonic(), step, time.monotonic(), time.process_time()
    for batch in islice(batches, max(0, config.steps - step)):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_at(step, config)
        weight = max(0.0, config.grounding_weight * (1 - step / (config.grounding_share * config.steps)))
        losses = answer_losses(model, heads, batch, weight > 0)
        loss = losses.answer + weight * losses.grounding + config.reading_weight * losses.reading
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"The gradient's norm is {norm.item()} at step {step}; the last good state is in {state_path}. Lower "
                f"the learning rate, {config.learning_rate}, and run the same command again."
            )
        optimizer.step()
        step += 1
        if rank != 0:
            continue
        for name, value in (
            ("answer", losses.answer),
            ("grounding", losses.grounding),
            ("reading", losses.reading),
            ("norm", norm),
        ):
            sums[name] += value.item()
        for name, hits in score(batch, losses.guesses).items():
            correct[name] += hits
        if step % config.log_steps == 0:
            passed = step - since_step
            line: dict = {"step": step, "rate": round(optimizer.param_groups[0]["lr"], 7)}
            line["seconds"] = round((time.monotonic() - since) / passed, 2)
            line["processor_seconds"] = round((time.process_time() - processor_time) / passed, 2)
            line |= {name: round(value / passed, 4) for name, value in sums.items()}
            line["correct"] = {name: round(sum(hits) / len(hits), 2) for name, hits in sorted(correct.items())}
            if step % config.validate_every == 0 and step < config.steps:  # `train` measures the last one
                found = evaluate(model, heads, validation)
                line["validation"] = {name: round(value, 3) for name, value in found.items()}
            with open(directory / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            print(f"{step} of {config.steps}", json.dumps(line), flush=True)
            sums.clear()
            correct.clear()
            since, since_step, processor_time = time.monotonic(), step, time.process_time()
        if time.monotonic() - saved > 60 * config.save_minutes:
            save_state(state_path, modules, optimizer, step)
            saved = time.monotonic()
    if rank == 0:
        save_state(state_path, modules, None, step)


def train(rank: int, config: PhotoLVLMConfig, untrained: Path, port: int) -> None:
    """One process of the training."""
    torch.set_num_threads(1)
    directory = Path(config.output_dir)
    model = LlavaForConditionalGeneration.from_pretrained(untrained, dtype=TYPE)
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    freeze_and_correct(model, config.seed)
    aligned = Path(config.start_from) if config.start_from else directory / "aligned.safetensors"
    if rank == 0 and not aligned.exists() and not config.start_from:
        align_projector(model, tokenizer, pictures_root())
        unfinished = aligned.with_suffix(".tmp")
        save_file({name: value.contiguous() for name, value in trained_weights(model).items()}, unfinished)
        os.replace(unfinished, aligned)
    join_processes(rank, config.num_processes, port)
    with safe_open(aligned, "pt") as file:
        load_trained(model, {name: file.get_tensor(name) for name in file.keys()})
    torch.manual_seed(config.seed)
    heads = ReadingHeads(model.config.text_config.hidden_size)
    validation = []
    if rank == 0:
        scenes = [
            label_scene(scene, questions)
            for _, scene, questions in islice(photo_scenes("validation", 0, pictures_root()), config.validation_scenes)
        ]
        validation = [pack(scenes[start : start + 5], tokenizer) for start in range(0, len(scenes), 5)]
    train_answers(config, model, heads, tokenizer, validation, rank)
    if rank == 0:
        scores = evaluate(model, heads, validation)
        print("validation", json.dumps(scores))
        save_trained(model, directory / "trained.safetensors")
        put_together(untrained, directory / "trained.safetensors", directory / "model")
        (directory / "training.json").write_text(
            json.dumps({"config": asdict(config) | {"output_dir": "."}, "validation": scores}, indent=2) + "\n"
        )
    leave_processes()


def main() -> int:
    config = config_of(PhotoLVLMConfig, __doc__)
    try:
        untrained = build_untrained(photo_directory())
    except PartMissingError as error:
        print(error, file=sys.stderr)
        return 1
    run_processes(train, config.num_processes, config, untrained)
    return 0


if __name__ == "__main__":
    sys.exit(main())
