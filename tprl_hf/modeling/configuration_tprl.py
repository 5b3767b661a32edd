"""Configuration of a TPRL model: which LVLM it wraps, how much it keeps by default, and how wide its policy is."""

from typing import Any, ClassVar, Literal

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .values import (
    COUNT,
    KEPT_FRACTION,
    Check,
    check_fields,
    flag,
    list_of,
    number,
    one_of,
    optional,
    refuse_misspelled,
    text,
    whole,
    wrong,
)

KEEP_ALL = "To keep all tokens pass keep_ratio=1.0 or prune=False."
LEAST_LATENT_DIM = 256  # much narrower codes make a policy that hardly reads the question
# What each field may be, but for those that are checked where they are read.
CHECKS: dict[str, Check] = {
    "base_model_name_or_path": optional(text),
    "base_model_revision": optional(text),
    "base_model_relative_path": optional(text),
    "includes_base_model": flag,
    "includes_adapter": flag,
    "keep_ratio": optional(number(above=0, most=1, what="the fraction that is KEPT, in (0, 1]", cure=KEEP_ALL)),
    "num_keep": optional(whole(1, cure="To drop an image pass keep_mask.")),
    "threshold": optional(number()),
    "threshold_keep_ratio": optional(KEPT_FRACTION),
    "min_keep": whole(0),
    "max_keep": optional(COUNT),
    "position_ids": one_of(("original", "contiguous")),
    "query_agnostic": flag,
    "special_token_ids": optional(list_of(whole(0))),
    "question_start_ids": optional(list_of(whole(0))),
    "question_end_ids": optional(list_of(whole(0))),
    "token_dim": optional(COUNT),
    "autoencoder_dim": optional(COUNT),
    "latent_dim": optional(COUNT),
    "policy_dim": COUNT,
    "policy_num_heads": COUNT,
    "policy_num_layers": whole(0),
    "policy_positions": flag,
    "policy_steps": optional(COUNT),
    "policy_budget": flag,
    "policy_input_norm": flag,
    "policy_similarity": flag,
    "num_steps": whole(1, 1000),
}


def given_budget(holder: Any) -> dict[str, float]:
    """Which of `keep_ratio`, `num_keep` and `threshold` the config or budget names."""
    values = {name: getattr(holder, name) for name in ("keep_ratio", "num_keep", "threshold")}
    return {name: value for name, value in values.items() if value is not None}


def refuse_contradictory_budget(holder: Any) -> None:
    """Raises `ValueError` where a config or a budget names several budgets, or bounds that nothing lies between."""
    given = given_budget(holder)
    if len(given) > 1:
        listed = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(
            f"A budget is exactly one of keep_ratio, num_keep and threshold; got {listed}. Set the others to None."
        )
    if holder.max_keep is not None and holder.max_keep < holder.min_keep:
        raise ValueError(
            f"min_keep must be at most max_keep; got min_keep={holder.min_keep} and max_keep={holder.max_keep}."
        )


def refuse_uneven_heads(latent_dim: int, policy_num_heads: int) -> None:
    """Raises `ValueError` where the policy's heads would not be equally wide."""
    if latent_dim % policy_num_heads:
        raise ValueError(
            f"latent_dim={latent_dim} is not a multiple of policy_num_heads={policy_num_heads}: change one of them."
        )


class TPRLConfig(PreTrainedConfig):
    r"""
    Configuration of [`TPRLForConditionalGeneration`].

    A checkpoint prunes by default with the budget that its config names. Without one (no `keep_ratio`, `num_keep` or
    `threshold`) the model answers unpruned unless a call names a budget.

    Args:
        base_config (`PreTrainedConfig` or `dict`, *optional*):
            Config of the wrapped LVLM.
        base_model_name_or_path (`str`, *optional*):
            Where the wrapped LVLM comes from; a policy-only checkpoint loads it from there.
        base_model_revision (`str`, *optional*):
            Its revision on the Hub.
        base_model_relative_path (`str`, *optional*):
            The same directory as `base_model_name_or_path`, seen from the checkpoint's, so that both can be moved
            together. Set by `save_pretrained`.
        includes_base_model (`bool`, defaults to `True`):
            Whether the checkpoint holds the LVLM's weights too. Set by `save_pretrained`.
        includes_adapter (`bool`, defaults to `False`):
            Whether it holds a LoRA of the LVLM, in the folder `adapter`. Set by `save_pretrained`.
        keep_ratio (`float`, *optional*):
            Default budget: the fraction of each sample's visual tokens that is kept.
        num_keep (`int`, *optional*):
            Default budget: the number of visual tokens kept of each sample.
        threshold (`float`, *optional*):
            Default budget: tokens with a larger keep probability are kept (eq. 16; the paper uses 0.55 to 0.74).
        threshold_keep_ratio (`float`, *optional*):
            The fraction that a threshold is to keep on average, for a policy that is told its budget. Set together
            with `threshold` by [`~tprl_hf.training.calibrate_threshold`].
        min_keep (`int`, defaults to 1):
            At least so many tokens stay of a sample that has any.
        max_keep (`int`, *optional*):
            At most so many tokens stay.
        position_ids (`"original"` or `"contiguous"`, defaults to `"original"`):
            Whether kept tokens keep the positions they had in the full prompt or are numbered anew without gaps.
        query_agnostic (`bool`, defaults to `False`):
            Hide the question from the policy.
        pruner (`str` or `dict`, *optional*):
            A pruner that needs no training and chooses in place of the policy: its name in `tprl_hf.pruners.PRUNERS`,
            or `{"name": name, **settings}`. Set by [`~TPRLForConditionalGeneration.set_pruner`].
        policy_training (`dict`, *optional*):
            How the policy was trained: stage, recipe, digest of the data, version. `None`: it was not, and it would
            keep random tokens. Set by the trainers.
        special_token_ids (`list[int]`, *optional*):
            Token ids that are never part of a question, besides those that the LVLM's own configs name: the markers of
            its chat template. Our trainers take them from the tokenizer.
        question_start_ids, question_end_ids (`list[int]`, *optional*):
            What the chat template puts before a question, and between the last question and its answer. Only tokens
            between them are read as the question. Set by [`~TPRLForConditionalGeneration.read_chat_template`], which
            our trainers call.
        token_dim (`int`, *optional*):
            Width D of the visual tokens as the LLM sees them. Taken from `base_config`.
        autoencoder_dim (`int`, *optional*):
            Width between the two layers of the autoencoder. Defaults to `token_dim // 4`, and with the default
            `latent_dim` to that at least.
        latent_dim (`int`, *optional*):
            Width Z of the codes, and of the policy's attention. Defaults to `token_dim // 16`, the paper's, and 256 at
            least, which that is for LLaVA-1.5-7B; rounded up to a multiple of `policy_num_heads`. A narrow policy
            hardly learns to read the question: `tprl reproduce own_data`.
        policy_dim (`int`, defaults to 512):
            Width inside the MLPs of the policy's heads.
        policy_num_heads (`int`, defaults to 8):
            Attention heads of the policy.
        policy_num_layers (`int`, defaults to 1):
            Attention layers of the policy; the paper has one. With 0 it is an MLP on each token alone (Table 8).
        policy_positions (`bool`, defaults to `False`):
            Tell the policy where in its image each token lies, and where in the question each word. Not in the paper.
        policy_steps (`int`, *optional*):
            Tell the policy which of so many steps it is at. Not in the paper.
        policy_budget (`bool`, defaults to `False`):
            Tell the policy which fraction is to be kept. Not in the paper.
        policy_input_norm (`bool`, defaults to `False`):
            LayerNorm of codes and words before the policy's attention. Not in the paper. Set it for an LLM whose word
            embeddings are much smaller than its visual tokens, as pretrained ones are: else the policy keeps the same
            tokens whatever the question.
        policy_similarity (`bool`, defaults to `False`):
            Tell the policy how similar each visual token is to the words of the question, as cosines in the LLM's
            input space. Not in the paper. It need not learn then which words mean what is seen.
        num_steps (`int`, defaults to 1):
            Steps in which the learned pruner reaches its budget at inference, at most 1000. The paper prunes in one
            shot (eq. 16).

    Raises:
        `ValueError`: for a value that is not what it must be, and for settings that contradict each other.
    """

    model_type = "tprl"
    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig}
    # so that predictions of `Trainer` are logits, as with the base model
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "keep_mask", "num_kept", "columns"]

    base_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_relative_path: str | None = None
    includes_base_model: bool = True
    includes_adapter: bool = False
    keep_ratio: float | int | None = None
    num_keep: int | None = None
    threshold: float | int | None = None
    threshold_keep_ratio: float | int | None = None
    min_keep: int = 1
    max_keep: int | None = None
    position_ids: Literal["original", "contiguous"] = "original"
    query_agnostic: bool = False
    pruner: str | dict[str, Any] | None = None
    policy_training: dict[str, Any] | None = None
    special_token_ids: list[int] | None = None
    question_start_ids: list[int] | None = None
    question_end_ids: list[int] | None = None
    token_dim: int | None = None
    autoencoder_dim: int | None = None
    latent_dim: int | None = None
    policy_dim: int = 512
    policy_num_heads: int = 8
    policy_num_layers: int = 1
    policy_positions: bool = False
    policy_steps: int | None = None
    policy_budget: bool = False
    policy_input_norm: bool = False
    policy_similarity: bool = False
    num_steps: int = 1

    def __post_init__(self, **kwargs):
        kwargs.pop("text_config", None)  # of `to_dict`
        kwargs.pop("lambda_disc", None)  # older checkpoints name it, though only training reads it
        base_fields = self.base_config if isinstance(self.base_config, dict) else {}
        refuse_other_dtypes({**kwargs, "dtype": self.dtype, "base_config": base_fields}, "TPRLConfig")
        if isinstance(self.base_config, dict):
            base = dict(self.base_config)
            model_type = base.pop("model_type", None)
            if model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"base_config is of model type {model_type!r}, which transformers does not know. Code that a base "
                    "model brings along is never run: update transformers, or use another base model."
                )
            self.base_config = AutoConfig.for_model(model_type, **base)
        elif self.base_config is not None and not isinstance(self.base_config, PreTrainedConfig):
            raise wrong("base_config", self.base_config, "the config of an LVLM, or a dict of its fields")
        refuse_misspelled([name for name in kwargs if not hasattr(PreTrainedConfig, name)], own_fields(), "TPRLConfig")
        self.check()
        if self.token_dim is None and isinstance(self.base_config, PreTrainedConfig):
            self.token_dim = self.base_config.get_text_config().hidden_size
        if self.token_dim is not None:
            middle = max(self.token_dim // 4, 1)
            if self.latent_dim is None:
                heads = self.policy_num_heads
                self.latent_dim = -(-max(self.token_dim // 16, LEAST_LATENT_DIM) // heads) * heads
                middle = max(middle, self.latent_dim)
            if self.autoencoder_dim is None:
                self.autoencoder_dim = middle
        if self.base_config is not None and kwargs.get("tie_word_embeddings") is None:
            kwargs["tie_word_embeddings"] = getattr(self.base_config, "tie_word_embeddings", False)
        kwargs.setdefault("auto_map", {})  # TRL reads it of a config whose class transformers does not know
        super().__post_init__(**kwargs)

    @property
    def _attn_implementation(self):
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None):
        """A dict names parts of the base model, as it does without us; `base_config` is all of them."""
        if isinstance(value, dict) and "base_config" not in value:
            current = getattr(self, "_attn_implementation_internal", None)
            value = {"": value.get("", current), "base_config": value}
        PreTrainedConfig._attn_implementation.fset(self, value)

    def check(self) -> None:
        """Raises `ValueError` for a field that is not what it must be; models check again, as fields can be set."""
        check_fields(self, CHECKS)
        refuse_contradictory_budget(self)
        if isinstance(self.pruner, str):
            self.pruner = {"name": self.pruner}
        has_name = isinstance(self.pruner, dict) and isinstance(self.pruner.get("name"), str) and self.pruner["name"]
        if self.pruner is not None and not has_name:
            raise wrong("pruner", self.pruner, "the name of a pruner, or a dict with its name and settings")
        if self.policy_training is not None and not isinstance(self.policy_training, dict):
            raise wrong("policy_training", self.policy_training, "a dict such as trainers write, or None")
        if self.latent_dim is not None:
            refuse_uneven_heads(self.latent_dim, self.policy_num_heads)

    def to_dict(self) -> dict[str, Any]:
        """With the sizes of the LLM as `text_config`, where PEFT looks for them; they are not saved."""
        values = super().to_dict()
        if isinstance(self.base_config, PreTrainedConfig):
            values["text_config"] = self.get_text_config().to_dict()
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        values = super().to_diff_dict()
        values.pop("text_config", None)
        return values

    # As the base model's config: others, such as TRL, look there for the ids of placeholders.

    @property
    def image_token_id(self) -> int | None:
        return getattr(self.base_config, "image_token_id", None)

    @image_token_id.setter
    def image_token_id(self, value: int | None) -> None:
        base: Any = self.base_config
        base.image_token_id = value

    @property
    def video_token_id(self) -> int | None:
        return getattr(self.base_config, "video_token_id", None)

    @video_token_id.setter
    def video_token_id(self, value: int | None) -> None:
        base: Any = self.base_config
        base.video_token_id = value

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The wrapped LVLM's text config."""
        if isinstance(self.base_config, PreTrainedConfig):
            return self.base_config.get_text_config(decoder=decoder, encoder=encoder)
        return self


def refuse_other_dtypes(fields: dict[str, Any], where: str) -> None:
    """Raises `ValueError` where a config, or a part of one, names a dtype that weights cannot have."""
    import torch

    for name in ("dtype", "torch_dtype"):
        value = fields.get(name)
        for one in value.values() if isinstance(value, dict) else [value]:
            found = getattr(torch, one, one) if isinstance(one, str) else one
            if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
                raise wrong(f"{name} of {where}", one, "a dtype of weights, such as 'bfloat16'")
    for name, part in fields.items():
        if name.endswith("_config") and isinstance(part, dict):
            refuse_other_dtypes(part, f"{name} of {where}")


def own_fields() -> list[str]:
    """Names of the fields that a [`TPRLConfig`] has and other configs do not."""
    return [name for name in TPRLConfig.__annotations__ if name not in ("sub_configs", "keys_to_ignore_at_inference")]
