"""Batches for training the embedded LVLM: many questions about an image packed in one sequence.

A sequence is `<s> <user> [N image tokens]` followed by segments `question <assistant> answer </s>`. Each segment
sees the image and itself and counts its positions from the end of the image, so it learns just what it would learn
alone, at a twelfth of the cost. One image in eight is a conversation instead: its segments see what went before.
N is 144 at full size; a smaller picture has fewer patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tprl_hf.data.easy import EASY_VQA_COLORS, EASY_VQA_SHAPES, EasyVQAImage
from tprl_hf.data.mosaic import (
    COLORS,
    IMAGE_SIZE,
    SHAPES,
    SIGNS,
    MosaicQuestion,
    MosaicScene,
    ask,
    draw_scene,
    scene_rng,
)
from tprl_hf.pictures import open_picture

from .model import PATCH_SIZE, PATCHES_PER_SIDE, SPECIAL_TOKENS
from .training_run import drawn_side, shrunk

IGNORE = -100
PATCH_KINDS = ("background", *SHAPES, "rectangle", "sign")
PATCH_COLORS = tuple(dict.fromkeys([*COLORS, *SIGNS, *EASY_VQA_COLORS]))
CLS_CLASSES = len(SHAPES) + len(COLORS) + len(SHAPES) * len(COLORS)
# How often each type is asked about one image; the hard ones more often.
QUESTIONS_PER_IMAGE = (
    *("existence",) * 2,
    "color",
    *("shape",) * 2,
    *("relation",) * 3,
    *("counting",) * 3,
    "reading",
)
MIN_PATCH_PIXELS = 20  # at full size; of smaller pictures fewer, as their objects are smaller
MIN_PATCH_PIXELS_SHRUNK = 4
# Where the grounding loss looks: a question's nouns seek their objects in the second LLM layer; what predicts the
# answer seeks them in the third, but for relations, which compare what the two nouns have found.
NOUN_LAYER, ANSWER_LAYER = 1, 2
NOUNS = (*SHAPES, "object", "objects", "sign")


@dataclass
class PackedBatch:
    """B images with their packed questions, L tokens a sequence.

    Args:
        pixel_values (`torch.FloatTensor` of shape `[B, 3, S, S]`): In [-1, 1]; S is 144 at full size.
        input_ids (`torch.LongTensor` of shape `[B, L]`), position_ids (`torch.LongTensor` of shape `[B, L]`).
        segment_ids (`torch.LongTensor` of shape `[B, L]`): 0 for the image, 1, 2, ... for questions, -1 for padding.
        conversation (`torch.BoolTensor` of shape `[B]`): Where segments see what went before.
        labels (`torch.LongTensor` of shape `[B, L]`): The next token where it belongs to an answer, else -100.
        kinds, colors, digits (`torch.LongTensor` of shape `[B, N]`): What each patch shows, -100 for "don't ask".
        centers (`torch.BoolTensor` of shape `[B, N]`): Patches in which an object's center lies.
        present (`torch.FloatTensor` of shape `[B, 80]`): Which shapes, colours and pairs of them the image holds, for
            the CLS token; -100 for images of easy-VQA.
        grounding (`torch.BoolTensor` of shape `[Q, N]`), grounding_rows (`torch.LongTensor` of shape `[Q, 3]`): For
            what is asked about objects: their patches, and (batch index, position, LLM layer) that should look there.
        relation_rows (`torch.LongTensor` of shape `[R, 3]`), relation_centers (`torch.FloatTensor` of shape
            `[R, 2, 2]`): For relations: (batch index, positions of the nouns), and x and y of their objects, in
            pixels of the full size.
        question_types (`list[str]`), answer_rows (`list[tuple[int, int, int]]`): For scoring, by question: the type,
            and (batch index, first, last + 1) of the positions that predict the answer.
    """

    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segment_ids: torch.Tensor
    conversation: torch.Tensor
    labels: torch.Tensor
    kinds: torch.Tensor
    colors: torch.Tensor
    digits: torch.Tensor
    centers: torch.Tensor
    present: torch.Tensor
    grounding: torch.Tensor
    grounding_rows: torch.Tensor
    relation_rows: torch.Tensor
    relation_centers: torch.Tensor
    question_types: list[str]
    answer_rows: list[tuple[int, int, int]]

    @property
    def prefix_length(self) -> int:
        """Columns before the first question."""
        return 2 + self.kinds.shape[1]

    def attention_mask(self) -> torch.Tensor:
        """Additive mask `[B, 1, L, L]`: causal, and each question sees the image and itself only."""
        segments = self.segment_ids
        length = segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
        same |= self.conversation[:, None, None]
        allowed = same & causal
        return torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[:, None]


@dataclass
class LabelledImage:
    """One image before packing: pixels uint8 `[S, S, 3]`, questions, and the labels of its N patches."""

    pixels: np.ndarray
    questions: list[MosaicQuestion]
    object_patches: list[np.ndarray]
    object_centers: list[tuple[float, float]]
    kinds: np.ndarray
    colors: np.ndarray
    digits: np.ndarray
    centers: np.ndarray
    present: np.ndarray


def _patch_counts(mask: np.ndarray) -> np.ndarray:
    """Pixels of a boolean image `[S, S]` in each patch, `[N]`."""
    side = len(mask) // PATCH_SIZE
    return mask.reshape(side, PATCH_SIZE, side, PATCH_SIZE).sum(axis=(1, 3)).reshape(-1)


def label_scene(scene: MosaicScene, questions: list[MosaicQuestion], side: int = PATCHES_PER_SIDE) -> LabelledImage:
    """Say what each patch of a scene shows, its picture shrunk to `side` by `side` patches as the processor would."""
    pixels, instances = shrunk(scene.pixels, scene.instances, side * PATCH_SIZE)

    def patch_of(x: float, y: float) -> int:
        return int(y * side // IMAGE_SIZE) * side + int(x * side // IMAGE_SIZE)

    kinds, colors, digits = (np.full(side**2, IGNORE, dtype=np.int64) for _ in range(3))
    kinds[_patch_counts(instances >= 0) == 0] = 0
    centers, present = np.zeros(side**2, dtype=bool), np.zeros(CLS_CLASSES, dtype=np.float32)
    counts = np.stack([_patch_counts(instances == i) for i in range(len(scene.objects))])
    min_pixels = max(MIN_PATCH_PIXELS_SHRUNK, MIN_PATCH_PIXELS * (side / PATCHES_PER_SIDE) ** 2)
    for i, item in enumerate(scene.objects):
        # a patch of a small picture can show several objects, and is labelled as the largest
        shown = (counts[i] >= min_pixels) & (counts.argmax(axis=0) == i)
        kinds[shown], colors[shown] = PATCH_KINDS.index(item.kind), PATCH_COLORS.index(item.color)
        if item.number is not None:
            x, y = item.box[0], item.center[1]
            tens, ones = patch_of(x + 5, y), patch_of(x + 17, y)
            if tens != ones:  # a large patch can hold the whole number
                digits[tens], digits[ones] = item.number // 10, 10 + item.number % 10
            continue
        centers[patch_of(*item.center)] = True
        shape, color = SHAPES.index(item.kind), list(COLORS).index(item.color)
        present[[shape, 8 + color, 16 + 8 * shape + color]] = 1
    places = [item.center for item in scene.objects]
    return LabelledImage(
        pixels, questions, list(counts >= min_pixels), places, kinds, colors, digits, centers, present
    )


def mosaic_image(split: str, seed: int, index: int, side: int = PATCHES_PER_SIDE) -> LabelledImage:
    """A scene with the questions of `QUESTIONS_PER_IMAGE` that it allows, in random order."""
    rng = scene_rng(split, seed, index)
    scene = draw_scene(rng)
    questions = [ask(scene, QUESTIONS_PER_IMAGE[i], rng) for i in rng.permutation(len(QUESTIONS_PER_IMAGE))]
    return label_scene(scene, [question for question in questions if question is not None], side)


def easy_image(
    image: EasyVQAImage, rng: np.random.Generator | None = None, side: int = PATCHES_PER_SIDE
) -> LabelledImage:
    """An image of easy-VQA, flipped left to right half the time if `rng` is given."""
    small = open_picture(image.path)
    if rng is not None and rng.random() < 0.5:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(small.resize((side * PATCH_SIZE, side * PATCH_SIZE), Image.Resampling.BICUBIC))
    answers = [answer for _, answer in image.questions]
    # The background is one pale colour, and the shape covers the minority of the pixels.
    values, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    inside = np.abs(pixels.astype(int) - values[counts.argmax()]).sum(axis=-1) > 60
    shown = _patch_counts(inside) >= MIN_PATCH_PIXELS
    kinds, colors = (np.full(side**2, IGNORE, dtype=np.int64) for _ in range(2))
    kinds[_patch_counts(inside) == 0] = 0
    shape = next((answer for answer in answers if answer in EASY_VQA_SHAPES), None)
    color = next((answer for answer in answers if answer in EASY_VQA_COLORS), None)
    if shape is not None:
        kinds[shown] = PATCH_KINDS.index(shape)
    if color is not None:
        colors[shown] = PATCH_COLORS.index(color)
    digits = np.full(side**2, IGNORE, dtype=np.int64)
    questions = [MosaicQuestion(prompt, answer, "easy", ()) for prompt, answer in image.questions]
    no_center, unknown = np.zeros(side**2, dtype=bool), np.full(CLS_CLASSES, IGNORE, dtype=np.float32)
    return LabelledImage(pixels, questions, [shown], [], kinds, colors, digits, no_center, unknown)


@lru_cache(maxsize=100_000)
def _token_ids(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def pack(images: list[LabelledImage], tokenizer: PreTrainedTokenizerFast, conversations: list[bool]) -> PackedBatch:
    """Tokenize the questions of each image and lay them out in one sequence an image."""
    noun_ids = set(tokenizer.convert_tokens_to_ids(list(NOUNS)))
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    rows, grounding, grounding_rows, question_types, answer_rows = [], [], [], [], []
    relation_rows, relation_centers = [], []
    for i, (image, conversation) in enumerate(zip(images, conversations, strict=True)):
        tokens = [ids["<s>"], ids["<user>"]] + [ids["<image>"]] * len(image.kinds)
        prefix_length = len(tokens)
        positions, segments, labels = list(range(prefix_length)), [0] * prefix_length, [IGNORE] * prefix_length
        for number, question in enumerate(image.questions, start=1):
            prompt = [*_token_ids(question.prompt, tokenizer), ids["<assistant>"]]
            if conversation and number > 1:
                prompt = [ids["<user>"], *prompt]
            answer = [*_token_ids(question.answer, tokenizer), ids["</s>"]]
            first = len(tokens) + len(prompt) - 1
            start = len(tokens) if conversation else prefix_length
            positions += range(start, start + len(prompt) + len(answer))
            segments += [number] * (len(prompt) + len(answer))
            labels += [IGNORE] * (len(prompt) - 1) + answer + [IGNORE]
            tokens += prompt + answer
            question_types.append(question.question_type)
            answer_rows.append((i, first, first + len(answer)))
            if question.objects:
                start_row = first + 1 - len(prompt)
                nouns = [start_row + k for k, token in enumerate(prompt) if token in noun_ids]
                patches = [image.object_patches[j] for j in question.objects]
                if question.question_type == "relation":
                    looks = [(nouns[0], NOUN_LAYER, patches[0]), (nouns[1], NOUN_LAYER, patches[1])]
                    relation_rows.append((i, *nouns))
                    relation_centers.append([image.object_centers[j] for j in question.objects])
                else:
                    union = np.any(patches, axis=0)
                    looks = [(nouns[-1], NOUN_LAYER, union), (first, ANSWER_LAYER, union)]
                if question.question_type == "reading":
                    # One digit after the other; the first one predicts the second.
                    tens, ones = union & (image.digits < 10), union & (image.digits >= 10)
                    looks[1:] = [(first, ANSWER_LAYER, tens), (first + 1, ANSWER_LAYER, ones)]
                grounding += [look[2] for look in looks]
                grounding_rows += [(i, row, layer) for row, layer, _ in looks]
        rows.append((tokens, positions, segments, labels))

    length = max(len(row[0]) for row in rows)
    fills = (tokenizer.pad_token_id, 0, -1, IGNORE)
    columns = [torch.tensor([row[k] + [fills[k]] * (length - len(row[k])) for row in rows]) for k in range(4)]
    pixels = torch.from_numpy(np.stack([image.pixels for image in images])).permute(0, 3, 1, 2)

    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([vars(image)[name] for image in images]))

    return PackedBatch(
        pixel_values=pixels.float() / 127.5 - 1,
        input_ids=columns[0],
        position_ids=columns[1],
        segment_ids=columns[2],
        conversation=torch.tensor(conversations),
        labels=columns[3],
        kinds=stack("kinds"),
        colors=stack("colors"),
        digits=stack("digits"),
        centers=stack("centers"),
        present=stack("present"),
        grounding=torch.from_numpy(np.array(grounding)),
        grounding_rows=torch.tensor(grounding_rows).view(-1, 3),
        relation_rows=torch.tensor(relation_rows, dtype=torch.long).view(-1, 3),
        relation_centers=torch.tensor(relation_centers).view(-1, 2, 2),
        question_types=question_types,
        answer_rows=answer_rows,
    )


def training_batches(
    tokenizer: PreTrainedTokenizerFast,
    easy_images: list[EasyVQAImage],
    num_mosaic: int,
    num_easy: int,
    seed: int,
    rank: int,
    world_size: int,
    first_step: int,
    smallest_side: int = PATCHES_PER_SIDE,
) -> Iterator[PackedBatch]:
    """Yield batches without end; batch `step` of process `rank` is always the same: training resumes where it was.

    A third of the batches has pictures of the full size, the others a size drawn from `smallest_side` patches a side.
    """
    step = first_step
    while True:
        rng = np.random.default_rng([seed, step, rank])
        start = (step * world_size + rank) * num_mosaic
        side = drawn_side(np.random.default_rng([seed, step, world_size]), smallest_side, PATCHES_PER_SIDE)
        images = [mosaic_image("train", seed, start + i, side) for i in range(num_mosaic)]
        images += [easy_image(easy_images[i], rng, side) for i in rng.integers(0, len(easy_images), num_easy)]
        yield pack(images, tokenizer, [bool(rng.random() < 1 / 8) for _ in images])
        step += 1
