"""Batches for training Photo-LLaVA: many questions about a picture packed in one sequence.

A sequence is `<|im_start|> [K visual tokens]` followed by segments `question <|im_end|> answer <|im_end|>`. Each
segment sees the picture and itself, and counts its positions from the end of all visual tokens, so it learns just
what it would learn alone. With fewer visual tokens, the patches of things and some others are there, at their own
positions. N is 256 at full size; a smaller picture has fewer patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tprl_hf.data.photo import PhotoObject, PhotoQuestion, PhotoScene, ask, draw_scene, scene_rng

from .photo_parts import PATCH_SIZE, PATCHES_PER_SIDE
from .training_run import drawn_side, shrunk

IGNORE = -100
MIN_PATCH_PIXELS = 20
END = "<|im_end|>"
# How often each type is asked about one picture in training; the hard ones more often.
QUESTIONS_PER_SCENE = (
    *("existence",) * 3,
    "category",
    *("place",) * 3,
    *("relation",) * 3,
    *("comparison",) * 2,
    "pair",
    *("counting",) * 2,
)
FEW_TOKENS = 48
NOUN, ANSWER = 0, 1  # who looks: a noun of the question, or the token that predicts the answer
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class LabelledScene:
    """A scene before packing: its pixels, questions, objects (in pixels of the full size), and what its patches show.

    Args:
        owners (`np.ndarray`): int64 `[N]`, the index in `objects` of what a patch shows most of, -1 for none.
    """

    pixels: np.ndarray
    questions: list[PhotoQuestion]
    objects: list[PhotoObject]
    owners: np.ndarray


@dataclass
class PhotoBatch:
    """B scenes with their packed questions, L tokens a sequence, K of them visual at most.

    Args:
        pixel_values (`torch.FloatTensor` of shape `[B, 3, S, S]`): Normalized; S is 224 at full size.
        input_ids, position_ids (`torch.LongTensor` of shape `[B, L]`).
        segment_ids (`torch.LongTensor` of shape `[B, L]`): 0 for the picture, 1, 2, ... for questions, -1 for padding.
        visual (`torch.BoolTensor` of shape `[B, L]`): Columns of visual tokens.
        kept (`torch.BoolTensor` of shape `[B, N]`): The patches that they stand for.
        labels (`torch.LongTensor` of shape `[B, L]`): The next token where it belongs to an answer, else -100.
        first (`torch.BoolTensor` of shape `[B, L]`): Where an answer's first token is predicted.
        look_rows (`torch.LongTensor` of shape `[Q, 3]`), look_targets (`torch.BoolTensor` of shape `[Q, L]`): What
            should look at things: (batch index, position, `NOUN` or `ANSWER`), and the columns of these things.
        noun_rows (`torch.LongTensor` of shape `[M, 2]`), noun_places (`torch.FloatTensor` of shape `[M, 2]`): Nouns of
            things that are there: (batch index, position), and their x and y in [-1, 1].
        order_rows (`torch.LongTensor` of shape `[R, 2]`), orders (`torch.FloatTensor` of shape `[R, 2]`): Second nouns
            of relations and comparisons, and whether the first thing lies further left, and further up.
        question_types (`list[str]`), answer_rows (`list[tuple[int, int, int]]`): For scoring, by question: the type,
            and (batch index, first, last + 1) of the positions that predict the answer.
    """

    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segment_ids: torch.Tensor
    visual: torch.Tensor
    kept: torch.Tensor
    labels: torch.Tensor
    first: torch.Tensor
    look_rows: torch.Tensor
    look_targets: torch.Tensor
    noun_rows: torch.Tensor
    noun_places: torch.Tensor
    order_rows: torch.Tensor
    orders: torch.Tensor
    question_types: list[str]
    answer_rows: list[tuple[int, int, int]]

    def attention_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask `[B, 1, L, L]`: causal, and each question sees the picture and itself only."""
        segments = self.segment_ids
        causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
        allowed = ((segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)) & causal
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def label_scene(scene: PhotoScene, questions: list[PhotoQuestion], side: int = PATCHES_PER_SIDE) -> LabelledScene:
    """Say what each patch of a scene shows, its picture shrunk to `side` by `side` patches as the processor would."""
    pixels, instances = shrunk(scene.pixels, scene.instances, side * PATCH_SIZE)
    patches = instances.reshape(side, PATCH_SIZE, side, PATCH_SIZE)
    counts = np.stack([(patches == i).sum(axis=(1, 3)).reshape(-1) for i in range(len(scene.objects))])
    owners = np.where(counts.max(axis=0) >= MIN_PATCH_PIXELS, counts.argmax(axis=0), -1)
    return LabelledScene(pixels, questions, scene.objects, owners)


def training_scene(seed: int, index: int, root: Path, side: int = PATCHES_PER_SIDE) -> LabelledScene:
    """A scene with the questions of `QUESTIONS_PER_SCENE` that it allows, in random order, each asked once."""
    rng = scene_rng("train", seed, index)
    scene = draw_scene(rng, "train", root)
    questions = [
        ask(scene, QUESTIONS_PER_SCENE[i], rng)
        for i in rng.permutation(len(QUESTIONS_PER_SCENE))
        if len(scene.objects) > 1
    ]
    asked = list(dict.fromkeys(question for question in questions if question is not None))
    return label_scene(scene, asked, side)


def normalized(pixels: list[np.ndarray]) -> torch.Tensor:
    """uint8 pictures `[S, S, 3]` as the processor gives them to the tower: `[B, 3, S, S]`."""
    values = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)


@lru_cache(maxsize=100_000)
def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def word_id(word: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token of a word within a sentence."""
    (token,) = token_ids(f" {word}", tokenizer)
    return token


def _nouns(question: PhotoQuestion, objects: list[PhotoObject]) -> list[tuple[str, list[int]]]:
    """Words of a question with the objects that each of them means."""
    if question.question_type == "counting":
        return [(f"{objects[question.objects[0]].kind}s", list(question.objects))] if question.objects else []
    if question.question_type == "category":
        return [(objects[question.objects[0]].kind, list(question.objects))]
    if question.question_type == "place":
        return []
    return [(objects[i].name, [i]) for i in question.objects]


def pack(
    scenes: list[LabelledScene], tokenizer: PreTrainedTokenizerBase, kept: list[np.ndarray] | None = None
) -> PhotoBatch:
    """Tokenize the questions of each scene and lay them out in one sequence a scene.

    Args:
        kept (`list[np.ndarray]`, *optional*): Patches bool `[N]` of each scene that are there; all by default.
    """
    start_id, image_id, end_id = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<image>", END])
    kept = kept or [np.ones(len(scene.owners), dtype=bool) for scene in scenes]
    rows, looks, nouns, orders, question_types, answer_rows = [], [], [], [], [], []
    for i, (scene, keep) in enumerate(zip(scenes, kept, strict=True)):
        columns = np.flatnonzero(keep)
        tokens, positions = [start_id] + [image_id] * len(columns), [0, *(1 + columns)]
        segments, labels = [0] * len(tokens), [IGNORE] * len(tokens)
        for number, question in enumerate(scene.questions, start=1):
            prompt = [*token_ids(question.prompt, tokenizer), end_id]
            answer = token_ids(f" {question.answer}", tokenizer)
            begin, first = len(tokens), len(tokens) + len(prompt) - 1
            tokens += prompt + answer
            positions += range(1 + len(keep), 1 + len(keep) + len(prompt) + len(answer))
            segments += [number] * (len(prompt) + len(answer))
            labels += [IGNORE] * (len(prompt) - 1) + answer + [end_id]
            question_types.append(question.question_type)
            answer_rows.append((i, first, first + len(answer) + 1))
            found = []
            for word, indices in _nouns(question, scene.objects):
                row = begin + prompt.index(word_id(word, tokenizer))
                found.append(row)
                looks.append((i, row, NOUN, indices))
                if question.question_type not in ("category", "counting"):
                    nouns.append((i, row, indices[0]))
            if question.question_type in ("relation", "comparison"):
                orders.append((i, found[1], *question.objects))
            elif question.objects and question.question_type != "pair":
                looks.append((i, first, ANSWER, list(question.objects)))
        rows.append((tokens, positions, segments, labels))

    length = max(len(row[0]) for row in rows)
    fills = (tokenizer.pad_token_id, 0, -1, IGNORE)
    input_ids, position_ids, segment_ids, next_ids = (
        torch.tensor([[*map(int, row[k])] + [fills[k]] * (length - len(row[k])) for row in rows]) for k in range(4)
    )
    firsts = torch.zeros(next_ids.shape, dtype=torch.bool)
    for i, start, _ in answer_rows:
        firsts[i, start] = True
    look_rows, look_targets = [], torch.zeros(len(looks), length, dtype=torch.bool)
    for number, (i, row, role, indices) in enumerate(looks):
        shown = np.isin(scenes[i].owners[np.flatnonzero(kept[i])], indices)
        look_targets[number, 1 : 1 + len(shown)] = torch.from_numpy(shown)
        look_rows.append((i, row, role))
    there = look_targets.any(dim=1)  # a thing can be too thin for a patch of its own

    def place(i: int, index: int) -> list[float]:
        return [2 * value / (PATCHES_PER_SIDE * PATCH_SIZE) - 1 for value in scenes[i].objects[index].center]

    def before(i: int, first: int, second: int) -> list[float]:
        return [float(a < b) for a, b in zip(place(i, first), place(i, second), strict=True)]

    return PhotoBatch(
        pixel_values=normalized([scene.pixels for scene in scenes]),
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        visual=input_ids == image_id,
        kept=torch.from_numpy(np.stack(kept)),
        labels=next_ids,
        first=firsts,
        look_rows=torch.tensor(look_rows, dtype=torch.long).view(-1, 3)[there],
        look_targets=look_targets[there],
        noun_rows=torch.tensor([noun[:2] for noun in nouns], dtype=torch.long).view(-1, 2),
        noun_places=torch.tensor([place(i, index) for i, _, index in nouns]).view(-1, 2),
        order_rows=torch.tensor([order[:2] for order in orders], dtype=torch.long).view(-1, 2),
        orders=torch.tensor([before(i, a, b) for i, _, a, b in orders]).view(-1, 2),
        question_types=question_types,
        answer_rows=answer_rows,
    )


def few_patches(scene: LabelledScene, rng: np.random.Generator) -> np.ndarray:
    """The patches of all things and random others, 48 together where the things allow it: bool `[N]`."""
    keep = scene.owners >= 0
    others = rng.permutation(np.flatnonzero(~keep))
    keep[others[: max(FEW_TOKENS - int(keep.sum()), 6)]] = True
    return keep


def training_batches(
    tokenizer: PreTrainedTokenizerBase,
    root: Path,
    num_scenes: int,
    seed: int,
    rank: int,
    world_size: int,
    first_step: int,
    full_from: int,
    smallest_side: int = PATCHES_PER_SIDE,
) -> Iterator[PhotoBatch]:
    """Yield batches without end, with all visual tokens from step `full_from`.

    A third of the batches has pictures of the full size, the others a size drawn from `smallest_side` patches a side.
    Batch `step` of process `rank` is always the same: training resumes where it was.
    """
    step = first_step
    while True:
        rng = np.random.default_rng([seed, step, rank])
        start = (step * world_size + rank) * num_scenes
        side = drawn_side(np.random.default_rng([seed, step, world_size]), smallest_side, PATCHES_PER_SIDE)
        scenes = [training_scene(seed, start + i, root, side) for i in range(num_scenes)]
        yield pack(scenes, tokenizer, None if step >= full_from else [few_patches(scene, rng) for scene in scenes])
        step += 1
