"""Mosaic-VQA: images of several small objects on clutter, and questions that need only one or two of them.

A sample is a pure function of `(split, seed, index)`: NumPy draws every pixel, so the same numbers give the same image
on every machine. An image is 144 x 144 pixels, cut in 6 x 6 cells of 24 pixels; a cell holds at most one object, so an
object touches one to four of the 12 x 12 patches of 12 pixels that a vision tower with `patch_size=12` sees.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from .samples import check_number
from .scenes import random_stream, rows_of_scenes

IMAGE_SIZE = 144
CELL_SIZE = 24
GRID = IMAGE_SIZE // CELL_SIZE
SUPERSAMPLING = 2

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
COLORS = {
    "red": (215, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (235, 220, 50),
    "green": (50, 165, 70),
    "cyan": (60, 205, 215),
    "blue": (50, 80, 215),
    "purple": (140, 60, 185),
    "pink": (245, 140, 190),
}
SIGNS = {"white": ((240, 240, 240), (15, 15, 15)), "black": ((15, 15, 15), (240, 240, 240))}
RELATIONS = ("left of", "right of", "above", "below")
QUESTION_TYPES = ("existence", "color", "shape", "relation", "counting", "reading")
SPLITS = ("train", "validation", "test")
MAX_COUNT = 5
MIN_RELATION_DISTANCE = 18  # pixels between the centers along the axis asked about

# Digits on 5 x 7 dots, one string a row.
_GLYPHS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
_GLYPH_BITMAPS = [np.array([[int(dot) for dot in row] for row in glyph.split()], dtype=bool) for glyph in _GLYPHS]


@dataclass(frozen=True)
class MosaicObject:
    """One object of a scene: a coloured shape, or a sign with a two-digit number.

    Args:
        kind (`str`): One of `SHAPES`, or `"sign"`.
        color (`str`): A key of `COLORS`, or of `SIGNS` for a sign.
        box (`tuple[int, int, int, int]`): `(x0, y0, x1, y1)` in pixels, `x1` and `y1` exclusive.
        number (`int`, *optional*): 10 to 99, for a sign.
    """

    kind: str
    color: str
    box: tuple[int, int, int, int]
    number: int | None = None

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class MosaicQuestion:
    """A question about a scene; `objects` are indices of those the answer depends on (none for "no" and 0)."""

    prompt: str
    answer: str
    question_type: str
    objects: tuple[int, ...]


@dataclass(frozen=True)
class MosaicScene:
    """An image and what lies on it.

    Args:
        pixels (`np.ndarray`): uint8 `[144, 144, 3]`.
        instances (`np.ndarray`): int8 `[144, 144]`, the index in `objects` of what each pixel shows, -1 for none.
        objects (`list[MosaicObject]`): Shapes first, then signs.
    """

    pixels: np.ndarray
    instances: np.ndarray
    objects: list[MosaicObject]


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Folded into one of ten wedges, a star is the half plane below the edge from an outer to an inner corner.
    angle = np.abs((np.arctan2(u, -v) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    inner_x, inner_y = 0.45 * math.cos(math.pi / 5), 0.45 * math.sin(math.pi / 5)
    return (inner_x - 1) * y - inner_y * (x - 1) > 0


# Each says which points of the square [-1, 1] x [-1, 1] (v points down) a shape covers.
_COVERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: u**2 + v**2 <= 0.9,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.76,
    "triangle": lambda u, v: (v <= 0.7) & (np.abs(u) <= 0.95 * (v + 1) / 1.7),
    "star": _star,
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) <= 0.27) & (np.maximum(np.abs(u), np.abs(v)) <= 0.95),
    "ring": lambda u, v: (u**2 + v**2 <= 0.95) & (u**2 + v**2 >= 0.3),
    "heart": lambda u, v: (
        ((1.25 * u) ** 2 + (0.15 - 1.25 * v) ** 2 - 1) ** 3 <= (1.25 * u) ** 2 * (0.15 - 1.25 * v) ** 3
    ),
    "moon": lambda u, v: (u**2 + v**2 <= 1) & ((u - 0.5) ** 2 + v**2 >= 0.62),
}


def _cell_points(
    center_x: float, center_y: float, scale_x: float, scale_y: float, angle: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates `[48, 48]` of a cell's sub-pixels in an object's own turned and scaled frame."""
    ticks = (np.arange(CELL_SIZE * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    x, y = np.meshgrid(ticks - center_x, ticks - center_y)
    cos, sin = math.cos(angle), math.sin(angle)
    return (cos * x + sin * y) / scale_x, (cos * y - sin * x) / scale_y


def _coverage(inside: np.ndarray) -> np.ndarray:
    """Share of each pixel that is covered, float `[24, 24]`, from boolean sub-pixels `[48, 48]`."""
    return inside.reshape(CELL_SIZE, SUPERSAMPLING, CELL_SIZE, SUPERSAMPLING).mean(axis=(1, 3))


def _background(rng: np.random.Generator) -> np.ndarray:
    """Coloured noise, coarse and fine, with specks and lines: float `[144, 144, 3]`."""
    coarse = 130 + rng.uniform(-40, 40, 3) + rng.uniform(-30, 30, (13, 13, 3))
    ticks = (np.arange(IMAGE_SIZE) + 0.5) / 12
    low, share = ticks.astype(int), (ticks % 1)[:, None, None]
    rows = coarse[low] * (1 - share) + coarse[low + 1] * share
    share = share.reshape(1, -1, 1)
    canvas = rows[:, low] * (1 - share) + rows[:, low + 1] * share
    canvas += rng.integers(-5, 6, (IMAGE_SIZE, IMAGE_SIZE, 1))
    for _ in range(rng.integers(10, 26)):
        x, y = rng.integers(0, IMAGE_SIZE - 3, 2)
        width, height = rng.integers(1, 4, 2)
        canvas[y : y + height, x : x + width] = rng.integers(0, 256, 3)
    for _ in range(rng.integers(3, 9)):
        x, y = rng.uniform(0, IMAGE_SIZE, 2)
        angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(8, 40)
        steps = np.arange(0, length, 0.7)
        xs, ys = (x + steps * math.cos(angle)).astype(int), (y + steps * math.sin(angle)).astype(int)
        seen = (xs >= 0) & (xs < IMAGE_SIZE) & (ys >= 0) & (ys < IMAGE_SIZE)
        canvas[ys[seen], xs[seen]] = rng.integers(0, 256, 3)
    return canvas


def draw_scene(rng: np.random.Generator) -> MosaicScene:
    """Draw a scene of 6 to 12 shapes and one or two signs; half of the scenes repeat one colour or one shape."""
    canvas = _background(rng)
    instances = np.full((IMAGE_SIZE, IMAGE_SIZE), -1, dtype=np.int8)
    objects: list[MosaicObject] = []

    def paint(coverage: np.ndarray, color: np.ndarray, row: int, column: int) -> None:
        window = np.s_[row * CELL_SIZE : (row + 1) * CELL_SIZE, column * CELL_SIZE : (column + 1) * CELL_SIZE]
        canvas[window] += coverage[..., None] * (color - canvas[window])

    def claim(coverage: np.ndarray, row: int, column: int) -> tuple[int, int, int, int]:
        window = np.s_[row * CELL_SIZE : (row + 1) * CELL_SIZE, column * CELL_SIZE : (column + 1) * CELL_SIZE]
        instances[window][coverage >= 0.5] = len(objects)
        rows, columns = np.nonzero(coverage >= 0.5)
        x, y = column * CELL_SIZE, row * CELL_SIZE
        return x + int(columns.min()), y + int(rows.min()), x + int(columns.max()) + 1, y + int(rows.max()) + 1

    num_shapes, num_signs = int(rng.integers(6, 13)), int(rng.integers(1, 3))
    cells = [divmod(int(cell), GRID) for cell in rng.permutation(GRID * GRID)[: num_shapes + num_signs]]
    kinds = [SHAPES[i] for i in rng.integers(0, len(SHAPES), num_shapes)]
    colors = [list(COLORS)[i] for i in rng.integers(0, len(COLORS), num_shapes)]
    if rng.random() < 0.5:  # large counts would be rare otherwise
        repeated = kinds if rng.random() < 0.5 else colors
        num_repeated = int(rng.integers(2, MAX_COUNT + 1))
        repeated[:num_repeated] = [repeated[0]] * num_repeated

    for kind, color, (row, column) in zip(kinds, colors, cells[:num_shapes], strict=True):
        radius = rng.uniform(7, 10.5)
        center_x, center_y = rng.uniform(radius + 0.5, CELL_SIZE - radius - 0.5, 2)
        coverage = _coverage(
            _COVERS[kind](*_cell_points(center_x, center_y, radius, radius, math.radians(rng.uniform(-20, 20))))
        )
        paint(coverage, np.array(COLORS[color]) + rng.uniform(-14, 14, 3), row, column)
        objects.append(MosaicObject(kind, color, claim(coverage, row, column)))

    for color, (row, column) in zip(rng.permutation(list(SIGNS))[:num_signs], cells[num_shapes:], strict=True):
        # A sign fills one row of patches of its cell, each digit in a patch of its own.
        paper, ink = (np.array(rgb) for rgb in SIGNS[str(color)])
        number = int(rng.integers(10, 100))
        top = 12 * int(rng.integers(0, 2)) + 6
        u, v = _cell_points(12, top, 11.5, 6, 0.0)
        coverage = _coverage(np.maximum(np.abs(u), np.abs(v)) <= 1)
        paint(coverage, paper, row, column)
        for digit, middle in ((number // 10, 6.5), (number % 10, 17.5)):
            shift_x, shift_y, tilt = rng.uniform(-0.7, 0.7), rng.uniform(-0.5, 0.5), math.radians(rng.uniform(-6, 6))
            u, v = _cell_points(middle + shift_x, top + shift_y, 3.5, 4.9, tilt)
            within = (np.abs(u) < 1) & (np.abs(v) < 1)
            dots = _GLYPH_BITMAPS[digit][
                np.clip((v + 1) * 3.5, 0, 6).astype(int), np.clip((u + 1) * 2.5, 0, 4).astype(int)
            ]
            paint(_coverage(dots & within), ink, row, column)
        objects.append(MosaicObject("sign", str(color), claim(coverage, row, column), number))

    return MosaicScene(np.clip(canvas, 0, 255).astype(np.uint8), instances, objects)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _pick(rng: np.random.Generator, options: list):
    return options[int(rng.integers(len(options)))]


@dataclass
class Shapes:
    """The objects of a scene that are not signs, with their places in it, and how many have each trait."""

    scene: MosaicScene

    def __post_init__(self):
        self.items = [(i, item) for i, item in enumerate(self.scene.objects) if item.kind != "sign"]
        self.by_kind = Counter(item.kind for _, item in self.items)
        self.by_color = Counter(item.color for _, item in self.items)
        self.by_name = Counter(item.name for _, item in self.items)


def _existence(shapes: Shapes, rng: np.random.Generator) -> MosaicQuestion:
    names = shapes.by_name
    if rng.random() < 0.5:
        name = _pick(rng, shapes.items)[1].name
    else:
        pairs = [f"{color} {kind}" for color in shapes.by_color for kind in shapes.by_kind]
        absent = [name for name in pairs if name not in names]
        absent = absent or [f"{c} {k}" for c in COLORS for k in SHAPES if f"{c} {k}" not in names]
        name = _pick(rng, absent)
    found = tuple(i for i, item in shapes.items if item.name == name)
    return MosaicQuestion(f"Is there {_article(name)} {name}?", "yes" if found else "no", "existence", found)


def _color(shapes: Shapes, rng: np.random.Generator) -> MosaicQuestion | None:
    single = [(i, item) for i, item in shapes.items if shapes.by_kind[item.kind] == 1]
    if not single:
        return None
    i, item = _pick(rng, single)
    return MosaicQuestion(f"What color is the {item.kind}?", item.color, "color", (i,))


def _shape(shapes: Shapes, rng: np.random.Generator) -> MosaicQuestion | None:
    single = [(i, item) for i, item in shapes.items if shapes.by_color[item.color] == 1]
    if not single:
        return None
    i, item = _pick(rng, single)
    return MosaicQuestion(f"What shape is the {item.color} object?", item.kind, "shape", (i,))


def _relation(shapes: Shapes, rng: np.random.Generator) -> MosaicQuestion | None:
    single = [(i, item) for i, item in shapes.items if shapes.by_name[item.name] == 1]
    axis = int(rng.integers(2))
    pairs = [
        (i, j)
        for i, first in single
        for j, second in single
        if abs(first.center[axis] - second.center[axis]) >= MIN_RELATION_DISTANCE
    ]
    if not pairs:
        return None
    i, j = _pick(rng, pairs)
    first, second = shapes.scene.objects[i], shapes.scene.objects[j]
    before = bool(rng.random() < 0.5)  # asks for left of / above; else for right of / below
    relation = RELATIONS[2 * axis + (0 if before else 1)]
    answer = "yes" if (first.center[axis] < second.center[axis]) == before else "no"
    return MosaicQuestion(f"Is the {first.name} {relation} the {second.name}?", answer, "relation", (i, j))


def _counting(shapes: Shapes, rng: np.random.Generator) -> MosaicQuestion:
    attributes = [(f"{kind}s", shapes.by_kind[kind], "kind", kind) for kind in SHAPES if kind != "cross"]
    attributes += [("crosses", shapes.by_kind["cross"], "kind", "cross")]
    attributes += [(f"{color} objects", shapes.by_color[color], "color", color) for color in COLORS]
    counts = sorted({count for _, count, _, _ in attributes if count <= MAX_COUNT})
    count = _pick(rng, counts)
    plural, _, field, value = _pick(rng, [attribute for attribute in attributes if attribute[1] == count])
    found = tuple(i for i, item in shapes.items if getattr(item, field) == value)
    return MosaicQuestion(f"How many {plural} are there?", str(count), "counting", found)


def _reading(shapes: Shapes, rng: np.random.Generator) -> MosaicQuestion:
    i, sign = _pick(rng, [(i, item) for i, item in enumerate(shapes.scene.objects) if item.kind == "sign"])
    return MosaicQuestion(f"What number is on the {sign.color} sign?", str(sign.number), "reading", (i,))


_ASK: dict[str, Callable[[Shapes, np.random.Generator], MosaicQuestion | None]] = {
    "existence": _existence,
    "color": _color,
    "shape": _shape,
    "relation": _relation,
    "counting": _counting,
    "reading": _reading,
}


def ask(scene: MosaicScene, question_type: str, rng: np.random.Generator) -> MosaicQuestion | None:
    """Ask one question of a type, or return `None` where the scene allows no unambiguous one.

    Yes and no are equally likely. What an existence question names in vain has its colour and its shape in the image,
    on different objects, wherever that is possible (the adversarial absentees of POPE).
    """
    if question_type not in _ASK:
        raise ValueError(f"Unknown question type {question_type!r}; one of {', '.join(QUESTION_TYPES)}.")
    return _ASK[question_type](Shapes(scene), rng)


def scene_rng(split: str, seed: int, index: int) -> np.random.Generator:
    """The random stream of one scene; the streams of different splits, seeds or indices have nothing in common."""
    return random_stream(SPLITS, split, seed, index)


def mosaic_scenes(split: str, seed: int) -> Iterator[tuple[int, MosaicScene, list[MosaicQuestion]]]:
    """Yield `(index, scene, questions)` without end, with one question of every type in random order.

    Scenes that allow no question of some type are passed over, so that every image carries all six types.
    """
    for index in itertools.count():
        rng = scene_rng(split, seed, index)
        scene = draw_scene(rng)
        questions = [ask(scene, QUESTION_TYPES[i], rng) for i in rng.permutation(len(QUESTION_TYPES))]
        if all(question is not None for question in questions):
            yield index, scene, [question for question in questions if question is not None]


def mosaic_vqa(split: str = "test", seed: int = 0, num_samples: int = 2000) -> Dataset:
    """
    Generate questions about mosaics, six an image, one of each type.

    Args:
        split (`str`): `"train"`, `"validation"` or `"test"`. No image is in two splits, whatever the seeds.
        seed (`int`): Not negative; each seed gives other images.
        num_samples (`int`): Number of questions, at least 1.

    Returns:
        `datasets.Dataset`: `num_samples` rows of `SAMPLE_FEATURES`. `boxes` are those of the objects asked about: none
        where the answer is "no" because there is no such object, or "0".

    Raises:
        `ValueError`: If the split is unknown, the seed negative, or `num_samples` below 1.

    Example:

    ```python
    >>> from tprl_hf.data import mosaic_vqa

    >>> sample = mosaic_vqa(split="test", seed=7, num_samples=6)[0]
    >>> sample["images"][0].size
    (144, 144)
    ```
    """
    seed, num_samples = check_number("seed", seed, 0), check_number("num_samples", num_samples, 1)
    return rows_of_scenes(mosaic_scenes(split, seed), f"mosaic-{split}-{seed}", num_samples, "Drawing mosaics")
