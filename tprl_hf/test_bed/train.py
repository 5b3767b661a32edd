"""Train the embedded LVLM from nothing: `python -m tprl_hf.test_bed.train --output-dir DIR`.

Two phases, each as long as it is told in minutes:

1. *tower*: the vision tower learns to say what each patch shows (shape, colour, digit, center of an object) and where
   it lies, and its CLS token which objects the image holds.
2. *joint*: the whole model learns to answer packed questions, the tower's own losses staying on. From the
   nouns of a relation a linear reading asks where their objects lie. In the first half a loss draws two heads of the
   second and third LLM layers to the objects asked about; its weight falls to zero there.

Processes average their gradients (gloo), one thread each. The state is saved every few minutes, atomically; the same
command resumes from it. The learning rate follows the time spent, so that a run ends when it should on any machine.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaAttention

from tprl_hf.data.easy import EasyVQAImage, easy_vqa_images
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration

from .batches import (
    ANSWER_LAYER,
    CLS_CLASSES,
    IGNORE,
    NOUN_LAYER,
    PATCH_COLORS,
    PATCH_KINDS,
    PackedBatch,
    easy_image,
    mosaic_image,
    pack,
    training_batches,
)
from .model import PATCH_SIZE, PATCHES_PER_SIDE, build_lvlm, build_processor
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


@dataclass
class MosaicLVLMConfig:
    """
    Settings of the recipe; the defaults are those of the shipped checkpoint.

    Args:
        output_dir (`str`): Where the finished model, its log and the resumable state go.
        seed (`int`): Of the weights and of the training scenes (never those of validation and test).
        tower_minutes, joint_minutes (`float`): Length of the two phases.
        num_processes (`int`): Processes of one thread each.
        mosaic_images, easy_images (`int`): Images of each kind in a process's batch.
        tower_learning_rate (`float`): Peak in the tower phase.
        learning_rate, joint_tower_learning_rate (`float`): Peaks in the joint phase, of projector and LLM, and of the
            tower.
        grounding_weight (`float`), grounding_share (`float`): First weight of the loss on the LLM's attention, and the
            share of the joint phase after which it is zero.
        relation_weight (`float`): Weight of reading a relation's objects from the LLM.
        patch_weight (`float`): Weight of the tower's own losses in the joint phase.
        save_every (`float`), log_every (`float`): Minutes between saved states, and between log lines.
        start_from (`str`): A merged checkpoint whose LVLM is trained further, in place of a new one. The finished
            model keeps its policy.
        smallest_side (`int`): Patches a side of the smallest pictures in training, 12 at full size, which a third of
            the batches has. The others have one of the sizes between, the smaller more often.
    """

    output_dir: str
    seed: int = 0
    tower_minutes: float = 4.0
    joint_minutes: float = 53.0
    num_processes: int = 2
    mosaic_images: int = 6
    easy_images: int = 2
    tower_learning_rate: float = 1e-3
    learning_rate: float = 2e-3
    joint_tower_learning_rate: float = 4e-4
    grounding_weight: float = 0.5
    grounding_share: float = 0.5
    relation_weight: float = 1.0
    patch_weight: float = 0.3
    save_every: float = 3.0
    log_every: float = 1.0
    start_from: str = ""
    smallest_side: int = PATCHES_PER_SIDE

    def __post_init__(self) -> None:
        if not 1 <= self.smallest_side <= PATCHES_PER_SIDE:
            raise ValueError(f"smallest_side is a number from 1 to {PATCHES_PER_SIDE}, got {self.smallest_side}.")


GROUNDED_HEADS = 2
PHASES = ("tower", "joint")
# The last images of easy-VQA's own training split are never trained on: they validate.
HELD_OUT_EASY = 200
VALIDATION_IMAGES = (160, 40)  # of Mosaic-VQA and easy-VQA, during training


class ReadingHeads(nn.Module):
    """Linear readings of tower and LLM that training needs, thrown away afterwards."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.kind = nn.Linear(hidden_size, len(PATCH_KINDS))
        self.color = nn.Linear(hidden_size, len(PATCH_COLORS))
        self.digit = nn.Linear(hidden_size, 20)  # tens, then ones
        self.center = nn.Linear(hidden_size, 1)
        self.row = nn.Linear(hidden_size, PATCHES_PER_SIDE)
        self.column = nn.Linear(hidden_size, PATCHES_PER_SIDE)
        self.present = nn.Linear(hidden_size, CLS_CLASSES)
        self.noun_norm = nn.LayerNorm(hidden_size)
        self.noun_place = nn.Linear(hidden_size, 2 * PATCHES_PER_SIDE)
        self.order_norm = nn.LayerNorm(hidden_size)
        self.order = nn.Linear(hidden_size, 2)

    def relation_loss(self, hidden_states: tuple[torch.Tensor, ...], batch: PackedBatch) -> torch.Tensor:
        """Loss of reading from the LLM where an object lies, at its noun, and which of two lies first, at the second.

        Whether "left of" is correct is an exclusive or of relation and order: a model that is not told the
        order keeps guessing.
        """
        rows, centers = batch.relation_rows, batch.relation_centers
        if len(rows) == 0:
            return torch.zeros(())
        found = self.noun_norm(hidden_states[NOUN_LAYER + 1])  # what leaves the layer in which nouns find objects
        place = (centers / PATCH_SIZE).long().clamp(max=PATCHES_PER_SIDE - 1)
        loss = torch.zeros(())
        for noun in range(2):
            guess = self.noun_place(found[rows[:, 0], rows[:, 1 + noun]]).unflatten(-1, (2, -1))
            loss = loss + F.cross_entropy(guess.flatten(0, 1), place[:, noun].flatten()) / 4
        compared = self.order_norm(hidden_states[ANSWER_LAYER + 1])[rows[:, 0], rows[:, 2]]
        first = (centers[:, 0] < centers[:, 1]).float()
        return loss + F.binary_cross_entropy_with_logits(self.order(compared), first)

    def losses(self, patches: torch.Tensor, cls: torch.Tensor, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Losses by name from the tower's last layer, `patches` `[B, N, D]` and normalized `cls` `[B, D]`."""
        hidden = self.norm(patches)
        # Three patches in four show background: a quarter of their weight goes to them.
        kind_weight = torch.ones(len(PATCH_KINDS))
        kind_weight[0] = 0.25
        side = math.isqrt(hidden.shape[1])
        # rows and columns are those of the full size, whatever the picture's
        ticks = (torch.arange(side) * 2 + 1) * PATCHES_PER_SIDE // (2 * side)
        row, column = (torch.cartesian_prod(ticks, ticks)[:, i].expand(len(hidden), -1) for i in range(2))
        known = batch.present != IGNORE
        return {
            "kind": F.cross_entropy(self.kind(hidden).transpose(1, 2), batch.kinds, kind_weight, ignore_index=IGNORE),
            "color": F.cross_entropy(self.color(hidden).transpose(1, 2), batch.colors, ignore_index=IGNORE),
            # small pictures may have no patch that shows a single digit
            "digit": F.cross_entropy(
                self.digit(hidden).transpose(1, 2), batch.digits, ignore_index=IGNORE, reduction="sum"
            )
            / (batch.digits != IGNORE).sum().clamp(min=1),
            "center": F.binary_cross_entropy_with_logits(self.center(hidden)[..., 0], batch.centers.float()),
            "place": 0.05 * F.cross_entropy(self.row(hidden).transpose(1, 2), row)
            + 0.05 * F.cross_entropy(self.column(hidden).transpose(1, 2), column),
            "present": F.binary_cross_entropy_with_logits(self.present(cls)[known], batch.present[known]),
        }

    @torch.no_grad()
    def accuracies(self, patches: torch.Tensor, batch: PackedBatch) -> dict[str, float]:
        """Share of the foreground patches whose kind, colour and digit are read rightly."""
        hidden = self.norm(patches)
        readings = {}
        for name, target in (("kind", batch.kinds), ("color", batch.colors), ("digit", batch.digits)):
            has_target = target > 0 if name == "kind" else target != IGNORE
            readings[name] = (getattr(self, name)(hidden).argmax(-1) == target)[has_target].float().mean().item()
        return readings


def run_tower(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What LLaVA takes from the tower, `[B, N, D]` (CLS dropped), and the normalized CLS token `[B, D]`."""
    output = model.model.vision_tower(pixel_values, output_hidden_states=True, interpolate_pos_encoding=True)
    return output.hidden_states[model.config.vision_feature_layer][:, 1:], output.pooler_output


def grounding_loss(attention: LlamaAttention, arguments: dict, batch: PackedBatch) -> torch.Tensor:
    """Mean of -log of the attention that the first heads of a Llama layer pay to the objects asked about.

    Only the rows asked for are computed, from what the layer was called with: eager attention, which shows all rows,
    costs half of the training's speed.
    """
    width = GROUNDED_HEADS * attention.head_dim
    of_layer = batch.grounding_rows[:, 2] == attention.layer_idx
    losses = []
    for i, hidden in enumerate(arguments["hidden_states"]):
        mine = of_layer & (batch.grounding_rows[:, 0] == i)
        rows = batch.grounding_rows[mine, 1]
        cos, sin = (table[i, :, None] for table in arguments["position_embeddings"])

        def turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            states = states.unflatten(-1, (GROUNDED_HEADS, -1))
            low, high = states.chunk(2, dim=-1)
            return states * cos + torch.cat([-high, low], dim=-1) * sin

        query = turned(F.linear(hidden[rows], attention.q_proj.weight[:width]), cos[rows], sin[rows])
        keys = turned(F.linear(hidden, attention.k_proj.weight[:width]), cos, sin)
        scores = torch.einsum("rhd,lhd->rhl", query, keys) * attention.scaling
        weights = (scores + arguments["attention_mask"][i, 0, rows][:, None]).softmax(-1)[..., 2 : batch.prefix_length]
        losses.append(-((weights * batch.grounding[mine, None]).sum(-1) + 1e-6).log())
    return torch.cat(losses).mean()


@dataclass
class AnswerLosses:
    """Losses of the joint phase that read the LLM, and its logits `[B, L, V]`."""

    answer: torch.Tensor
    grounding: torch.Tensor
    relation: torch.Tensor
    logits: torch.Tensor


def answer_losses(
    model: LlavaForConditionalGeneration,
    heads: ReadingHeads,
    patches: torch.Tensor,
    batch: PackedBatch,
    with_grounding: bool = False,
) -> AnswerLosses:
    """Cross-entropy of the answers, and the two auxiliary losses of the LLM; `grounding` is zero unless asked for."""
    embeds = model.get_input_embeddings()(batch.input_ids)
    image = model.model.multi_modal_projector(patches)
    embeds = torch.cat([embeds[:, :2], image, embeds[:, batch.prefix_length :]], dim=1)
    llm, grounded = model.model.language_model, (NOUN_LAYER, ANSWER_LAYER) if with_grounding else ()
    called: dict[int, dict] = {}

    def remember(module: LlamaAttention, args: tuple, kwargs: dict) -> None:
        called[module.layer_idx] = kwargs

    hooks = [llm.layers[i].self_attn.register_forward_pre_hook(remember, with_kwargs=True) for i in grounded]
    output = llm(
        inputs_embeds=embeds,
        attention_mask=batch.attention_mask(),
        position_ids=batch.position_ids,
        output_hidden_states=True,
        use_cache=False,
    )
    for hook in hooks:
        hook.remove()
    logits = model.lm_head(output.last_hidden_state)
    answer = F.cross_entropy(logits.transpose(1, 2), batch.labels, ignore_index=IGNORE)
    grounding = torch.zeros(())
    for i in grounded:
        grounding = grounding + grounding_loss(llm.layers[i].self_attn, called[i], batch) / len(grounded)
    relation = heads.relation_loss(output.hidden_states, batch)
    return AnswerLosses(answer, grounding, relation, logits)


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration, heads: ReadingHeads, batches: list[PackedBatch]
) -> dict[str, float]:
    """Accuracy by question type (all answer tokens correct, teacher-forced, which is greedy decoding) and by patch."""
    correct: dict[str, list[float]] = defaultdict(list)
    patch_right: dict[str, list[float]] = defaultdict(list)
    for batch in batches:
        patches, _ = run_tower(model, batch.pixel_values)
        logits = answer_losses(model, heads, patches, batch).logits
        hits = logits.argmax(-1) == batch.labels
        for question_type, (i, first, stop) in zip(batch.question_types, batch.answer_rows, strict=True):
            correct[question_type].append(hits[i, first:stop].all().float().item())
        for name, value in heads.accuracies(patches, batch).items():
            if not math.isnan(value):
                patch_right[name].append(value)
    scores = {name: sum(values) / len(values) for name, values in sorted(correct.items())}
    return scores | {f"patch_{name}": sum(values) / len(values) for name, values in patch_right.items()}


def save_state(path: Path, modules: nn.Module, optimizer: torch.optim.Optimizer | None, progress: dict) -> None:
    """Write weights and optimizer moments in one safetensors file, atomically, progress in its metadata."""
    # The output embeddings are the input embeddings: one copy is enough.
    weights = {name: value for name, value in modules.state_dict().items() if "lm_head" not in name}
    write_state(path, weights, optimizer, {"progress": json.dumps(progress)})


def load_state(path: Path, modules: nn.Module) -> tuple[dict, Moments]:
    """Load weights in place; return the progress and the optimizer's state by parameter."""
    progress, weights, moments = read_state(path)
    missing, unexpected = modules.load_state_dict(weights, strict=False)
    if unexpected or any("lm_head" not in name for name in missing):
        raise ValueError(
            f"{path} is of another model (missing {missing}, unexpected {unexpected}); delete it to restart."
        )
    return json.loads(progress["progress"]), moments


def parameter_groups(model: LlavaForConditionalGeneration, heads: ReadingHeads, tower_scale: float) -> list[dict]:
    """Matrices decay, vectors don't; the tower and its heads learn at `tower_scale` times the rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in [*model.named_parameters(), *heads.named_parameters()]:
        reads_llm = name.startswith(("noun_", "order"))
        scale = 1.0 if "language_model" in name or "projector" in name or reads_llm else tower_scale
        groups[scale, 0.05 if parameter.ndim == 2 and "embedding" not in name else 0.0].append(parameter)
    return [
        {"params": parameters, "scale": scale, "weight_decay": decay} for (scale, decay), parameters in groups.items()
    ]


def train_phase(
    phase: str,
    config: MosaicLVLMConfig,
    model: LlavaForConditionalGeneration,
    heads: ReadingHeads,
    tokenizer,
    easy: list[EasyVQAImage],
    validation: list[PackedBatch],
    rank: int,
) -> None:
    """Train one phase from its start or from its saved state until its time is spent."""
    joint = phase == "joint"
    minutes = config.joint_minutes if joint else config.tower_minutes
    modules = nn.ModuleDict({"lvlm": model, "heads": heads})
    peak = config.learning_rate if joint else config.tower_learning_rate
    tower_scale = config.joint_tower_learning_rate / peak if joint else 1.0
    optimizer = torch.optim.AdamW(parameter_groups(model, heads, tower_scale), lr=0.0, betas=(0.9, 0.98), fused=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    directory = Path(config.output_dir)
    state_path = directory / f"state_{phase}.safetensors"
    step, spent = 0, 0.0
    if state_path.exists():
        progress, moments = load_state(state_path, modules)
        step, spent = progress["step"], progress["minutes"]
        load_moments(optimizer, moments)
    if spent >= minutes:
        return
    # Scenes of the two phases are different ones.
    seed = 2 * config.seed + int(joint)
    batches = training_batches(
        tokenizer,
        easy,
        config.mosaic_images,
        config.easy_images,
        seed,
        rank,
        config.num_processes,
        step,
        config.smallest_side,
    )
    start, clock = spent, time.monotonic()
    next_save, next_log, next_validation = spent + config.save_every, spent, spent + 5 * config.log_every
    sums: dict[str, float] = defaultdict(float)
    since, since_step = time.monotonic(), step
    while spent < minutes:
        batch = next(batches)
        done = spent / minutes
        rate = peak * min(1.0, (step + 1) / 100) * max(0.5 * (1 + math.cos(math.pi * done)), 0.005)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        grounding_weight = 0.0
        if joint:
            grounding_weight = max(0.0, config.grounding_weight * (1 - done / config.grounding_share))

        patches, cls = run_tower(model, batch.pixel_values)
        losses = heads.losses(patches, cls, batch)
        loss = torch.stack(list(losses.values())).sum() * (config.patch_weight if joint else 1.0)
        if joint:
            read = answer_losses(model, heads, patches, batch, grounding_weight > 0)
            loss = loss + read.answer + grounding_weight * read.grounding + config.relation_weight * read.relation
            losses |= {"answer": read.answer, "grounding": read.grounding, "relation": read.relation}
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # the mean time spent with them, so that all processes take the same learning rate
        spent = average_gradients(parameters, start + (time.monotonic() - clock) / 60)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"The gradient's norm is {norm.item()} at step {step} of phase {phase!r}; the last good state is in "
                f"{state_path}. Lower the learning rate, {peak}, and run the same command again."
            )
        optimizer.step()
        step += 1
        for name, value in losses.items():
            sums[name] += value.item()
        if rank != 0:
            continue
        if spent >= next_log:
            speed = (step - since_step) / (time.monotonic() - since)
            images = speed * config.num_processes * (config.mosaic_images + config.easy_images)
            line: dict = {"phase": phase, "step": step, "minutes": round(spent, 2), "rate": rate}
            line["images_per_s"] = round(images, 1)
            line |= {name: round(value / (step - since_step), 4) for name, value in sums.items()}
            if spent >= next_validation:
                line["validation"] = {name: round(v, 3) for name, v in evaluate(model, heads, validation).items()}
                next_validation = spent + 5 * config.log_every
            with open(directory / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            print(f"{spent:.1f} of {minutes:.0f} min", json.dumps(line), flush=True)
            sums.clear()
            since, since_step, next_log = time.monotonic(), step, spent + config.log_every
        if spent >= next_save:
            save_state(state_path, modules, optimizer, {"step": step, "minutes": spent})
            next_save = spent + config.save_every
    if rank == 0:
        save_state(state_path, modules, None, {"step": step, "minutes": spent})


def train(rank: int, config: MosaicLVLMConfig, port: int) -> None:
    """One process of the training."""
    torch.set_num_threads(1)
    join_processes(rank, config.num_processes, port)
    processor = build_processor()
    tokenizer = processor.tokenizer
    whole = TPRLForConditionalGeneration.from_pretrained(config.start_from) if config.start_from else None
    model = build_lvlm(tokenizer, config.seed) if whole is None else whole.lvlm.float().train()
    torch.manual_seed(config.seed)
    heads = ReadingHeads(model.config.vision_config.hidden_size)
    easy = easy_vqa_images("train")
    validation = []
    if rank == 0:
        num_mosaic, num_easy = VALIDATION_IMAGES
        images = [mosaic_image("validation", 0, i) for i in range(num_mosaic)]
        images += [easy_image(image) for image in easy[-HELD_OUT_EASY:][:num_easy]]
        parts = [images[i : i + 20] for i in range(0, len(images), 20)]
        validation = [pack(part, tokenizer, [False] * len(part)) for part in parts]
    for phase in PHASES:
        train_phase(phase, config, model, heads, tokenizer, easy[:-HELD_OUT_EASY], validation, rank)
    if rank == 0:
        scores = evaluate(model, heads, validation)
        print("validation", json.dumps(scores))
        finished = Path(config.output_dir) / "model"
        # Position embeddings and the like included, half precision costs nothing measurable here and halves the file.
        model.to(torch.float16)
        (model if whole is None else whole).save_pretrained(finished)
        processor.save_pretrained(finished)
        (Path(config.output_dir) / "training.json").write_text(
            json.dumps({"config": asdict(config) | {"output_dir": "."}, "validation": scores}, indent=2) + "\n"
        )
    leave_processes()


def main() -> None:
    config = config_of(MosaicLVLMConfig, __doc__)
    run_processes(train, config.num_processes, config)


if __name__ == "__main__":
    main()
