from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tests.tiny_models import BOS, EOS, IMAGE, PAD, TEXT, build

CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endfor %}"
)


def make_processor() -> LlavaProcessor:
    """The processor of the tiny random LLaVA: 24-pixel images, 16 visual tokens, a vocabulary of words."""
    words = {f"word{number}": number for number in range(TEXT["vocab_size"])}
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": 3, "<image>": IMAGE}
    vocabulary = {word: number for word, number in words.items() if number not in special.values()} | special
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            additional_special_tokens=["<image>"],
        ),
        patch_size=6,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def base_checkpoint(tmp_path_factory) -> Path:
    """A tiny random LLaVA with its processor, as a directory."""
    path = tmp_path_factory.mktemp("base")
    build("llava").save_pretrained(path)
    make_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def image_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)
    return path
