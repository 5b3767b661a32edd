"""The section of docs/families.md on processors: which packages beyond the base installation each family asks for.

    python -m tests.families.processor_needs            prints the section
    python -m tests.families.processor_needs --write    writes it into docs/families.md

Read from the source of transformers, so that the answer does not depend on what is installed here.
`tests/test_processors.py` tries it: with the packages, without them, and with them hidden.
"""

import argparse
import ast
import functools
import inspect
import re
import sys
import textwrap
from pathlib import Path

import transformers
from transformers import AutoConfig
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils.import_utils import define_import_structure

from tprl_hf.missing_packages import PACKAGES
from tprl_hf.modeling.family_adapters import REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
TITLE = "## What your family's processor needs"
SOURCES = Path(transformers.__file__).parent
# What our own installation brings, by the names of modules and of transformers' backends.
BASE = {
    "PIL",
    "accelerate",
    "huggingface_hub",
    "numpy",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "vision",
}
NOTHING = "nothing more"
Needs = frozenset[str]


@functools.cache
def classes() -> dict[str, tuple[str, Needs]]:
    """Every class of transformers' models: the module that defines it, and the backends it is exported with."""
    structure = define_import_structure(str(SOURCES / "models"), prefix="models")
    return {
        name: (module, frozenset(backends))
        for backends, modules in structure.items()
        for module, names in modules.items()
        for name in names
    }


@functools.cache
def source(name: str) -> ast.Module:
    """The module that defines a class, parsed."""
    return ast.parse((SOURCES / classes()[name][0].replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))


def of_class(name: str) -> Needs:
    """Packages that a class asks for by its backends, by what its module imports and by `requires_backends`."""
    found = set(classes()[name][1])
    for node in ast.walk(source(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "requires_backends":
            found |= {leaf.value for leaf in ast.walk(node.args[1]) if isinstance(leaf, ast.Constant)}
    return frozenset(found - BASE - sys.stdlib_module_names)


def parts(processor: str) -> set[str]:
    """What a processor is made of: the arguments of its `__init__`."""
    for node in ast.walk(source(processor)):
        if isinstance(node, ast.ClassDef) and node.name == processor:
            inits = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
            return {argument.arg for argument in inits[0].args.args} if inits else set()
    raise LookupError(f"There is no class {processor} in {classes()[processor][0]}.")


def of_processor(model_type: str) -> Needs | None:
    """
    Packages that the processor of a type needs; `None` where transformers registers none. An image processor counts
    in the form that needs least, as transformers takes the one without torchvision by itself.
    """
    processor = PROCESSOR_MAPPING_NAMES.get(model_type)
    if processor is None:
        return None
    needs, made_of = set(of_class(processor)), parts(processor)
    forms = [name for name in (IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}).values() if name]
    if "image_processor" in made_of and forms:
        needs |= min((of_class(name) for name in forms), key=len)
    if "video_processor" in made_of:  # all are torchvision's
        needs.add("torchvision")
    extractor = FEATURE_EXTRACTOR_MAPPING_NAMES.get(model_type)
    if "feature_extractor" in made_of and extractor:
        needs |= of_class(extractor)
    return frozenset(needs)


def of_model(model_type: str) -> Needs:
    """Packages that the model of a type needs, its towers included."""
    config = AutoConfig.for_model(model_type)
    needs = set(of_class(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]))
    for name in config.sub_configs:
        part = getattr(config, name, None)
        found = MODEL_MAPPING_NAMES.get(part.model_type) if part is not None else None
        if isinstance(found, str):
            needs |= of_class(found)
    return frozenset(needs)


def types() -> list[str]:
    """The types that docs/families.md calls exact or untested."""
    registered = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return [
        name
        for name in sorted(registered)
        if name not in REFUSED
        and "mm_encoder_outputs" in inspect.signature(getattr(transformers, registered[name]).forward).parameters
    ]


def listed(needs: Needs) -> str:
    return ", ".join(f"`{PACKAGES.get(name, name)}`" for name in sorted(needs)) or NOTHING


def wrapped(paragraph: str) -> str:
    """A paragraph or an item of a list, wrapped as the other pages are."""
    indent = "  " if paragraph.startswith("- ") else ""
    return textwrap.fill(paragraph, 125, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def section() -> list[str]:
    """The section as lines of Markdown."""
    rows: dict[tuple[str, str], list[str]] = {}
    for model_type in types():
        processor = of_processor(model_type)
        key = (
            "not registered under this name" if processor is None else listed(processor),
            listed(of_model(model_type)),
        )
        rows.setdefault(key, []).append(model_type)
    base_first = sorted(rows.items(), key=lambda row: (row[0] != (NOTHING, NOTHING), -len(row[1])))
    return [
        TITLE,
        "",
        wrapped(
            "Written by `python -m tests.families.processor_needs --write`, read from the source of transformers "
            f"{transformers.__version__}."
        ),
        "",
        wrapped(
            "The table lists packages beyond the base installation. `pip install 'tprl_hf[processors]'` installs all "
            "of them, and also `sentencepiece` and `tiktoken` for tokenizers that come without a `tokenizer.json`."
        ),
        "",
        "| processor needs | model needs | families |",
        "|---|---|---|",
        *(f"| {processor} | {model} | {', '.join(families)} |" for (processor, model), families in base_first),
        "",
        wrapped(
            "**torchvision must be of the same build as torch**: the same release (torch 2.13 goes with torchvision "
            "0.28) and the same CUDA or CPU variant. pip checks the release only. A torchvision for CUDA together "
            "with a torch for the CPU fails with `operator torchvision::nms does not exist`. transformers can then "
            "import no image processor at all, not even one that does not need torchvision. `tprl` says so in one "
            "line. There are two cures. Install both with the one command that PyTorch's installation page gives for "
            "your machine, before `tprl_hf[processors]`. Or `pip uninstall torchvision`: the families of the first "
            "row then work with Pillow. `timm` installs torchvision too. Where torchvision is installed, image "
            "processors resize with it instead of with Pillow, and pixels differ a little."
        ),
        "",
    ]


def with_section(page: str) -> str:
    """A page with its section replaced."""
    return re.sub(rf"{re.escape(TITLE)}\n.*?(?=^## )", lambda _: "\n".join(section()) + "\n", page, flags=re.M | re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/families.md")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.write:
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n".join(section()))


if __name__ == "__main__":
    main()
