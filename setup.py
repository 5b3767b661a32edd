"""Package metadata of tprl_hf; the tested pins are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def found(pattern: str, file: str) -> str:
    return re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.M)[1]


def readme_for_an_index() -> str:
    """README without its links into the checkout, which lead nowhere elsewhere: the text stays, and says the path."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[([^]]*)\]\((?!https?:)([^)]+)\)", r"Picture `\2`: \1.", text)

    def plain(link: re.Match) -> str:
        path = link[2].split("#")[0]
        return link[1] if path in link[1] else f"{link[1]} (`{path}`)"

    text = re.sub(r"\[([^]]*)\]\((?!https?:)([^)]+)\)", plain, text)
    return text.replace("\n\n", "\n\n*Paths such as `docs/training.md` are those of the source distribution.*\n\n", 1)


# With these floors `python3 dev.py test-floors` passes. transformers takes `mm_encoder_outputs` since 5.18, but there
# beam search answers wrongly, and until 5.20 SmolVLM behind a cache fails. It needs safetensors 0.8, trl 1.16 needs
# accelerate 1.10.1, and pillow 10.1 is the first whose own font has sizes.
INSTALL = [
    "accelerate>=1.10.1",
    "datasets>=4.7",
    "huggingface_hub>=1.31,<3",
    "jinja2>=3.1",
    "numpy>=2.0",
    "pillow>=10.1",
    "safetensors>=0.8",
    "torch>=2.6",
    "transformers>=5.21,<6",
]
EXTRAS = {
    "train": ["easy-vqa>=1.0", "peft>=0.21", "trl>=1.16,<2"],
    "eval": ["easy-vqa>=1.0", "evaluate>=0.4.6", "matplotlib>=3.9"],
    # What processors of single families ask for (docs/families.md). torchvision must be of the same build as torch.
    "processors": [
        "num2words>=0.5.14",
        "opencv-python-headless>=4.10",
        "protobuf>=5.0",
        "scipy>=1.13",
        "sentencepiece>=0.2",
        "tiktoken>=0.8",
        "timm>=1.0.23",
        "torchvision>=0.21",
    ],
    # These bring other versions of torchvision and pillow: give each a virtual environment of its own. The first
    # gradio that takes huggingface_hub 2 is 6.29; it wants pillow below 13.
    "lmms": ["filelock<4", "lmms-eval>=0.7.3"],  # lmms-eval 0.7.3 reads a private module of filelock 3
    "demo": ["gradio>=6.29,<7"],
    "completion": ["shtab>=1.7"],
    "docs": ["pdoc>=15.0"],
    # What reads the parts of Photo-LLaVA (docs/photo.md); the parts themselves are fetched without what they ask for.
    "photo": ["gguf>=0.10", "onnx>=1.17"],
    "quantized": ["bitsandbytes>=0.46.1"],
    "serve": ["aiohttp>=3.12", "prometheus_client>=0.21", "transformers[serving]>=5.21,<6", "uvicorn>=0.34"],
}
EXTRAS["dev"] = [
    *EXTRAS["train"],
    *EXTRAS["eval"],
    *EXTRAS["quantized"],
    *EXTRAS["completion"],
    *EXTRAS["docs"],
    *EXTRAS["serve"],
    "bandit>=1.9.1",
    "build>=1.5",
    "hypothesis>=6.150",
    "mypy>=2.0",
    "pytest>=9.0",
    "pytest-cov>=7.0",
    "pytest-xdist>=3.8",
    "readme_renderer[md]>=46",
    "ruff>=0.17",
    "setuptools>=77.0.3",
    "twine>=7.0",
]

setup(
    name="tprl_hf",
    version=found(r'^__version__ = "([^"]+)"$', "tprl_hf/__init__.py"),
    description="Prune the visual tokens of any Hugging Face vision-language model with a learned policy",
    long_description=readme_for_an_index(),
    long_description_content_type="text/markdown",
    author=found(r"^  - name: (.+)$", "CITATION.cff"),
    license_expression="Apache-2.0",
    project_urls={"Paper": found(r"^  url: (\S+)$", "CITATION.cff")},
    keywords="vision-language-models token-pruning reinforcement-learning transformers lvlm",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["tprl_hf", "tprl_hf.*"]),
    package_data={
        "tprl_hf": [
            "py.typed",
            "app/space/README.md",
            "app/space/requirements.txt",
            "checkpoints/**",
            "model_cards/**",
            "recipes/**",
        ]
    },
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["tprl = tprl_hf.cli.main:main"],
        "lmms_eval.models": ["tprl = tprl_hf.evaluation.lmms_eval.plugin:manifest"],
        "vllm.general_plugins": ["tprl = tprl_hf.serving.vllm_plugin:register"],
    },
    zip_safe=False,
)
