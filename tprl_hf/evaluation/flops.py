"""What a prompt costs, counted from a model's shape: floating point operations and KV cache, by four conventions.

Published numbers differ by more than a factor of two because they count different things:

- "paper": `2 * P * (N + L)` with P parameters of the LLM, N visual and L text tokens (the TPRL paper's Table 4);
- "visual-macs": multiply-accumulates of the LLM's layers on the visual tokens alone, `4nd^2 + 2n^2d + 3ndm` a layer
  (PyramidDrop, VisPruner, CDPruner);
- "two-matrix-macs": the same with `2ndm` and n all tokens (FastV, DivPrune);
- "measured": what a counter sees, twice the multiply-accumulates, of vision tower, projector, pruner, prefill and
  decoding; grouped keys and values and the output layer as they are, attention over the full square.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONVENTIONS = ("paper", "visual-macs", "two-matrix-macs", "measured")


@dataclass(frozen=True)
class LLMShape:
    """
    Sizes of a decoder.

    Args:
        width, intermediate, num_layers (`int`): d, m and the number of layers.
        num_heads, num_kv_heads, head_dim (`int`): of its attention.
        vocab_size (`int`): rows of the output layer.
        tied (`bool`, *optional*, defaults to `False`): whether the output layer is the input embedding.
    """

    width: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False

    @property
    def layer_weights(self) -> int:
        """Entries of the weight matrices of one layer, with a gated MLP."""
        attention = 2 * self.width * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.width * self.intermediate

    @property
    def num_parameters(self) -> int:
        """P of the "paper" convention, without norms and biases."""
        return self.num_layers * self.layer_weights + (2 - self.tied) * self.vocab_size * self.width

    def kv_bytes(self, num_tokens: int, bytes_per_value: int = 2) -> int:
        """Size of the KV cache of so many tokens; two bytes a value is float16 or bfloat16."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * num_tokens * bytes_per_value

    def prefill(self, num_tokens: int) -> int:
        """Operations until the first new token, of which alone logits are computed."""
        attention = 4 * num_tokens**2 * self.num_heads * self.head_dim
        layers = self.num_layers * (2 * num_tokens * self.layer_weights + attention)
        return layers + 2 * self.width * self.vocab_size

    def early_attention(self, num_tokens: int, layer: int = 2) -> int:
        """Operations until the attention of a layer, counted from 1, is there: what FastV and SparseVLM pay."""
        projections = 2 * self.width * self.head_dim * (self.num_heads + self.num_kv_heads)
        attention = 4 * num_tokens**2 * self.num_heads * self.head_dim
        whole = (layer - 1) * (2 * num_tokens * self.layer_weights + attention)
        return whole + 2 * num_tokens * projections + attention

    def decode(self, num_tokens: int, new_tokens: int) -> int:
        """Operations for the new tokens after the first, behind `num_tokens` tokens in the cache."""
        total = 0
        for step in range(1, new_tokens):
            attention = 4 * (num_tokens + step) * self.num_heads * self.head_dim
            total += self.num_layers * (2 * self.layer_weights + attention) + 2 * self.width * self.vocab_size
        return total


@dataclass(frozen=True)
class TowerShape:
    """
    Sizes of a vision tower and its projector, for one image or tile.

    Args:
        width, intermediate, num_layers (`int`): of the tower.
        num_patches (`int`): patches it sees.
        patch_values (`int`): numbers in one patch.
        num_tokens (`int`): visual tokens that the LLM gets of them.
        projector (`tuple`): input and output width of each linear layer that runs on these tokens.
        num_special (`int`, *optional*, defaults to 0): tokens besides the patches, such as [CLS].
        mlp_matrices (`int`, *optional*, defaults to 2): 3 for a gated MLP.
        num_windowed (`int`, *optional*, defaults to 0): layers that attend within windows.
        window (`int`, *optional*, defaults to 0): patches in a window.
    """

    width: int
    intermediate: int
    num_layers: int
    num_patches: int
    patch_values: int
    num_tokens: int
    projector: tuple[tuple[int, int], ...]
    num_special: int = 0
    mlp_matrices: int = 2
    num_windowed: int = 0
    window: int = 0

    def flops(self) -> int:
        """Operations of tower and projector, all layers of the tower included."""
        length = self.num_patches + self.num_special
        weights = 4 * self.width**2 + self.mlp_matrices * self.width * self.intermediate
        seen = (self.num_layers - self.num_windowed) * length + self.num_windowed * min(self.window, length)
        total = 2 * self.num_patches * self.patch_values * self.width
        total += self.num_layers * 2 * length * weights + 4 * length * seen * self.width
        return total + sum(2 * self.num_tokens * inner * outer for inner, outer in self.projector)


@dataclass(frozen=True)
class PolicyShape:
    """
    Sizes of the TPRL policy and its encoder, as in [`TPRLConfig`].

    Args:
        token_dim, autoencoder_dim, latent_dim (`int`): D, the middle width, and Z.
        policy_dim, num_layers (`int`): width inside the heads' MLPs, and attention layers.
        num_steps (`int`, *optional*, defaults to 1): steps at inference.
        word_shares (`int`, *optional*, defaults to 0): means over the words of a question, of a policy that reads how
            near tokens and words are.
    """

    token_dim: int
    autoencoder_dim: int
    latent_dim: int
    policy_dim: int = 512
    num_layers: int = 1
    num_steps: int = 1
    word_shares: int = 0

    def flops(self, num_visual: int, query_length: int) -> int:
        """Operations of choosing among so many visual tokens for a question of so many."""
        codes = 2 * num_visual * self.autoencoder_dim * (self.token_dim + self.latent_dim)
        length = num_visual + query_length
        mlp = 4 * self.latent_dim * self.policy_dim
        step = 2 * query_length * self.token_dim * self.latent_dim
        step += self.num_layers * (8 * length * self.latent_dim**2 + 4 * length**2 * self.latent_dim)
        step += (self.num_layers - 1) * length * mlp
        step += num_visual * (mlp + 2 * self.latent_dim)
        if self.word_shares:
            codes += 2 * num_visual * query_length * self.token_dim  # cosines, once
            step += 2 * query_length * self.word_shares * (self.token_dim + num_visual)
            step += 2 * num_visual * self.latent_dim * (self.word_shares + 1 + self.latent_dim)
        return codes + self.num_steps * step


@dataclass(frozen=True)
class ModelShape:
    """
    An LVLM with its policy.

    Args:
        tower ([`TowerShape`]), llm ([`LLMShape`]), policy ([`PolicyShape`]): its parts.
        num_tiles (`int`, *optional*, defaults to 1): how often the tower runs for one prompt.
    """

    tower: TowerShape
    llm: LLMShape
    policy: PolicyShape
    num_tiles: int = 1

    @property
    def num_visual(self) -> int:
        return self.num_tiles * self.tower.num_tokens


@dataclass(frozen=True)
class Cost:
    """
    Operations of one prompt by the "measured" convention.

    Args:
        vision, pruner, prefill, decode (`int`): its parts; the pruner is the TPRL policy.
        early_layers (`int`): what a pruner that reads the LLM's attention in layer 2 costs in the policy's place.
        kv_bytes, visual_kv_bytes (`int`): KV cache after the prompt in two-byte values, of all and of visual tokens.
    """

    vision: int
    pruner: int
    early_layers: int
    prefill: int
    decode: int
    kv_bytes: int
    visual_kv_bytes: int

    @property
    def total(self) -> int:
        return self.vision + self.pruner + self.prefill + self.decode


def cost_of(shape: ModelShape, num_kept: int, text_tokens: int, new_tokens: int = 1) -> Cost:
    """
    The cost of a prompt of which `num_kept` visual tokens reach the LLM.

    Args:
        shape ([`ModelShape`]): the model.
        num_kept (`int`): visual tokens kept; all of them is unpruned, and costs no pruner.
        text_tokens (`int`): all other tokens of the prompt; pruners are counted as if all were the question.
        new_tokens (`int`, *optional*, defaults to 1): answer tokens; the first one comes out of the prefill.

    Raises:
        `ValueError`: if more tokens are kept than there are.
    """
    if not 0 <= num_kept <= shape.num_visual:
        raise ValueError(f"Cannot keep {num_kept} of {shape.num_visual} visual tokens.")
    length = num_kept + text_tokens
    prunes = num_kept < shape.num_visual
    return Cost(
        vision=shape.num_tiles * shape.tower.flops(),
        pruner=shape.policy.flops(shape.num_visual, text_tokens) if prunes else 0,
        early_layers=shape.llm.early_attention(shape.num_visual + text_tokens) if prunes else 0,
        prefill=shape.llm.prefill(length),
        decode=shape.llm.decode(length, new_tokens),
        kv_bytes=shape.llm.kv_bytes(length),
        visual_kv_bytes=shape.llm.kv_bytes(num_kept),
    )


def flops_by_convention(shape: ModelShape, num_kept: int, text_tokens: int, new_tokens: int = 1) -> dict[str, int]:
    """
    The cost of the same prompt as each of `CONVENTIONS` counts it.

    Example:

    ```python
    >>> from tprl_hf.evaluation.presets import preset_shape

    >>> found = flops_by_convention(preset_shape("llava-1.5-7b"), num_kept=192, text_tokens=133)
    >>> round(found["paper"] / 1e12, 1), round(found["visual-macs"] / 1e12, 3)
    (4.4, 1.253)
    ```
    """
    llm, length = shape.llm, num_kept + text_tokens
    return {
        "paper": 2 * llm.num_parameters * length,
        "visual-macs": llm.num_layers * layer_macs(num_kept, llm.width, llm.intermediate, 3),
        "two-matrix-macs": llm.num_layers * layer_macs(length, llm.width, llm.intermediate, 2),
        "measured": cost_of(shape, num_kept, text_tokens, new_tokens).total,
    }


def layer_macs(length: int, width: int, intermediate: int, mlp_matrices: int) -> int:
    """`4nd^2 + 2n^2d + knm`-style multiply-accumulates of a layer, with as many key heads as query heads."""
    return 4 * length * width**2 + 2 * length**2 * width + mlp_matrices * length * width * intermediate


# ---- from transformers' configs ----


def llm_shape(config: Any) -> LLMShape:
    """Sizes of the decoder of an LVLM's config."""
    text: Mapping[str, Any] = config.get_text_config().to_dict()
    return LLMShape(
        width=text["hidden_size"],
        intermediate=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        vocab_size=text["vocab_size"],
        tied=bool(config.to_dict().get("tie_word_embeddings")),
    )


def tower_shape(config: Any, image_size: int = 672) -> TowerShape:
    """
    Sizes of the vision tower and projector of an LVLM's config.

    Args:
        config (`PreTrainedConfig`): of a LLaVA, LLaVA-NeXT, PaliGemma, Gemma 3, InternVL, Idefics3, SmolVLM, Qwen2-VL,
            Qwen2.5-VL or Qwen3-VL.
        image_size (`int`, *optional*, defaults to 672): side of the square image, for towers that take any size.

    Raises:
        `ValueError`: for another family.
    """
    vision: Mapping[str, Any] = config.vision_config.to_dict()
    out = config.get_text_config().hidden_size
    family = config.model_type
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        return _qwen_tower(vision, image_size, family, out)
    width, patch = vision["hidden_size"], _side(vision["patch_size"])
    patches = (_side(vision["image_size"]) // patch) ** 2
    # tokens that one token is made of, in the families that join neighbours
    joined = config.to_dict().get("scale_factor", 1) ** 2
    projectors: dict[str, tuple[int, tuple[tuple[int, int], ...]]] = {
        "llava": (patches, ((width, out), (out, out))),
        "llava_next": (patches, ((width, out), (out, out))),
        "paligemma": (patches, ((width, out),)),
        "gemma3": (config.to_dict().get("mm_tokens_per_image", 0), ((width, out),)),
        "idefics3": (patches // joined, ((joined * width, out),)),
        "smolvlm": (patches // joined, ((joined * width, out),)),
        "internvl": (patches // 4, ((4 * width, out), (out, out))),
    }
    if family not in projectors:
        raise ValueError(
            f"The cost of {family!r} is not counted from its config; those of {', '.join(projectors)}, qwen2_vl, "
            "qwen2_5_vl and qwen3_vl are."
        )
    tokens, projector = projectors[family]
    return TowerShape(
        width=width,
        intermediate=vision["intermediate_size"],
        num_layers=vision["num_hidden_layers"],
        num_patches=patches,
        patch_values=vision["num_channels"] * patch**2,
        num_tokens=tokens,
        projector=projector,
        num_special=int(vision["model_type"] in ("clip_vision_model", "internvl_vision")),
    )


def _qwen_tower(vision: Mapping[str, Any], image_size: int, family: str, out: int) -> TowerShape:
    gated = family == "qwen2_5_vl"
    width = vision["embed_dim"] if family == "qwen2_vl" else vision["hidden_size"]
    merge = vision["spatial_merge_size"]
    cell = vision["patch_size"] * merge
    tokens = (image_size // cell) ** 2
    channels = vision.get("in_channels", 3)
    merger = ((merge**2 * width, merge**2 * width), (merge**2 * width, out))
    return TowerShape(
        width=width,
        intermediate=int(width * vision["mlp_ratio"]) if family == "qwen2_vl" else vision["intermediate_size"],
        num_layers=vision["depth"],
        num_patches=tokens * merge**2,
        patch_values=channels * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
        num_tokens=tokens,
        # Qwen3-VL hands rows of some layers on to the LLM's, each through a merger of its own
        projector=merger * (1 + len(vision.get("deepstack_visual_indexes", ()))),
        mlp_matrices=3 if gated else 2,
        num_windowed=vision["depth"] - len(vision["fullatt_block_indexes"]) if gated else 0,
        window=(vision["window_size"] // cell) ** 2 * merge**2 if gated else 0,
    )


def _side(size: Any) -> int:
    return size[0] if isinstance(size, list | tuple) else size


def shape_of(config: Any, num_tiles: int = 1, image_size: int = 672) -> ModelShape:
    """
    Sizes of an LVLM and its policy.

    Args:
        config (`PreTrainedConfig`): of an LVLM, which gets the default policy, or a [`TPRLConfig`].
        num_tiles (`int`, *optional*, defaults to 1): tiles of an image, for families that cut it.
        image_size (`int`, *optional*, defaults to 672): see [`tower_shape`].
    """
    from tprl_hf.modeling.configuration_tprl import TPRLConfig
    from tprl_hf.modeling.pruning_policy import NUM_WORD_SHARES

    tprl = config if isinstance(config, TPRLConfig) else TPRLConfig(base_config=config)
    base = tprl.base_config
    assert tprl.token_dim and tprl.autoencoder_dim and tprl.latent_dim
    policy = PolicyShape(
        token_dim=tprl.token_dim,
        autoencoder_dim=tprl.autoencoder_dim,
        latent_dim=tprl.latent_dim,
        policy_dim=tprl.policy_dim,
        num_layers=tprl.policy_num_layers,
        num_steps=tprl.num_steps,
        word_shares=NUM_WORD_SHARES if tprl.policy_similarity else 0,
    )
    return ModelShape(tower_shape(base, image_size), llm_shape(base), policy, num_tiles)
