"""Photo-VQA: photographed things on photographic wallpapers, and questions that need only one or two of them.

The photographs come from Debian packages (`photo_things.py`) and are not part of this one; `python -m
tprl_hf.test_bed.photo_parts` fetches them. A scene is a function of `(split, seed, index)` and of these files. It is
224 x 224 pixels and shows three to seven different things of 31 to 78 pixels, whose boxes are known.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image, ImageEnhance

from .photo_things import KINDS, NEW_THINGS, PACKAGES, PICTURE_FILES, THINGS, WALLPAPER_FILES, WALLPAPERS, Thing
from .samples import check_number
from .scenes import random_stream, rows_of_scenes

IMAGE_SIZE = 224
QUESTION_TYPES = ("existence", "category", "place", "relation", "comparison", "pair", "counting")
# new_pictures: other photographs of nine known things; new_things: fifteen things that training never shows or names.
SPLITS = ("train", "validation", "test", "new_pictures", "new_things")
COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
RELATIONS = ("left of", "right of", "above", "below")
COMPARISONS = ("farther left", "farther right", "higher", "lower")
EXTREMES = ("farthest left", "farthest right", "at the top", "at the bottom")
NO_ARTICLE = frozenset("grapes scissors corn garlic lettuce broccoli earth".split())
STAMP_SIZE, WALLPAPER_SIZE = 110, 480  # pixels that are kept of a photograph: its longer, its shorter side
OPAQUE = 100  # of 255
MIN_DISTANCE = 20  # pixels between two centers along the axis asked about
MARGIN = 10  # pixels by which a quadrant must be free of a second center


def photo_directory() -> Path:
    """Where the parts of the photo test bed lie: `$TPRL_PHOTO`, else `~/.cache/tprl_hf/photo`."""
    return Path(os.environ.get("TPRL_PHOTO") or Path.home() / ".cache" / "tprl_hf" / "photo")


def pictures_root() -> Path:
    """The folder below which all pictures lie: fetched ones in [`photo_directory`], or `/` where they are installed.

    Raises:
        `FileNotFoundError`: If a picture is in neither.
    """
    missing = None
    for root in (photo_directory() / "pictures", Path("/")):
        missing = next((path for path in PICTURE_FILES if not (root / path).is_file()), None)
        if missing is None:
            return root
    raise FileNotFoundError(
        f"The photographs of Photo-VQA are not here: /{missing} is missing. They are in the Debian packages "
        f"{', '.join(PACKAGES)}: run `python -m tprl_hf.test_bed.photo_parts`, or install these packages."
    )


@dataclass(frozen=True)
class PhotoObject:
    """A thing on a scene; `box` is `(x0, y0, x1, y1)` in pixels, `x1` and `y1` exclusive."""

    name: str
    kind: str
    box: tuple[int, int, int, int]

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class PhotoQuestion:
    """A question about a scene; `objects` are indices of those the answer depends on (none for "no" and "zero")."""

    prompt: str
    answer: str
    question_type: str
    objects: tuple[int, ...]


@dataclass(frozen=True)
class PhotoScene:
    """A picture and what lies on it.

    Args:
        pixels (`np.ndarray`): uint8 `[224, 224, 3]`.
        instances (`np.ndarray`): int8 `[224, 224]`, the index in `objects` of what each pixel shows, -1 for none.
        objects (`list[PhotoObject]`): Three to seven, of different names.
        names (`tuple[str, ...]`): All that could lie on scenes of this split, to ask for what is absent.
    """

    pixels: np.ndarray
    instances: np.ndarray
    objects: list[PhotoObject]
    names: tuple[str, ...]

    @cached_property
    def by_kind(self) -> dict[str, list[int]]:
        """Indices of the objects of every kind, also of those that the scene has none of."""
        return {kind: [i for i, item in enumerate(self.objects) if item.kind == kind] for kind in KINDS}

    @cached_property
    def absent(self) -> list[str]:
        present = {item.name for item in self.objects}
        return [name for name in self.names if name not in present]


@lru_cache(maxsize=len(PICTURE_FILES))
def _stamp(path: Path) -> Image.Image:
    """A cut-out: RGBA, without its empty border, the longer side at most 110 pixels."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 24)).getbbox())
    image.thumbnail((STAMP_SIZE, STAMP_SIZE), Image.Resampling.LANCZOS)
    return image


@lru_cache(maxsize=len(WALLPAPER_FILES))
def _wallpaper(path: Path) -> Image.Image:
    """A wallpaper, RGB, the shorter side 480 pixels."""
    with Image.open(path) as file:
        file.draft("RGB", (2 * WALLPAPER_SIZE, 2 * WALLPAPER_SIZE))
        image = file.convert("RGB")
    scale = WALLPAPER_SIZE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BILINEAR)


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _background(rng: np.random.Generator, root: Path) -> Image.Image:
    """A square cut out of a wallpaper, scaled to 224 pixels, half of the time mirrored, lighter or darker."""
    image = _wallpaper(root / WALLPAPERS / _pick(rng, WALLPAPER_FILES))
    side = int(rng.integers(230, 471))
    x, y = int(rng.integers(0, image.width - side + 1)), int(rng.integers(0, image.height - side + 1))
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.2))


def _choose(rng: np.random.Generator, split: str) -> list[tuple[Thing, str]]:
    """Which things a scene shows, each with its file: up to five of one kind, so that there is something to count."""
    things = [thing for thing in THINGS.values() if split == "new_things" or thing.name not in NEW_THINGS]
    count = int(rng.integers(3, 8))
    kind = _pick(rng, KINDS)
    alike = [thing for thing in things if thing.kind == kind]
    others = [thing for thing in things if thing.kind != kind]
    num_alike = min(int(rng.integers(1, 6)), count, len(alike))
    chosen = [alike[i] for i in rng.permutation(len(alike))[:num_alike]]
    chosen += [others[i] for i in rng.permutation(len(others))[: count - num_alike]]
    if split == "new_things":  # half of what lies there
        new = [thing for thing in things if thing.name in NEW_THINGS and thing not in chosen]
        chosen[: count // 2] = [new[i] for i in rng.permutation(len(new))[: count // 2]]
    if split == "new_pictures":
        known = [thing for thing in things if thing.unseen and thing not in chosen]
        chosen[: count // 2] = [known[i] for i in rng.permutation(len(known))[: count // 2]]
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    return [
        (thing, _pick(rng, thing.unseen if split == "new_pictures" and thing.unseen else thing.seen))
        for thing in chosen
    ]


def draw_scene(rng: np.random.Generator, split: str, root: Path) -> PhotoScene:
    """Paste things where they do not cover each other; what finds no place in 40 tries is left out."""
    canvas = _background(rng, root)
    instances = np.full((IMAGE_SIZE, IMAGE_SIZE), -1, dtype=np.int8)
    objects: list[PhotoObject] = []
    chosen = _choose(rng, split)
    for thing, path in chosen:
        stamp = _stamp(root / path)
        for _ in range(40):
            longer = rng.uniform(36, 78) * (1 if len(chosen) < 6 else 0.85)
            scale = longer / max(stamp.size)
            width, height = (max(14, round(side * scale)) for side in stamp.size)
            x, y = int(rng.integers(0, IMAGE_SIZE - width + 1)), int(rng.integers(0, IMAGE_SIZE - height + 1))
            box = (x, y, x + width, y + height)
            if not any(_overlap(box, item.box) for item in objects):
                break
        else:
            continue
        stamp = stamp.resize((width, height), Image.Resampling.LANCZOS)
        if rng.random() < 0.5:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        alpha = stamp.getchannel("A")
        stamp = ImageEnhance.Brightness(stamp.convert("RGB")).enhance(rng.uniform(0.8, 1.2))
        canvas.paste(stamp, (x, y), alpha)
        instances[y : y + height, x : x + width][np.asarray(alpha) > OPAQUE] = len(objects)
        objects.append(PhotoObject(thing.name, thing.kind, box))
    names = tuple(name for name in THINGS if split == "new_things" or name not in NEW_THINGS)
    return PhotoScene(np.asarray(canvas), instances, objects, names)


def _overlap(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> bool:
    """Whether two boxes share more than two pixels in both directions."""
    across = min(first[2], second[2]) - max(first[0], second[0])
    down = min(first[3], second[3]) - max(first[1], second[1])
    return across > 2 and down > 2


def with_article(name: str) -> str:
    if name in NO_ARTICLE:
        return name
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _absent_name(scene: PhotoScene, rng: np.random.Generator) -> str:
    """A thing that is not there: at least half of the time of a kind that is."""
    kinds = {item.kind for item in scene.objects} - {""}
    alike = [name for name in scene.absent if THINGS[name].kind in kinds]
    return _pick(rng, alike if alike and rng.random() < 0.5 else scene.absent)


def _existence(scene: PhotoScene, rng: np.random.Generator) -> PhotoQuestion:
    if rng.random() < 0.5:
        i = int(rng.integers(len(scene.objects)))
        return PhotoQuestion(f"Is there {with_article(scene.objects[i].name)}?", "yes", "existence", (i,))
    return PhotoQuestion(f"Is there {with_article(_absent_name(scene, rng))}?", "no", "existence", ())


def _category(scene: PhotoScene, rng: np.random.Generator) -> PhotoQuestion | None:
    single = [(kind, indices[0]) for kind, indices in scene.by_kind.items() if len(indices) == 1]
    if not single:
        return None
    kind, i = _pick(rng, single)
    return PhotoQuestion(f"What {kind} is there?", scene.objects[i].name, "category", (i,))


def _place(scene: PhotoScene, rng: np.random.Generator) -> PhotoQuestion | None:
    """Quadrants with one thing in them, and what lies farthest to a side."""
    centers = np.array([item.center for item in scene.objects])
    middle = IMAGE_SIZE / 2
    options: list[tuple[str, int]] = []
    for vertical, down in (("top", -1), ("bottom", 1)):
        for horizontal, across in (("left", -1), ("right", 1)):
            inside = ((centers - middle) * (across, down)).min(axis=1)  # how far within the quadrant
            near = np.flatnonzero(inside > -MARGIN)
            if len(near) == 1 and inside[near[0]] > 0:
                options.append((f"What is in the {vertical} {horizontal}?", int(near[0])))
    for number, words in enumerate(EXTREMES):
        along = centers[:, number // 2] * (1 if number % 2 == 0 else -1)
        order = np.argsort(along)
        if along[order[1]] - along[order[0]] >= MIN_DISTANCE:
            options.append((f"What is {words}?", int(order[0])))
    if not options:
        return None
    prompt, i = _pick(rng, options)
    return PhotoQuestion(prompt, scene.objects[i].name, "place", (i,))


def _apart(scene: PhotoScene, rng: np.random.Generator) -> tuple[int, int, int] | None:
    """An axis, and two things whose centers are 20 pixels apart along it, the first one before the second."""
    axis = int(rng.integers(2))
    along = [item.center[axis] for item in scene.objects]
    pairs = [(i, j) for i, j in itertools.permutations(range(len(along)), 2) if along[j] - along[i] >= MIN_DISTANCE]
    return (axis, *_pick(rng, pairs)) if pairs else None


def _relation(scene: PhotoScene, rng: np.random.Generator) -> PhotoQuestion | None:
    found = _apart(scene, rng)
    if found is None:
        return None
    axis, before, after = found
    yes, swapped = rng.random(2) < 0.5
    first, second = (after, before) if swapped else (before, after)
    relation = RELATIONS[2 * axis + int(swapped == yes)]
    prompt = f"Is the {scene.objects[first].name} {relation} the {scene.objects[second].name}?"
    return PhotoQuestion(prompt, "yes" if yes else "no", "relation", (first, second))


def _comparison(scene: PhotoScene, rng: np.random.Generator) -> PhotoQuestion | None:
    found = _apart(scene, rng)
    if found is None:
        return None
    axis, before, after = found
    far, swapped = rng.random(2) < 0.5
    first, second = (after, before) if swapped else (before, after)
    prompt = f"Which is {COMPARISONS[2 * axis + int(far)]}, the {scene.objects[first].name} or the "
    answer = scene.objects[after if far else before].name
    return PhotoQuestion(f"{prompt}{scene.objects[second].name}?", answer, "comparison", (first, second))


def _pair(scene: PhotoScene, rng: np.random.Generator) -> PhotoQuestion:
    """Two things, both there half of the time; else one of them is not, in either place."""
    i, j = (int(index) for index in rng.permutation(len(scene.objects))[:2])
    names = [scene.objects[i].name, scene.objects[j].name]
    present: tuple[int, ...] = (i, j)
    if rng.random() < 0.5:
        answer = "yes"
    else:
        answer, place = "no", int(rng.integers(2))
        names[place], present = _absent_name(scene, rng), ((j,) if place == 0 else (i,))
    prompt = f"Are there {with_article(names[0])} and {with_article(names[1])}?"
    return PhotoQuestion(prompt, answer, "pair", present)


def _counting(scene: PhotoScene, rng: np.random.Generator) -> PhotoQuestion:
    counts = sorted({len(indices) for indices in scene.by_kind.values()})
    count = counts[-1] if rng.random() < 0.5 else _pick(rng, counts)  # large ones would be rare otherwise
    kind = _pick(rng, [kind for kind, indices in scene.by_kind.items() if len(indices) == count])
    return PhotoQuestion(f"How many {kind}s are there?", COUNTS[count], "counting", tuple(scene.by_kind[kind]))


_ASK: dict[str, Callable[[PhotoScene, np.random.Generator], PhotoQuestion | None]] = {
    "existence": _existence,
    "category": _category,
    "place": _place,
    "relation": _relation,
    "comparison": _comparison,
    "pair": _pair,
    "counting": _counting,
}


def ask(scene: PhotoScene, question_type: str, rng: np.random.Generator) -> PhotoQuestion | None:
    """Ask one question of a type, or return `None` where the scene allows no unambiguous one.

    Yes and no are equally likely, and so are the two names of a comparison.
    """
    if question_type not in _ASK:
        raise ValueError(f"Unknown question type {question_type!r}; one of {', '.join(QUESTION_TYPES)}.")
    return _ASK[question_type](scene, rng)


def scene_rng(split: str, seed: int, index: int) -> np.random.Generator:
    """The random stream of one scene; the streams of different splits, seeds or indices have nothing in common."""
    return random_stream(SPLITS, split, seed, index)


def photo_scenes(split: str, seed: int, root: Path) -> Iterator[tuple[int, PhotoScene, list[PhotoQuestion]]]:
    """Yield `(index, scene, questions)` without end, with one question of every type in random order.

    Scenes that allow no question of some type are passed over, so that every picture carries all seven types.
    """
    for index in itertools.count():
        rng = scene_rng(split, seed, index)
        scene = draw_scene(rng, split, root)
        if len(scene.objects) < 3:
            continue
        questions = [ask(scene, QUESTION_TYPES[i], rng) for i in rng.permutation(len(QUESTION_TYPES))]
        if all(question is not None for question in questions):
            yield index, scene, [question for question in questions if question is not None]


def photo_vqa(split: str = "test", seed: int = 0, num_samples: int = 2000) -> Dataset:
    """
    Generate questions about photographed things, seven a picture, one of each type.

    Args:
        split (`str`): `"train"`, `"validation"`, `"test"`, `"new_pictures"` (half of what lies on a picture is
            shown in a photograph that training never shows) or `"new_things"` (half of what lies on a picture
            is never shown nor named in training). No picture is in two splits, whatever the seeds.
        seed (`int`): Not negative; each seed gives other pictures.
        num_samples (`int`): Number of questions, at least 1.

    Returns:
        `datasets.Dataset`: `num_samples` rows of `SAMPLE_FEATURES`. `boxes` are those of the objects asked about: none
        where the answer is "no" because there is no such object, or "zero".

    Raises:
        `ValueError`: If the split is unknown, the seed negative, or `num_samples` below 1.
        `FileNotFoundError`: If the photographs are not on this machine.
    """
    seed, num_samples = check_number("seed", seed, 0), check_number("num_samples", num_samples, 1)
    root = pictures_root()
    scenes = photo_scenes(split, seed, root)
    return rows_of_scenes(scenes, f"photo-{split}-{seed}", num_samples, "Drawing scenes", str(root))
