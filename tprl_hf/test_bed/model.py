"""The small LLaVA of the embedded checkpoint, untrained: its tokenizer, processor, architecture and start.

Everything is a stock transformers class; only the start of some weights is our own. A tower of four layers learns what
lies in a patch far sooner when its attention starts out as a convolution: the position embeddings begin as sines and
cosines, and each head but the last begins by looking at one fixed neighbour. In the LLM a few heads begin by looking
at the text alone: with the usual start the ten tokens of a question drown among 144 image tokens, and the
model is slow to find out that "red" belongs to "circle".
"""

from __future__ import annotations

import math

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tprl_hf.data.easy import EASY_VQA_COLORS, EASY_VQA_SHAPES
from tprl_hf.data.mosaic import COLORS, IMAGE_SIZE, SHAPES, SIGNS

PATCH_SIZE = 12
PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE
NUM_PATCHES = PATCHES_PER_SIDE**2
POSITION_DIMS = 32

SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "<user>", "<assistant>")
_TEMPLATE_WORDS = (
    "? . , is are there a an the what which how many color shape number on in of object objects sign image does do "
    "contain present not left right above below yes no"
).split()

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}<s>{% endif %}"
    "{% if message['role'] == 'user' %}<user>{% else %}<assistant>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] != 'user' %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer that knows the words of Mosaic-VQA and easy-VQA, plural endings, and digits one by one."""
    words = [*_TEMPLATE_WORDS, *SHAPES, *COLORS, *SIGNS, *EASY_VQA_SHAPES, *EASY_VQA_COLORS, *"0123456789"]
    pieces = ["##s", "##es", *(f"##{digit}" for digit in "0123456789")]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL_TOKENS, *words, *pieces]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
        padding_side="left",
        model_max_length=1024,
    )


def build_processor() -> LlavaProcessor:
    """Images are scaled to 144 pixels and to [-1, 1]; `<image>` in a prompt becomes 144 placeholders."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def build_lvlm(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """The untrained model: 3.4 million parameters, float32, the tower started as a convolution."""
    vision_config = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=192,
        hidden_act="gelu",
    )
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=1024,
        initializer_range=0.07,  # 1 / sqrt(width)
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=NUM_PATCHES,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    start_tower_as_convolution(model.model.vision_tower)
    start_llm_with_text_heads(model)
    return model


@torch.no_grad()
def start_tower_as_convolution(tower: CLIPVisionModel) -> None:
    """Let five heads of each layer begin by looking at the patch itself or its left, right, upper, lower neighbour.

    The first 32 dimensions carry `cos(w k x), sin(w k x)` and the same of `y`, with `w = 2 pi / 24` and k = 1 to 8.
    The query weights turn them by the neighbour's offset, so that a query agrees best with that neighbour's key.
    """
    frequencies = 2 * math.pi / 24 * torch.arange(1, 9)
    ticks = torch.arange(PATCHES_PER_SIDE)[:, None] * frequencies
    wave = torch.cat([ticks.cos(), ticks.sin()], dim=-1)  # [12, 16]
    columns, rows = wave.repeat(PATCHES_PER_SIDE, 1), wave.repeat_interleave(PATCHES_PER_SIDE, dim=0)
    positions = torch.cat([columns, rows], dim=-1)  # [144, 32]

    embeddings = tower.embeddings
    embeddings.position_embedding.weight.mul_(0.1)
    embeddings.position_embedding.weight[1:, :POSITION_DIMS] = positions
    embeddings.position_embedding.weight[0, :POSITION_DIMS] = 0
    embeddings.patch_embedding.weight.normal_(std=1 / math.sqrt(3 * PATCH_SIZE**2))
    embeddings.patch_embedding.weight[:POSITION_DIMS] = 0

    offsets = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))  # row, column
    sharpness = 0.35
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        head_dim = attention.head_dim
        for head, (row, column) in enumerate(offsets):
            rows_of_head = slice(head * head_dim, (head + 1) * head_dim)
            attention.q_proj.weight[rows_of_head].normal_(std=0.01)
            attention.k_proj.weight[rows_of_head].normal_(std=0.01)
            turn = torch.zeros(POSITION_DIMS, POSITION_DIMS)
            for start, offset in ((0, column), (16, row)):
                cos, sin = (offset * frequencies).cos(), (offset * frequencies).sin()
                i = torch.arange(8) + start
                turn[i, i], turn[i, i + 8] = cos, -sin
                turn[i + 8, i], turn[i + 8, i + 8] = sin, cos
            scale = math.sqrt(sharpness * math.sqrt(head_dim))
            attention.q_proj.weight[rows_of_head, :POSITION_DIMS] += scale * turn[:head_dim]
            attention.k_proj.weight[rows_of_head, :POSITION_DIMS] += scale * torch.eye(POSITION_DIMS)[:head_dim]
        # What a layer writes leaves the positions alone, for the next layer to read.
        attention.v_proj.weight.normal_(std=1 / math.sqrt(attention.embed_dim))
        attention.out_proj.weight.normal_(std=0.5 / math.sqrt(attention.embed_dim))
        attention.out_proj.weight[:POSITION_DIMS] = 0
        layer.mlp.fc1.weight.normal_(std=1 / math.sqrt(attention.embed_dim))
        layer.mlp.fc2.weight.normal_(std=0.5 / math.sqrt(layer.mlp.fc2.in_features))
        layer.mlp.fc2.weight[:POSITION_DIMS] = 0


# Head of each LLM layer -> how far back it begins by looking; `None` for all of the text alike. "Is the red star left
# of the blue ring?" has its nouns five tokens apart (four with "above"), the second one two before the answer. The
# grounding loss has heads 0 and 1 of the second and third layers.
TEXT_HEADS: tuple[dict[int, int | None], ...] = (
    {0: 1, 1: 2, 2: 3, 3: None},
    {4: 1, 5: None},
    {2: 4, 3: 5, 4: 1, 5: None},
    {4: 2, 5: None},
)
TEXT_FLAG = 1.0


@torch.no_grad()
def start_llm_with_text_heads(model: LlavaForConditionalGeneration) -> None:
    """Let some heads of the LLM begin by looking at the preceding tokens, or at all of the text and not at the image.

    Dimension 0 of the embeddings flags text (image tokens have 0 there). Queries and keys of such a head read the flag
    only, so that their rotary embeddings alone decide: `sum_i cos(theta_i (distance - offset))` is largest at the
    offset when it runs over the three fastest rotations; over the slowest one it is the same for every distance.
    """
    embeddings = model.get_input_embeddings().weight
    embeddings.normal_(std=0.2)
    embeddings[:, 0] = TEXT_FLAG
    model.model.multi_modal_projector.linear_2.weight[0] = 0
    model.model.multi_modal_projector.linear_2.bias[0] = 0
    llm = model.model.language_model
    llm.norm.weight.fill_(0.35)  # the output embeddings are the input embeddings, and logits should start small
    for depth, (layer, text_heads) in enumerate(zip(llm.layers, TEXT_HEADS, strict=True)):
        attention = layer.self_attn
        # Layers write little at first, so that a token's own embedding is still there for the last one.
        attention.o_proj.weight.normal_(std=0.02)
        layer.mlp.down_proj.weight.normal_(std=0.02)
        half = attention.head_dim // 2
        theta = llm.config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
        for head, offset in text_heads.items():
            rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            attention.q_proj.weight[rows].normal_(std=0.01)
            attention.k_proj.weight[rows].normal_(std=0.01)
            fast = torch.arange(half) < 3 if offset is not None else torch.arange(half) == half - 1
            scale = (1.6 + 0.7 * depth) * fast.float()  # the flag fades as the layers write beside it
            turn = (offset or 0) * theta  # turning the query back by the offset
            attention.q_proj.weight[rows, 0] = torch.cat([scale * turn.cos(), -scale * turn.sin()])
            attention.k_proj.weight[rows, 0] = torch.cat([scale, torch.zeros(half)])
        # What a layer writes leaves the flag alone, for the next layer to read.
        attention.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
