"""Notes what data a stage of `tprl train` began with, so that it resumes with the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tprl_hf.whole_files import write

from .processes import is_first_process

if TYPE_CHECKING:
    from datasets import Dataset


def claim_data(directory: Path, datasets: Mapping[str, "Dataset | None"]) -> None:
    """
    Notes digests of a stage's data in its directory. Image files that have their size and time of change are not read
    again.

    Args:
        directory (`Path`): the stage's.
        datasets (`Mapping[str, Dataset]`): data by their names in the recipe; `None` for those that it has not.

    Raises:
        `ValueError`: if the stage began with other data.
    """
    if not is_first_process():
        return
    from tprl_hf.data.digest import data_digest

    path = directory / "data.json"
    try:
        noted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        before = {name: (one["content"], one["quick"]) for name, one in noted.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete {directory} to run this stage again.") from error
    found = {}
    for name, dataset in datasets.items():
        if dataset is None:
            continue
        quick = data_digest(dataset, read_files=False)
        content_before, quick_before = before.get(name, (None, None))
        content = content_before if quick == quick_before else data_digest(dataset)
        if content_before not in (None, content):
            raise ValueError(
                f"{directory} was begun with other data: those of {name} have changed (digest {content}, before "
                f"{content_before}). Restore them, pass --set output_dir=ANOTHER, or delete {directory}."
            )
        found[name] = {"content": content, "quick": quick}
    write(path, json.dumps(found, indent=2) + "\n")
