"""Pictures to begin with: generated scenes with a question each, which need no network."""

from dataclasses import dataclass

from PIL import Image

from tprl_hf.data.mosaic import mosaic_vqa

SEED = 7
WANTED = ("existence", "color", "relation", "reading", "counting", "shape")


@dataclass(frozen=True)
class Example:
    """
    A picture and two questions about it.

    Args:
        image (`PIL.Image.Image`): In RGB.
        question, other_question (`str`): Of two types, where the scene has them.
    """

    image: Image.Image
    question: str
    other_question: str


def example_scenes() -> list[Example]:
    """One scene for each type of question, always the same ones."""
    scenes: dict[str, list[dict]] = {}
    for row in mosaic_vqa(split="test", seed=SEED, num_samples=120):
        scenes.setdefault(row["image_id"], []).append(row)
    found: list[Example] = []
    for wanted, rows in zip(WANTED, scenes.values(), strict=False):
        first = next((row for row in rows if row["question_type"] == wanted), rows[0])
        second = next((row for row in rows if row["question_type"] != first["question_type"]), rows[-1])
        found.append(Example(first["images"][0].convert("RGB"), first["prompt"], second["prompt"]))
    return found
