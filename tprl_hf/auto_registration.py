"""Registers our classes with transformers' Auto classes, without importing transformers' models before the user does.

Registering needs the modules of the Auto classes, and these import torch (two seconds). So, where they are not loaded
yet, a hook of Python's import system waits for them; transformers itself is left as it is.
"""

import importlib.util
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
AUTO_MODEL = "transformers.models.auto.modeling_auto"
AUTO_PROCESSOR = "transformers.models.auto.processing_auto"
WATCHED = ("transformers.", "tprl_hf.modeling")


class _ThisThread(threading.local):
    depth = 0  # modules that are being executed, one inside the other
    is_looking = False


class _AfterImport(MetaPathFinder):
    """
    Registers when the outermost module of transformers, or of our modeling, has been executed. Not before: nothing can
    be imported from a module that is only half executed, and transformers' modules import each other deeply.
    """

    def __init__(self) -> None:
        self.this_thread = _ThisThread()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(WATCHED) or self.this_thread.is_looking:
            return None
        self.this_thread.is_looking = True  # lets the search below pass us by
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.this_thread.is_looking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            self.this_thread.depth += 1
            try:
                execute(module)
                if self.this_thread.depth == 1:
                    self.register()
            finally:
                self.this_thread.depth -= 1

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec

    def register(self) -> None:
        """Registers what can be: each class as soon as the module of its Auto class is loaded."""
        if AUTO_CONFIG in sys.modules:
            from transformers import AutoConfig

            from tprl_hf.modeling.configuration_tprl import TPRLConfig

            AutoConfig.register(TPRLConfig.model_type, TPRLConfig, exist_ok=True)
        if AUTO_MODEL in sys.modules:
            from transformers import (
                AutoModel,
                AutoModelForCausalLM,
                AutoModelForImageTextToText,
                AutoModelForMultimodalLM,
            )

            from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
            from tprl_hf.pruners import DEFAULT_PRUNER, PRUNERS

            TPRLForConditionalGeneration.pruner_classes = PRUNERS
            TPRLForConditionalGeneration.default_pruner = DEFAULT_PRUNER
            # TRL loads by the second what it does not find among transformers' own classes.
            for auto_class in (
                AutoModel,
                AutoModelForCausalLM,
                AutoModelForImageTextToText,
                AutoModelForMultimodalLM,  # that of the pipeline "any-to-any"
            ):
                auto_class.register(TPRLConfig, TPRLForConditionalGeneration, exist_ok=True)
        if AUTO_PROCESSOR in sys.modules:
            from transformers import AutoProcessor

            from tprl_hf.modeling.processing_tprl import TPRLProcessor

            AutoProcessor.register(TPRLConfig, TPRLProcessor, exist_ok=True)
        everything = {AUTO_CONFIG, AUTO_MODEL, AUTO_PROCESSOR} <= sys.modules.keys()
        if everything and self in sys.meta_path:  # two threads may come here
            sys.meta_path.remove(self)


def register_auto_classes() -> None:
    """
    Makes `AutoConfig`, `AutoModel`, `AutoModelForCausalLM`, `AutoModelForImageTextToText` and `AutoProcessor` know
    checkpoints of model type "tprl": at once where transformers' Auto modules are loaded, else as soon as they are.
    """
    finder = _AfterImport()
    sys.meta_path.insert(0, finder)
    finder.register()
