"""Processors of the tiny random LLaVA, built in memory: 24-pixel images, 16 visual tokens; one word, one token."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tests.families.tiny_models import BOS, EOS, IMAGE, PAD, TEXT

# without roles: a prompt is the image and the words
BARE_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endfor %}"
)
CHAT_WORDS = "<pad> <s> </s> <unk> USER ASSISTANT : ? what where is the a of colour cat dog left".split()
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ 'USER : ' if m['role'] == 'user' else 'ASSISTANT : ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT :' }}{% endif %}"
)


def make_processor() -> LlavaProcessor:
    """A vocabulary of `word0`, `word1`, ..., as many as the model has, and a template without roles."""
    words = {f"word{number}": number for number in range(TEXT["vocab_size"])}
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": 3, "<image>": IMAGE}
    vocabulary = {word: number for word, number in words.items() if number not in special.values()} | special
    return _processor(vocabulary, BARE_TEMPLATE)


def make_chat_processor() -> LlavaProcessor:
    """A few English words, and a template with roles."""
    vocabulary = {word: index for index, word in enumerate(CHAT_WORDS)} | {"<image>": IMAGE}
    return _processor(vocabulary, CHAT_TEMPLATE, padding_side="left")


def _processor(vocabulary: dict[str, int], template: str, **settings: str) -> LlavaProcessor:
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=words,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            additional_special_tokens=["<image>"],
            **settings,
        ),
        patch_size=6,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
