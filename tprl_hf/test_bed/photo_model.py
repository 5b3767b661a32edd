"""What is trained of Photo-LLaVA: its projector, and small corrections of the LLM's matrices (LoRA).

The rest is frozen. `trained_weights` are all that this package would have to ship: `put_together` adds them to the
parts that other packages ship, and gives a plain LLaVA.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from tprl_hf.data.photo_things import NEW_THINGS, THINGS

from .photo_batches import LabelledScene, normalized, training_scene, word_id
from .photo_parts import NUM_PATCHES, PATCHES_PER_SIDE

RANK, SCALE = 16, 2.0
CORRECTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The projector starts as this: a patch of a thing says the thing's word, any other this one ...
BACKGROUND = "background"
# ... and on top, half as long as a word at most, where it lies, and whether a thing's center is in it.
ACROSS, DOWN, CENTER = ("left", "right"), ("top", "bottom"), "center"
PLACE_LENGTH = 0.5
ALIGN_SCENES, ALIGN_STEPS, ALIGN_BATCH = 1200, 2000, 640
ALIGN_SEED = 1_000_003  # scenes that the training proper doesn't see


class CorrectedLinear(nn.Module):
    """A frozen matrix plus a trained product of two thin ones, kept in float32 and used in the matrix's type."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight
        self.down = nn.Parameter(torch.randn(RANK, linear.in_features) / math.sqrt(linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        change = F.linear(F.linear(hidden, self.down.to(hidden.dtype)), (SCALE * self.up).to(hidden.dtype))
        return F.linear(hidden, self.weight) + change

    def merged(self) -> nn.Linear:
        linear = nn.Linear(self.down.shape[1], self.up.shape[0], bias=False, dtype=self.weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(self.weight.float() + SCALE * self.up @ self.down)
        return linear


def freeze_and_correct(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Let only the projector, in float32, and corrections of all matrices of the LLM be trained."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    torch.manual_seed(seed)
    for layer in model.model.language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name in CORRECTED:
                if hasattr(block, name):
                    setattr(block, name, CorrectedLinear(getattr(block, name)))


def merge(model: LlavaForConditionalGeneration) -> None:
    """Make a plain LLaVA again of a corrected one, in the type of its frozen weights."""
    for layer in model.model.language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name in CORRECTED:
                if hasattr(block, name):
                    setattr(block, name, getattr(block, name).merged())
    model.model.multi_modal_projector.to(model.model.language_model.embed_tokens.weight.dtype)


def trained_weights(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """All that is trained, by the names of the parameters."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def load_trained(model: LlavaForConditionalGeneration, weights: dict[str, torch.Tensor]) -> None:
    """Copy trained weights into a corrected model.

    Raises:
        `ValueError`: If the names are not those of what the model trains.
    """
    wanted = {name for name, value in model.named_parameters() if value.requires_grad}
    if wanted != weights.keys():
        raise ValueError(f"These are weights of another model: {sorted(wanted ^ weights.keys())[:3]} differ.")
    model.load_state_dict(weights, strict=False)


def put_together(untrained: Path, trained: Path, finished: Path) -> None:
    """Join the parts (`untrained`) and the trained weights (a file) to a checkpoint of a plain LLaVA, bfloat16."""
    model = LlavaForConditionalGeneration.from_pretrained(untrained, dtype=torch.bfloat16)
    freeze_and_correct(model, 0)
    load_trained(model, load_file(trained))
    merge(model)
    model.save_pretrained(finished)
    AutoProcessor.from_pretrained(untrained).save_pretrained(finished)


def save_trained(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Write the trained weights in half precision."""
    save_file({name: value.half().contiguous() for name, value in trained_weights(model).items()}, path)


@torch.no_grad()
def tower_features(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """What LLaVA takes from the tower: `[B, 256, 384]` (CLS dropped), in the tower's type."""
    tower = model.model.vision_tower
    output = tower(pixel_values.to(tower.dtype), output_hidden_states=True)
    return output.hidden_states[model.config.vision_feature_layer][:, 1:]


def word_embeddings(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, words: list[str]
) -> torch.Tensor:
    """Input embeddings of words within a sentence, float32 `[W, D]`."""
    ids = [word_id(word, tokenizer) for word in words]
    return model.get_input_embeddings().weight[ids].detach().float()


def patch_targets(
    scene: LabelledScene, words: torch.Tensor, names: list[str], marks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the projector should make of the 256 patches of a scene.

    Args:
        words (`torch.FloatTensor` of shape `[W + 1, D]`): Embeddings of `names`, and of the background.
        marks (`torch.FloatTensor` of shape `[3, D]`): Added for a place at the right, at the bottom, for a center.

    Returns:
        `tuple[torch.FloatTensor, torch.LongTensor]`: Targets `[256, D]`, and the rows of `words` they are made of.
    """
    of_object = [names.index(item.name) for item in scene.objects]
    classes = torch.tensor([of_object[owner] if owner >= 0 else len(names) for owner in scene.owners])
    side = PATCHES_PER_SIDE
    ticks = torch.linspace(-1, 1, side)
    places = torch.zeros(NUM_PATCHES, 3)
    places[:, 0], places[:, 1] = ticks.repeat(side), ticks.repeat_interleave(side)
    size = scene.pixels.shape[0] // side
    for item in scene.objects:
        x, y = item.center
        places[int(y // size) * side + int(x // size), 2] = 1
    return words[classes] + places @ marks, classes


def align_projector(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, root: Path, log=print
) -> float:
    """Train the projector alone to say of each patch, in embeddings of the LLM's words, what it shows and where it is.

    Returns:
        `float`: The share of the patches of things, on scenes left out, whose nearest word is the thing's.
    """
    names = [name for name in THINGS if name not in NEW_THINGS]
    words = word_embeddings(model, tokenizer, [*names, BACKGROUND])
    middle, length = words.mean(dim=0), words.norm(dim=1).mean()
    ends = word_embeddings(model, tokenizer, [*ACROSS, *DOWN, CENTER])
    marks = torch.stack([ends[1] - ends[0], ends[3] - ends[2], ends[4] - middle])
    marks = F.normalize(marks, dim=1) * length * PLACE_LENGTH
    features, targets, classes = [], [], []
    for start in range(0, ALIGN_SCENES, 8):
        scenes = [training_scene(ALIGN_SEED, start + i, root) for i in range(8)]
        features.append(tower_features(model, normalized([scene.pixels for scene in scenes])).half())
        for scene in scenes:
            target, row = patch_targets(scene, words, names, marks)
            targets.append(target.half())
            classes.append(row)
    left_out = ALIGN_SCENES // 12
    x, y, rows = torch.cat(features), torch.stack(targets), torch.stack(classes)
    held_x, held_rows = x[-left_out:].flatten(0, 1).float(), rows[-left_out:].flatten()
    x, y, rows = x[:-left_out].flatten(0, 1), y[:-left_out].flatten(0, 1), rows[:-left_out].flatten()
    shown, other = (rows < len(names)).nonzero()[:, 0], (rows == len(names)).nonzero()[:, 0]

    # Features have directions a hundred times as long as others: the first layer learns on scaled ones.
    mean, spread = x[::7].float().mean(dim=0), x[::7].float().std(dim=0) + 1e-3
    projector = model.model.multi_modal_projector
    torch.manual_seed(0)
    nn.init.kaiming_uniform_(projector.linear_1.weight, a=math.sqrt(5))
    nn.init.zeros_(projector.linear_1.bias)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=0.0, weight_decay=0.02)
    directions = F.normalize(words - middle, dim=1)

    def similarities(output: torch.Tensor) -> torch.Tensor:
        return F.normalize(output - middle, dim=1) @ directions.T

    for step in range(ALIGN_STEPS):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 50) * 0.5 * (1 + math.cos(math.pi * step / ALIGN_STEPS))
        num_shown = ALIGN_BATCH * 3 // 5
        chosen = torch.cat(
            [
                shown[torch.randint(len(shown), (num_shown,))],
                other[torch.randint(len(other), (ALIGN_BATCH - num_shown,))],
            ]
        )
        output = projector((x[chosen].float() - mean) / spread)
        distance = (output - y[chosen].float()).square().sum(dim=1).mean() / length**2
        loss = F.cross_entropy(similarities(output) / 0.05, rows[chosen]) + 2 * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 499:
            log(f"projector: step {step + 1} of {ALIGN_STEPS}, loss {loss.item():.2f}, distance {distance.item():.3f}")
    with torch.no_grad():
        guesses = similarities(projector((held_x - mean) / spread)).argmax(dim=1)
        of_thing = held_rows < len(names)
        correct = (guesses == held_rows)[of_thing].float().mean().item()
        of_background = (guesses == held_rows)[~of_thing].float().mean().item()
        log(f"projector: {correct:.3f} of the patches of things say their word, {of_background:.3f} of the others")
        # From here on features come as they are.
        weight = projector.linear_1.weight / spread
        projector.linear_1.bias.sub_(weight @ mean)
        projector.linear_1.weight.copy_(weight)
    return correct
