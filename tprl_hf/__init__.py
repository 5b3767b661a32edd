"""Prune the visual tokens of any LVLM by a learned policy.

`import tprl_hf` imports neither torch nor transformers: names are loaded when they are first used, and our classes
join transformers' Auto classes as soon as those are loaded.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .auto_registration import register_auto_classes

if TYPE_CHECKING:
    from tprl_hf.modeling.checkpoint_tprl import TPRLPreTrainedModel
    from tprl_hf.modeling.configuration_tprl import TPRLConfig
    from tprl_hf.modeling.escalation import Escalation
    from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
    from tprl_hf.modeling.pruning_policy import PruningPolicy
    from tprl_hf.modeling.token_autoencoder import TokenAutoencoder
    from tprl_hf.modeling.token_pruner import LearnedPruner, TokenPruner

__version__ = "0.1.0"

_MODULE_OF = {
    "TPRLConfig": "tprl_hf.modeling.configuration_tprl",
    "TPRLPreTrainedModel": "tprl_hf.modeling.checkpoint_tprl",
    "TPRLForConditionalGeneration": "tprl_hf.modeling.modeling_tprl",
    "Escalation": "tprl_hf.modeling.escalation",
    "TokenAutoencoder": "tprl_hf.modeling.token_autoencoder",
    "PruningPolicy": "tprl_hf.modeling.pruning_policy",
    "TokenPruner": "tprl_hf.modeling.token_pruner",
    "LearnedPruner": "tprl_hf.modeling.token_pruner",
}

__all__ = [
    "TPRLConfig",
    "TPRLPreTrainedModel",
    "TPRLForConditionalGeneration",
    "Escalation",
    "TokenAutoencoder",
    "PruningPolicy",
    "TokenPruner",
    "LearnedPruner",
    "embedded_checkpoint",
    "__version__",
]


def embedded_checkpoint(name: str = "mosaic") -> str:
    """
    The directory of a small trained model of this package. `from_pretrained` of the Auto classes and of
    `AutoProcessor` take it like any other path.

    Args:
        name (`"mosaic"` or `"photo"`, *optional*, defaults to `"mosaic"`):
            Mosaic-LLaVA, 3.4 million parameters on drawn shapes, is part of the package. Photo-LLaVA, 152 million on
            photographs, is joined on the first call from parts that are fetched (280 MB, see docs/photo.md); it needs
            `pip install tprl_hf[photo]`. Its policy, 2 MB, is part of the package too.

    Returns:
        `str`: The directory.

    Raises:
        `ValueError`: For another name.
        `FileNotFoundError`: If the installed package came without it.
        `tprl_hf.test_bed.photo_parts.PartMissingError`: If a part of Photo-LLaVA cannot be had.

    Example:

    ```python
    >>> from transformers import AutoModelForImageTextToText, AutoProcessor
    >>> import tprl_hf

    >>> model = AutoModelForImageTextToText.from_pretrained(tprl_hf.embedded_checkpoint())
    >>> processor = AutoProcessor.from_pretrained(tprl_hf.embedded_checkpoint())
    ```
    """
    if name not in ("mosaic", "photo"):
        raise ValueError(f"There is no embedded checkpoint {name!r}: pass 'mosaic' or 'photo'.")
    if name == "photo":
        from tprl_hf.test_bed.photo_checkpoint import photo_policy_checkpoint

        return str(photo_policy_checkpoint())
    path = Path(__file__).parent / "checkpoints" / "mosaic-llava"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"The embedded checkpoint is missing: there is no {path / 'config.json'}. "
            "Install the package again, or pass the path of another checkpoint."
        )
    return str(path)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tprl_hf' has no attribute '{name}'")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_auto_classes()
