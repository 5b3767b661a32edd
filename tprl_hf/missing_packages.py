"""Processors, and one clear line where packages that they need are missing. Imports torch only when called."""

import importlib.util
import os
import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

# Modules of the extra `processors` by what pip calls them; docs/families.md says which family needs what.
PACKAGES = {
    "cv2": "opencv-python-headless",
    "num2words": "num2words",
    "scipy": "scipy",
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
    "timm": "timm",
    "torchvision": "torchvision",
}
INSTALL = "pip install 'tprl_hf[processors]', with torchvision from the same index as torch (docs/families.md)"


def load_processor(path: str | os.PathLike) -> Any:
    """
    The processor of a checkpoint.

    Args:
        path (`str` or `os.PathLike`):
            A checkpoint of any kind; a directory or a name on the Hub.

    Returns:
        [`ProcessorMixin`]: An instance of the class that the checkpoint names.

    Raises:
        `ValueError`: If packages that it needs are missing, which transformers tells by many kinds of errors.
        `OSError`: If there is no such checkpoint.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(path)
    except (ImportError, TypeError, ValueError) as error:
        text = str(error).replace(str(path), "")
        asks_for_a_package = "install" in text and bool(missing(text))
        if is_ours(error) or (isinstance(error, ValueError) and not asks_for_a_package):
            raise
        raise ValueError(f"The processor of {path} cannot be loaded: {explain(error)}") from error


def is_ours(error: BaseException) -> bool:
    """Whether it is a bug of this package: raised by our code, or for a module of ours that cannot be imported."""
    if isinstance(error, ImportError):
        return (error.name or "").split(".")[0] == __package__
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals["__name__"].split(".")[0] == __package__


def missing(text: str) -> list[str]:
    """What pip calls the packages of the extra `processors` that a text names and that are not installed."""
    names = text.lower()
    return [PACKAGES[module] for module in PACKAGES if module in names and not importlib.util.find_spec(module)]


def explain(error: BaseException) -> str:
    """
    Args:
        error (`BaseException`):
            What transformers raised where a package is missing or does not go with torch.

    Returns:
        `str`: What to install, in one line.
    """
    if mismatch := of_another_build(error):
        return mismatch
    if f"pip install '{__package__}[" in str(error):
        return said(error) + "."
    if names := missing(str(error)):
        return f"{', '.join(names)} missing ({said(error)}): {INSTALL}."
    if isinstance(error, TypeError):  # of a part that is `None`, for want of a package or of a file
        absent = ", ".join(missing(" ".join(PACKAGES)))
        install = f"Not installed: {absent}; {INSTALL}. " if absent else ""
        return f"{said(error)}. {install}The checkpoint may also lack a file."
    if isinstance(error, ImportError) and (extra := extra_of((error.name or "").split(".")[0])):
        return f"{said(error)}: pip install 'tprl_hf[{extra}]'."
    return f"{said(error)}. Install what is missing or too old."


def extra_of(module: str) -> str | None:
    """The first extra of ours that brings a module; `None` where none does."""
    try:
        wanted = requires("tprl_hf") or []
    except PackageNotFoundError:  # a checkout that is not installed
        return None
    name = re.escape(module.replace("_", "-"))
    found = (re.match(rf"{name}(?![\w-]).*extra == ['\"](\w+)['\"]", line.replace("_", "-")) for line in wanted)
    return next((match[1] for match in found if match), None)


def require(*modules: str) -> None:
    """
    Asks for packages before long work begins.

    Raises:
        `ModuleNotFoundError`: For the first module that is not installed; it says which extra brings it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            extra = extra_of(module)
            brought = f": pip install 'tprl_hf[{extra}]'" if extra else ""
            raise ModuleNotFoundError(f"No module named {module!r}{brought}.", name=module)


def of_another_build(error: BaseException) -> str | None:
    """What to do where torchvision is of another build than torch, so that its operators are not there."""
    cause: BaseException | None = error
    while cause is not None and "operator torchvision::" not in str(cause):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    import torch

    return (
        f"torchvision {version('torchvision')} does not go with torch {torch.__version__} ({said(cause)}): "
        "install both from the same index (docs/families.md), or pip uninstall torchvision."
    )


def said(error: BaseException) -> str:
    """The first sentence of its message, without the point."""
    text = " ".join(str(error).split())
    return text.split(". ")[0].rstrip(".") or type(error).__name__
