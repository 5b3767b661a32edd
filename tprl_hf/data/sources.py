"""Samples by the name of their source, as recipes and commands write it."""

import json
from pathlib import Path

from datasets import Dataset, load_from_disk

from .easy import easy_vqa
from .jsonl import jsonl_samples
from .mosaic import mosaic_vqa
from .own_rows import check_other_names, with_names
from .photo import photo_vqa
from .samples import check_number

KINDS = "mosaic, easy-vqa, photo, a .jsonl file, or the directory of a saved dataset"


def is_source(name: str) -> bool:
    """
    Whether `name` is of one of the kinds that [`read_source`] reads. Raises `ValueError` for a directory of several
    saved datasets.
    """
    if not isinstance(name, str):
        return False
    if (several := Path(name) / "dataset_dict.json").is_file():
        splits = json.loads(several.read_bytes())["splits"]
        raise ValueError(
            f"{name} has several splits, {', '.join(splits)}: name one of them, such as {name}/{splits[0]}."
        )
    known = name in ("mosaic", "easy-vqa", "photo")
    return known or name.endswith(".jsonl") or (Path(name) / "state.json").is_file()


def read_source(name: str, split: str, seed: int = 0, num_samples: int | None = None) -> Dataset:
    """
    The samples of one source.

    Args:
        name (`str`):
            mosaic, easy-vqa, photo, a .jsonl file, or the directory of a saved dataset.
        split (`str`):
            Of mosaic, easy-vqa and photo.
        seed (`int`, *optional*, defaults to 0):
            Of the images of mosaic and photo.
        num_samples (`int`, *optional*):
            Only the first so many. Mosaic and photo, which are made from a seed, make 6000 by default.

    Returns:
        `datasets.Dataset`: Rows of `SAMPLE_FEATURES`; of a saved dataset the columns that it has, with names in place
        of the numbers of a `ClassLabel`.

    Raises:
        `ValueError`: If it is none of these, or its samples are not as they must be.
        `OSError`: If the file or an image of it is missing.
    """
    if num_samples is not None:
        num_samples = check_number("num_samples", num_samples, 1)
    if not is_source(name):
        raise ValueError(f"There are no data {name!r}: a source is {KINDS}.")
    if name == "mosaic":
        return mosaic_vqa(split=split, seed=seed, num_samples=6000 if num_samples is None else num_samples)
    if name == "photo":
        return photo_vqa(split=split, seed=seed, num_samples=6000 if num_samples is None else num_samples)
    if name == "easy-vqa":
        return easy_vqa(split=split, num_samples=num_samples)
    if name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"There is no file {name}.")
        return jsonl_samples(name, num_samples)
    if not json.loads((Path(name) / "state.json").read_bytes()).get("_data_files"):  # which datasets cannot load
        raise ValueError(f"{name} has no samples.")
    dataset = load_from_disk(name)
    check_other_names(dataset, name)
    return with_names(dataset if num_samples is None else dataset.select(range(min(num_samples, len(dataset)))))
