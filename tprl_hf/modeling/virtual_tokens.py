"""Prompts that do not begin with tokens: PEFT's prompt tuning and P-tuning put trained embeddings there, its prefix
tuning trained keys and values."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from .cached_prompt import CACHE_NAME, CachedPrompt, is_filled
from .sequence_inputs import runs_along

VIRTUAL = -2  # id of a column without a token
NUM_VALUES = 8  # of an embedding, by which its token is looked for; the rest is compared then


def ids_of_embeddings(inputs_embeds: Tensor, embedding: nn.Module, placeholders: Iterable[int]) -> Tensor:
    """
    The tokens of embeddings, found again in the table.

    Args:
        inputs_embeds (`[B, L, D]`): of virtual tokens, then of tokens.
        embedding (`nn.Module`): the base model's.
        placeholders (`list[int]`): ids of visual tokens. They win where several tokens have one embedding, as in the
            base model.

    Returns:
        `int64 [B, L]` on the CPU, `VIRTUAL` for virtual tokens.

    Raises:
        `ValueError`: where an embedding that is not a token's may be that of an image: it stands behind a token, or
            there are no placeholders at all.
    """
    with torch.no_grad():
        table = torch.arange(embedding.get_parameter("weight").shape[0], device=inputs_embeds.device)
        keys, order = torch.cat([row_keys(embedding(chunk)) for chunk in table.split(4096)]).sort(stable=True)
        place = torch.searchsorted(keys, row_keys(inputs_embeds)).clamp(max=len(keys) - 1)
        ids = order[place]
        ids = ids.masked_fill((embedding(ids) != inputs_embeds).any(-1), VIRTUAL)
        known = [token for token in placeholders if token < len(keys)]
        for token in reversed(known):  # the first, an image's, wins over a video's
            row = embedding(torch.full((), token, device=ids.device))
            ids = ids.masked_fill((inputs_embeds == row).all(-1), token)
    ids = ids.cpu()
    unknown = ids == VIRTUAL
    behind = unknown & (~unknown).cumsum(1).bool()
    shown = torch.isin(ids, torch.tensor([*placeholders], device="cpu"))
    if behind.any() or (unknown.any() and not shown.any()):
        sample, column = (behind if behind.any() else unknown).nonzero()[0].tolist()
        raise ValueError(
            f"inputs_embeds of sample {sample} has in column {column} an embedding that is not a token's, so that "
            "nothing tells where visual tokens are: pass `input_ids`, the placeholders' embeddings, or prune=False."
        )
    return ids


def row_keys(rows: Tensor) -> Tensor:
    """A number of each row of `[..., D]` that equal rows share, `int64 [...]`."""
    bits = (rows[..., :NUM_VALUES].double() + 0.0).view(torch.int64)  # + 0.0, so that -0.0 is 0.0
    factors = torch.arange(1, bits.shape[-1] + 1, device=bits.device) * 0x9E3779B97F4A7C1 | 1
    return (bits * factors).sum(-1)


def embed_columns(inputs_embeds: Tensor, columns: Tensor) -> Tensor:
    """
    The embeddings of a pruned prompt, `[B, P, D]`; in its padding ones, which no model takes for a placeholder.

    Args:
        inputs_embeds (`[B, L, D]`): of the full prompt.
        columns (`int64 [B, P]`): column of the full prompt of each pruned column, -1 for padding.
    """
    columns = columns.to(inputs_embeds.device)[..., None]
    kept = inputs_embeds.gather(1, columns.clamp(min=0).expand(-1, -1, inputs_embeds.shape[2]))
    return kept.masked_fill(columns < 0, 1.0)


def types_before_tokens(inputs: dict[str, Any], width: int) -> dict[str, Any]:
    """Inputs whose `..._token_type_ids` have `width` columns, 0 for the virtual tokens that PEFT put before them."""
    return {
        name: pad(value, (width - value.shape[-1], 0))
        if name.endswith("token_type_ids") and torch.is_tensor(value) and value.shape[-1] < width
        else value
        for name, value in inputs.items()
    }


# ---- forward behind a prefix of keys and values ----


def is_prefix(cache: Cache | None, input_ids: Tensor | None, attention_mask: Tensor | None) -> bool:
    """Whether a cache that no call of this model filled stands before the whole prompt, as its mask says."""
    if input_ids is None or attention_mask is None or not is_filled(cache) or CachedPrompt.is_on(cache):
        return False
    assert cache is not None
    return attention_mask.shape[1] == input_ids.shape[1] + int(cache.get_seq_length())


def without_prefix(inputs: dict[str, Any], attention_mask: Tensor, cache: Cache) -> tuple[dict[str, Any], Tensor]:
    """Inputs and mask of the prompt alone.

    Raises:
        `ValueError`: where attentions are asked for, which would have columns of virtual tokens.
    """
    if inputs.get("output_attentions"):
        raise ValueError("Attentions to virtual tokens are in no column of the prompt: leave output_attentions out.")
    rest = {name: value for name, value in inputs.items() if name != CACHE_NAME}
    return rest, attention_mask[:, int(cache.get_seq_length()) :]


def put_behind_prefix(inputs: dict[str, Any], attention_mask: Tensor, cache: Cache, counts_prefix: bool) -> None:
    """
    Adds a prefix to the inputs of a pruned prompt, in place.

    Args:
        attention_mask (`[B, n + L]`): of the call.
        counts_prefix (`bool`): whether the positions count it already.
    """
    held = int(cache.get_seq_length())
    before = attention_mask[:, :held].to(inputs["attention_mask"])
    inputs["attention_mask"] = torch.cat([before, inputs["attention_mask"]], 1)
    inputs[CACHE_NAME] = cache
    if not counts_prefix:
        inputs["position_ids"] = inputs["position_ids"] + held


# ---- generate, of which PEFT leaves its virtual tokens to the model ----


def peft_around(model: nn.Module) -> Any:
    """The `PeftModel` that is calling `generate` of `model` and has virtual tokens for it; `None` without one."""
    caller = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", model)
    return None if caller is model else caller


@dataclass
class VirtualPrompt:
    """
    A prompt with n virtual tokens of PEFT before it.

    Args:
        input_ids (`int64 [B, n + L]`): `VIRTUAL` in the first n columns.
        inputs (`dict`): of `generate`, with what runs along the prompt in n + L columns.
        record ([`CachedPrompt`], *optional*): what the cache among `inputs` holds, of prefix tuning.
        embeddings (`[B, n + L, D]`, *optional*): of prompt tuning and P-tuning.
    """

    input_ids: Tensor
    inputs: dict[str, Any]
    record: CachedPrompt | None = None
    embeddings: Tensor | None = None


def with_virtual_tokens(
    peft_model: Any, input_ids: Tensor, inputs: dict[str, Any], embedding: nn.Module, copies: int
) -> VirtualPrompt:
    """
    Args:
        peft_model (`PeftModel`): which has them.
        input_ids (`int64 [B, L]`), inputs: of `generate`, with `attention_mask`; `query_mask` among them or not.
        embedding (`nn.Module`): the base model's.
        copies (`int`): rows of a cache for each prompt.

    Raises:
        `ValueError`: where a cache of the conversation was passed too.
    """
    if is_filled(inputs.get(CACHE_NAME)):
        raise ValueError(
            "PEFT's virtual tokens begin a prompt: pass the whole conversation without `past_key_values`."
        )
    kind = peft_model.active_peft_config.peft_type
    is_cache = kind in ("PREFIX_TUNING", "CARTRIDGE")
    virtual = peft_model.get_prompt(batch_size=len(input_ids) * (copies if is_cache else 1))
    count = int(virtual.get_seq_length()) if is_cache else virtual.shape[1]
    inputs = {
        name: pad(value, (count, 0), value=int(name == "attention_mask"))
        if runs_along(name, value, input_ids)
        else value
        for name, value in inputs.items()
        if name != "token_type_ids"  # PEFT leaves them out of training too, and says so
    }
    prompt = VirtualPrompt(pad(input_ids, (count, 0), value=VIRTUAL), inputs)
    if is_cache:
        inputs[CACHE_NAME] = virtual
        prompt.record = record_of_prefix(len(input_ids), count)
        prompt.record.note_layers(virtual)
    else:
        rows = embedding(input_ids)
        prompt.embeddings = torch.cat([virtual.to(rows), rows], 1)
    return prompt


@contextmanager
def embedded_as(embedding: nn.Module, input_ids: Tensor, inputs_embeds: Tensor) -> Iterator[None]:
    """
    While it holds, the base model reads `inputs_embeds [B, P, D]` for a prompt `input_ids [B, P]` and its beams. Not
    all base models take embeddings in `generate`. PEFT changes the model for the time of a call too.
    """

    def read(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        width, ids = input_ids.shape[1], arguments[0]
        if ids.ndim != 2 or len(ids) % len(input_ids) or ids.shape[1] < width:
            return output
        beams = len(ids) // len(input_ids)
        if not torch.equal(ids[:, :width], input_ids.repeat_interleave(beams, 0)):
            return output
        return torch.cat([inputs_embeds.repeat_interleave(beams, 0), output[:, width:]], 1)

    handle = embedding.register_forward_hook(read)
    try:
        yield
    finally:
        handle.remove()


def record_of_prefix(batch_size: int, num_virtual: int) -> CachedPrompt:
    """What a cache holds that prefix tuning filled."""
    ids = torch.full((batch_size, num_virtual), VIRTUAL, device="cpu")
    positions = torch.arange(num_virtual, device="cpu").expand_as(ids)
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    return CachedPrompt.unpruned(ids, torch.ones_like(ids), positions, nothing)
