"""Each way to generate, as a check that takes a family's models: the pruned answer must be the one it always is.

`CANNOT` names what a base model itself cannot do, with or without pruning.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.families.tiny_models import Sample, before_second_image, build, collate, entry, sample
from tprl_hf.modeling import TPRLForConditionalGeneration

NEW = 4
STATEFUL = "the library offers no assisted generation for models with a state"
NO_FIELD = "the library expands and slices only features in `pooler_output`"
INTERLEAVED = "the base model itself mixes up the images of a sample that has several"
# family: {way: why the base model itself cannot}
CANNOT: dict[str, dict[str, str]] = {
    **{
        family: {"prompt lookup": STATEFUL, "assisted": STATEFUL}
        for family in (
            *("minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "nemotron_h_omni"),
            *("qwen3_5", "qwen3_5_moe", "qwen4_exp"),
        )
    },
    **{
        family: {"keep-all beams": INTERLEAVED}
        for family in ("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "granite4_vision")
    },
    "glm5_next": {"prompt lookup": STATEFUL, "assisted": STATEFUL, "keep-all beams": INTERLEAVED},
    "ernie4_5_vl_moe": dict.fromkeys(
        ("no cache", "assisted", "prompt lookup"), "the base model does not lengthen its token types without a cache"
    ),
    "gemma4_unified": {"chunked prefill": "it changes the base model's own answer"},
    **{
        family: dict.fromkeys(("beams", "keep-all beams", "chunked prefill"), NO_FIELD)
        for family in ("fuyu", "llama4")
    },
}
PREFIX = "the model reads a prompt in both directions, so a second turn changes how it reads the first"
CANNOT["paligemma"] = dict.fromkeys(("conversation", "new image"), PREFIX)
CANNOT["paligemma2"] = CANNOT["paligemma"] | {"static cache": "its forward does not take the masks its generate makes"}
CANNOT["granite4_vision"] |= {
    "chunked prefill": NO_FIELD,
    "step by step": "a direct forward of the base model makes no cache",
}


@dataclass
class Trial:
    """A family's models, a batch of one image, two images and none, and its greedy pruned answers."""

    family: str
    base: PreTrainedModel
    model: TPRLForConditionalGeneration
    samples: list[Sample]

    @classmethod
    def of(cls, family: str) -> "Trial":
        base = build(family)
        numbering = "contiguous" if entry(family).own_positions else "original"
        model = TPRLForConditionalGeneration.from_base_model(
            base, latent_dim=8, keep_ratio=0.4, position_ids=numbering
        ).eval()
        samples = [sample(family, 1, 1), sample(family, 2, 2, text=8), sample(family, 0, 3)]
        return cls(family, base, model, samples[1:] if entry(family).batch_differs else samples)

    @property
    def batch(self) -> dict[str, Any]:
        return collate(self.family, self.samples)

    @property
    def one(self) -> dict[str, Any]:
        return collate(self.family, self.samples[:1])

    def made(self, batch: dict[str, Any], model: PreTrainedModel | None = None, **ways) -> Tensor:
        torch.manual_seed(0)
        return (model or self.model).generate(**batch, max_new_tokens=NEW, **ways)

    def is_greedy(self, batch: dict[str, Any], **ways) -> bool:
        return torch.equal(self.made(batch, **ways), self.made(batch))


def beams(trial: Trial) -> bool:
    """A batch answers as its samples, several sequences each."""
    ways = {"num_beams": 3, "num_return_sequences": 2}
    batch = trial.batch
    together = trial.made(batch, **ways).view(len(trial.samples), 2, -1)[:, :, -NEW:]
    alone = [trial.made(collate(trial.family, [one]), **ways)[:, -NEW:] for one in trial.samples]
    return torch.equal(together, torch.stack(alone))


def keep_all_beams(trial: Trial) -> bool:
    """Keeping all is the base model, searching and sampling."""
    batch = trial.batch
    return all(
        torch.equal(trial.made(batch, keep_ratio=1.0, **ways), trial.made(batch, trial.base, **ways))
        for ways in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2})
    )


def conversation(trial: Trial) -> bool:
    """A second turn from the returned cache is that of the whole conversation afresh."""
    batch = trial.batch
    first = trial.model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    words = torch.arange(7, 7 + 3 * len(trial.samples)).view(-1, 3)
    ids = torch.cat([first.sequences, words], 1)
    more = ids.shape[1] - batch["input_ids"].shape[1]
    longer = {
        name: torch.nn.functional.pad(value, (0, more), value=int(name == "attention_mask"))
        for name, value in batch.items()
        if name == "attention_mask" or name.endswith("token_type_ids")
    }
    inputs = {**batch, **longer, "input_ids": ids}
    afresh = trial.made(inputs, keep_mask=first.keep_mask)
    return torch.equal(trial.made(inputs, past_key_values=first.past_key_values), afresh)


def new_image(trial: Trial) -> bool:
    """A second image comes in the second turn."""
    both, start, rest = before_second_image(trial.family)
    batch = collate(trial.family, [start])
    first = trial.model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    inputs = collate(trial.family, [Sample(first.sequences[0].tolist() + rest, both.images)])
    output = trial.made(inputs, past_key_values=first.past_key_values, return_dict_in_generate=True)
    return torch.equal(output.sequences, trial.made(inputs, keep_mask=output.keep_mask))


def image_dropped(trial: Trial) -> bool:
    """All tokens of one image go, or all of all."""
    batch = trial.batch
    keep_mask = trial.model.prune(**batch).layout.image != 0
    shapes = [trial.made(batch, keep_mask=mask).shape for mask in (keep_mask, torch.zeros_like(keep_mask))]
    return shapes[0] == shapes[1] == (len(trial.samples), batch["input_ids"].shape[1] + NEW)


def step_by_step(trial: Trial) -> bool:
    """Forward with a cache, token by token."""
    batch = trial.batch
    output, tokens = trial.model(**batch, use_cache=True), []
    for _ in range(NEW):
        tokens.append(output.logits[:, -1].argmax(-1))
        output = trial.model(input_ids=tokens[-1][:, None], past_key_values=output.past_key_values, use_cache=True)
    return torch.equal(torch.stack(tokens, 1), trial.made(batch)[:, -NEW:])


# Those that are one argument of the base model's own `generate`.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}
WAYS: dict[str, Callable[[Trial], bool]] = {
    "no cache": lambda trial: trial.is_greedy(trial.batch, **ARGUMENTS["no cache"]),
    "static cache": lambda trial: trial.is_greedy(trial.batch, **ARGUMENTS["static cache"]),
    "chunked prefill": lambda trial: trial.is_greedy(trial.batch, **ARGUMENTS["chunked prefill"]),
    "prompt lookup": lambda trial: trial.is_greedy(trial.one, **ARGUMENTS["prompt lookup"]),
    "assisted": lambda trial: trial.is_greedy(trial.one, assistant_model=build(trial.family, seed=1)),
    "beams": beams,
    "keep-all beams": keep_all_beams,
    "conversation": conversation,
    "new image": new_image,
    "image dropped": image_dropped,
    "step by step": step_by_step,
}
