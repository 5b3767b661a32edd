"""The API reference from the docstrings, as static pages: `make api` writes them into build/api."""

import importlib
import sys
from pathlib import Path

import pdoc

# What users import. Rooms whose `__all__` lists the public names show these, wherever they are defined.
MODULES = (
    *("tprl_hf", "tprl_hf.modeling", "tprl_hf.pruners", "tprl_hf.data", "tprl_hf.training", "tprl_hf.hub.publishing"),
    *("tprl_hf.evaluation.compare_pruners", "tprl_hf.answer_rules", "tprl_hf.evaluation.flops"),
    *(
        "tprl_hf.evaluation.benchmark",
        "tprl_hf.evaluation.metrics",
        "tprl_hf.model_cards",
        "tprl_hf.loading",
        "tprl_hf.pictures",
        "tprl_hf.visualization",
    ),
)


def main(output: Path) -> None:
    for name in MODULES:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):  # pdoc does not see names that are loaded when first used
            setattr(module, public, getattr(module, public))
    pdoc.render.configure(docformat="google", footer_text="tprl_hf", search=True)
    pdoc.pdoc(*MODULES, output_directory=output)
    print(f"Written: {output}/index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
