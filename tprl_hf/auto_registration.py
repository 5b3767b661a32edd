"""Registers our classes with transformers' Auto classes, without importing transformers' models before the user does.

Registering needs the module of the Auto class, and that imports torch (two seconds). So, where it is not loaded yet, a
hook of Python's import system waits for it; transformers itself is left as it is.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
AUTO_MODEL = "transformers.models.auto.modeling_auto"
OUR_CONFIG = "tprl_hf.modeling.configuration_tprl"
OUR_MODEL = "tprl_hf.modeling.modeling_tprl"


class _AfterImport(MetaPathFinder):
    """Calls `_register` each time one of the four modules has been executed."""

    def __init__(self) -> None:
        self.looking_for: set[str] = set()
        self.executing: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (AUTO_CONFIG, AUTO_MODEL, OUR_CONFIG, OUR_MODEL) or fullname in self.looking_for:
            return None
        self.looking_for.add(fullname)  # lets the search below pass us by
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking_for.discard(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            self.executing.add(fullname)
            try:
                execute(module)
            finally:
                self.executing.discard(fullname)
            self.register()

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec

    def is_ready(self, *modules: str) -> bool:
        return all(name in sys.modules and name not in self.executing for name in modules)

    def register(self) -> None:
        # A module of ours that is still being executed has no class to offer yet: its own end calls this again.
        if self.is_ready(AUTO_CONFIG) and OUR_CONFIG not in self.executing:
            from transformers import AutoConfig

            from tprl_hf.modeling.configuration_tprl import TPRLConfig

            AutoConfig.register(TPRLConfig.model_type, TPRLConfig, exist_ok=True)
        if self.is_ready(AUTO_CONFIG, AUTO_MODEL) and not self.executing & {OUR_CONFIG, OUR_MODEL}:
            from transformers import AutoModel, AutoModelForImageTextToText

            from tprl_hf.modeling.configuration_tprl import TPRLConfig
            from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration

            for auto_class in (AutoModel, AutoModelForImageTextToText):
                auto_class.register(TPRLConfig, TPRLForConditionalGeneration, exist_ok=True)


def register_auto_classes() -> None:
    """
    Makes `AutoConfig`, `AutoModel` and `AutoModelForImageTextToText` know checkpoints of model type "tprl": at once
    where transformers' Auto modules are loaded, otherwise as soon as they are. Processors and tokenizers are those of
    the base model and need no registering.
    """
    finder = _AfterImport()
    sys.meta_path.insert(0, finder)
    finder.register()
