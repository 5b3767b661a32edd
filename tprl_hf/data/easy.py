"""easy-VQA (Victor Zhou, MIT licence): 64-pixel images of one shape each, read from the PyPI package `easy-vqa`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from .samples import SAMPLE_FEATURES, check_number

EASY_VQA_SPLITS = ("train", "test")
EASY_VQA_COLORS = ("black", "gray", "red", "teal", "brown", "green", "blue", "yellow")
EASY_VQA_SHAPES = ("circle", "rectangle", "triangle")


@dataclass
class EasyVQAImage:
    """One image file and all its `(question, answer)` pairs."""

    path: Path
    questions: list[tuple[str, str]] = field(default_factory=list)


def easy_vqa_images(split: str) -> list[EasyVQAImage]:
    """List the images of a split of easy-VQA: 4,000 for training, 1,000 for testing, each with about ten questions.

    Raises:
        `ImportError`: If the package `easy-vqa` is not installed.
        `ValueError`: If `split` is not one of `EASY_VQA_SPLITS`.
    """
    if split not in EASY_VQA_SPLITS:
        raise ValueError(f"Unknown split {split!r} of easy-VQA; one of {', '.join(EASY_VQA_SPLITS)}.")
    try:
        import easy_vqa as package
    except ImportError as error:
        raise ImportError("easy-VQA comes with its own package: pip install 'tprl_hf[train]'.") from error
    if split == "train":
        paths, (prompts, answers, image_ids) = package.get_train_image_paths(), package.get_train_questions()
    else:
        paths, (prompts, answers, image_ids) = package.get_test_image_paths(), package.get_test_questions()
    images = {image_id: EasyVQAImage(Path(path)) for image_id, path in sorted(paths.items())}
    for prompt, answer, image_id in zip(prompts, answers, image_ids, strict=True):
        images[image_id].questions.append((prompt, answer))
    return list(images.values())


def easy_vqa_question_type(answer: str) -> str:
    """`existence`, `color` or `shape`: in easy-VQA the answer tells."""
    if answer in ("yes", "no"):
        return "existence"
    return "shape" if answer in EASY_VQA_SHAPES else "color"


def easy_vqa(split: str = "test", num_samples: int | None = None) -> Dataset:
    """
    Read easy-VQA, its own training (38,575 questions) or test split (9,673), in the package's order of images.

    Args:
        split (`str`): `"train"` or `"test"`.
        num_samples (`int`, *optional*): Only the first so many questions.

    Returns:
        `datasets.Dataset`: Rows of `SAMPLE_FEATURES`; `boxes` and `objects` are empty, easy-VQA has none.
    """
    if num_samples is not None:
        num_samples = check_number("num_samples", num_samples, 1)
    rows = [
        {
            "images": [{"bytes": None, "path": str(image.path)}],
            "prompt": prompt,
            "answer": answer,
            "question_type": easy_vqa_question_type(answer),
            "boxes": [],
            "image_id": f"easy-{split}-{image.path.stem}",
            "objects": [],
        }
        for image in easy_vqa_images(split)
        for prompt, answer in image.questions
    ]
    return Dataset.from_list(rows[:num_samples], features=SAMPLE_FEATURES)
