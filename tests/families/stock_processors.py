"""Processors of popular families as they lie on the Hub: transformers' own classes, a tiny vocabulary, tiny images.

`save(family, directory)` writes the files of a checkpoint without its weights; `AutoProcessor.from_pretrained` reads
them. The settings fit the tiny models of `tests/tiny_models.py`. Writing needs no package that only loading needs.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.families.tiny_models import BOS, EOS, IMAGE, PAD, VIDEO, config_of

START, END, FURTHER = 92, 93, 80
WORDS = "user assistant : ? what where is the a of colour cat dog left right red green blue".split()
SQUARE: dict[str, Any] = {"size": {"height": 24, "width": 24}}
CROPPED = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
PINPOINTS = {"image_grid_pinpoints": [[24, 48], [48, 24]]}


@dataclass
class Stock:
    """
    Args:
        processor: class of the processor.
        image_processor: class of the image processor, as checkpoints name it.
        images: settings of the image processor.
        settings: settings of the processor.
        tokens: special tokens and their ids in the tiny model.
        names: attributes of the tokenizer that name these tokens, where the processor reads such.
        placeholder, video: what the chat template writes for an image, and for a video.
    """

    processor: str
    image_processor: str
    images: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=lambda: {"<image>": IMAGE})
    names: dict[str, str] = field(default_factory=dict)
    placeholder: str = "<image>"
    video: str = "<video>"


def qwen(processor: str) -> Stock:
    tokens = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
    images = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    size = {"size": {"shortest_edge": 256, "longest_edge": 1024}}
    return Stock(
        processor,
        "Qwen2VLImageProcessor",
        images | size,
        tokens=tokens,
        placeholder="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
    )


def idefics(name: str) -> Stock:
    tokens = {"<image>": IMAGE, "<fake_token_around_image>": START, "<global-img>": END, "<end_of_utterance>": FURTHER}
    images = {"size": {"longest_edge": 24}, "max_image_size": {"longest_edge": 24}, "do_image_splitting": False}
    return Stock(f"{name}Processor", f"{name}ImageProcessor", images, {"image_seq_len": 9}, tokens)


LLAVA = {"patch_size": 6, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
STOCK: dict[str, Stock] = {
    "llava": Stock("LlavaProcessor", "CLIPImageProcessor", CROPPED, LLAVA),
    "llava_next": Stock("LlavaNextProcessor", "LlavaNextImageProcessor", CROPPED | PINPOINTS, LLAVA),
    "llava_onevision": Stock(
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessor",
        SQUARE | PINPOINTS,
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_1"},
        {"<image>": IMAGE, "<video>": VIDEO},
    ),
    "qwen2_vl": qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": qwen("Qwen3VLProcessor"),
    "internvl": Stock(
        "InternVLProcessor",
        "GotOcr2ImageProcessor",
        SQUARE | {"max_patches": 2},
        {"image_seq_length": 9},
        {"<IMG_CONTEXT>": IMAGE, "<video>": VIDEO, "<img>": START, "</img>": END},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        "<IMG_CONTEXT>",
    ),
    "idefics3": idefics("Idefics3"),
    "smolvlm": idefics("SmolVLM"),
    "lfm2_vl": Stock(
        "Lfm2VlProcessor",
        "Lfm2VlImageProcessor",
        {
            **{"encoder_patch_size": 6, "tile_size": 24, "min_image_tokens": 4, "max_image_tokens": 4},
            **{"min_tiles": 2, "max_tiles": 2, "max_pixels_tolerance": 1.0},
        },
        tokens={
            **{"<image>": IMAGE, "<|image_start|>": START, "<|image_end|>": END, "<|img_thumbnail|>": FURTHER},
            **{"<|img_row_1_col_1|>": FURTHER + 1, "<|img_row_1_col_2|>": FURTHER + 2},
            **{"<|img_row_2_col_1|>": FURTHER + 3},
        },
    ),
    "paligemma": Stock("PaliGemmaProcessor", "SiglipImageProcessor", SQUARE | {"image_seq_length": 16}),
    "gemma3": Stock(
        "Gemma3Processor",
        "Gemma3ImageProcessor",
        SQUARE,
        {"image_seq_length": 16},
        {"<image_soft_token>": IMAGE, "<start_of_image>": START, "<end_of_image>": END},
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        "<start_of_image>",
    ),
    "mistral3": Stock(
        "PixtralProcessor",
        "PixtralImageProcessor",
        {"patch_size": 6, "size": {"longest_edge": 48}},
        {"patch_size": 6, "spatial_merge_size": 2},
        {"[IMG]": IMAGE, "[IMG_BREAK]": START, "[IMG_END]": END},
        placeholder="[IMG]",
    ),
    "aya_vision": Stock(
        "AyaVisionProcessor",
        "GotOcr2ImageProcessor",
        SQUARE | {"max_patches": 2},
        {"patch_size": 4, "img_size": 24, "downsample_factor": 2},
        {
            "<|IMG_PATCH|>": IMAGE,
            "<|START_OF_IMG|>": START,
            "<|END_OF_IMG|>": END,
            "<|IMG_LINE_BREAK|>": FURTHER,
            "TILE": FURTHER + 1,
            "TILE_GLOBAL": FURTHER + 2,
            "<image>": FURTHER + 3,
        },
    ),
}


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One word, one token; special tokens have the ids that the tiny model's config gives them."""
    stock = STOCK[family]
    start = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": 3}
    vocabulary = start | {word: 4 + index for index, word in enumerate(WORDS)} | stock.tokens
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=stock.names or list(stock.tokens),
        padding_side="left",
    )


def save(family: str, directory: str | Path) -> None:
    """Writes config, tokenizer, processor and chat template, laid out as on the Hub."""
    stock, path = STOCK[family], Path(directory)
    config_of(family).save_pretrained(path)
    tokenizer(family).save_pretrained(path)
    template = (
        "{% for m in messages %}{{ m['role'] + ' : ' }}"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
        "{{ {'image': '" + stock.placeholder + " ', 'video': '" + stock.video + " '}"
        "[part['type']] if part['type'] in ('image', 'video') else part['text'] }}{% endfor %}{% endif %}"
        "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
    )
    (path / "chat_template.jinja").write_text(template)
    images = {"image_processor_type": stock.image_processor, "processor_class": stock.processor, **stock.images}
    (path / "preprocessor_config.json").write_text(json.dumps(images))
    (path / "processor_config.json").write_text(json.dumps({"processor_class": stock.processor, **stock.settings}))
