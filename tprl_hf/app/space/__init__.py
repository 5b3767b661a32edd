"""The folder of a Space on the Hub: the page of one model, ready to be uploaded. Knows neither gradio nor torch."""

import re
import shutil
from pathlib import Path

HERE = Path(__file__).parent
FILES = ("README.md", "app.py", "requirements.txt")


def write_space(directory: str | Path, model: str | None = None) -> list[Path]:
    """
    Writes a folder that runs by itself: the page, what it needs from elsewhere, and a copy of this package.

    Args:
        directory (`str` or `Path`): Where; it must not exist.
        model (`str`, *optional*): A name on the Hub. Defaults to the embedded model.

    Returns:
        `list[Path]`: The files that one may want to edit.

    Raises:
        `FileExistsError`: If there is something at `directory`.
        `ValueError`: For a model of this machine, which a Space cannot read.
    """
    target = Path(directory)
    if target.exists():
        raise FileExistsError(f"{target} exists: a Space is written into a new folder.")
    if model is not None and Path(model).exists():
        raise ValueError(
            f"{model} lies on this machine, where a Space cannot read it: tprl push it, and pass its name."
        )
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(HERE.parents[1], unfinished / "tprl_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        text = (HERE / name).read_text(encoding="utf-8")
        if name == "app.py" and model is not None:
            text = re.sub(r"^MODEL = None", lambda _: f"MODEL = {model!r}", text, count=1, flags=re.M)
        (unfinished / name).write_text(text, encoding="utf-8")
    unfinished.rename(target)
    return [target / name for name in FILES]
