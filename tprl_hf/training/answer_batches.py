"""Samples as the frozen LVLM reads them: prompt, reference answer, visual features, and what a policy may look at."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor

from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.text_query import chat_messages, question_mask
from tprl_hf.modeling.token_pruner import PruningInputs
from tprl_hf.modeling.values import wrong
from tprl_hf.modeling.visual_features import VisualFeatures
from tprl_hf.pictures import picture_of

from .divergence import UnprunedAnswer
from .feature_cache import FeatureCache, join_features

MAX_CACHED_TEXTS = 100_000


@dataclass
class EncodedSample:
    """One sample without batch mates, on the CPU but for its features.

    Args:
        prompt_ids (`int64 [L]`): the prompt with all its placeholders.
        answer_ids (`int64 [A]`, *optional*): the reference answer, with the token that ends it.
        query_mask (`bool [L]`): the question in the prompt.
        types (`int64 [L]` each): further inputs that run along the prompt.
        features: of its images.
        unpruned ([`UnprunedAnswer`], *optional*): where the reference is what the LVLM itself answers unpruned.
    """

    prompt_ids: Tensor
    answer_ids: Tensor | None
    query_mask: Tensor
    types: dict[str, Tensor]
    features: VisualFeatures
    unpruned: UnprunedAnswer | None = None


@dataclass
class AnswerBatch:
    """B samples.

    Args:
        rows: as the dataset gave them.
        samples: each alone.
        features: of the images of all of them.
        inputs ([`PruningInputs`]): what a pruner or a policy may look at.
    """

    rows: list[dict[str, Any]]
    samples: list[EncodedSample]
    features: VisualFeatures
    inputs: PruningInputs

    def __len__(self) -> int:
        return len(self.samples)

    def prompts(self, sample_index: Sequence[int]) -> dict[str, Any]:
        """What `forward` and `generate` take: left-padded prompts of samples `sample_index`, which may repeat."""
        samples = [self.samples[index] for index in sample_index]
        return {
            **left_padded(samples, self.inputs.valid.device),
            "visual_features": self.features.take(list(sample_index)),
        }


def left_pad(rows: list[Tensor], value: int = 0) -> Tensor:
    """`int64 [n]` of several lengths as one `[B, L]`."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


def left_padded(samples: Sequence[EncodedSample], device: torch.device) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and what else runs along the prompts, `int64 [B, L]` each."""
    prompts = {
        "input_ids": left_pad([sample.prompt_ids for sample in samples]),
        "attention_mask": left_pad([torch.ones_like(sample.prompt_ids) for sample in samples]),
        **{name: left_pad([sample.types[name] for sample in samples]) for name in samples[0].types},
    }
    return {name: value.to(device) for name, value in prompts.items()}


def undecoded(dataset: Dataset) -> Dataset:
    """The same dataset, whose images stay bytes until they are needed: most are needed once, for their features."""
    if dataset.features.get("images") == List(ImageFeature()):
        return dataset.cast_column("images", List(ImageFeature(decode=False)))
    if dataset.features.get("image") == ImageFeature():
        return dataset.cast_column("image", ImageFeature(decode=False))
    return dataset


def images_of(row: Mapping[str, Any]) -> Sequence[Any]:
    """The images of a row: those of `images`, or the one of `image`."""
    if "images" in row:
        return row["images"] or []
    return [] if row["image"] is None else [row["image"]]


def reference_answer(row: Mapping[str, Any]) -> str | None:
    """The answer of a row; of several, the one that is given most often. `None` where the row has none."""
    answer = row.get("answer")
    if answer is None or isinstance(answer, str):
        return answer
    return max(answer, key=answer.count, default=None)


def open_images(images: Sequence[Any], name: str | None = None) -> list[Image.Image]:
    """Decodes images that are still bytes or paths; messages call those without a path `name`."""
    return [picture_of(image, name) for image in images]


def image_key(row: Mapping[str, Any]) -> str:
    """Equal for samples with the same images."""
    if row.get("image_id") is not None:
        return str(row["image_id"])
    digest = hashlib.sha256()
    for image in images_of(row):
        if isinstance(image, Mapping):
            digest.update(image["bytes"] or image["path"].encode())
        else:
            digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()


def end_ids(model: TPRLForConditionalGeneration, processor: Any) -> list[int]:
    """The tokens that end an answer."""
    end = model.generation_config.eos_token_id
    return end if isinstance(end, list) else [processor.tokenizer.eos_token_id if end is None else end]


def check_row(row: Mapping[str, Any]) -> None:
    """Raises `ValueError` for fields of a row that are not those of a sample."""
    if not isinstance(row.get("prompt"), (str, list)) or not row["prompt"]:
        raise wrong("prompt", row.get("prompt"), "a question, or a list of chat messages", "Fill the column.")
    if not isinstance(row.get("images", []), (list, tuple, type(None))):
        raise wrong("images", row["images"], "a list of pictures", "It is empty for a question without one.")
    answer = row.get("answer")
    answers = answer if isinstance(answer, list) and answer else [answer]
    if answer is not None and not all(isinstance(one, str) for one in answers):
        raise wrong("answer", answer, "the reference answer as a text, or a list of them")


class SampleEncoder:
    """Turns rows of a dataset into an [`AnswerBatch`]. Each sample is encoded alone and, while there is room, once.

    Args:
        model ([`TPRLForConditionalGeneration`]): whose base model encodes.
        processor: its processor, with a chat template.
        cache_bytes (`int`, defaults to 1 GiB): room for visual features.
        with_attention (`bool`, defaults to `False`): also note the tower's attention, for teachers that read it.
    """

    def __init__(
        self,
        model: TPRLForConditionalGeneration,
        processor: Any,
        cache_bytes: int = 2**30,
        with_attention: bool = False,
    ):
        if not processor.chat_template:
            raise ValueError(
                f"{type(processor).__name__} has no chat template: set processor.chat_template, so that questions are "
                "put as the model was trained to read them."
            )
        self.model = model
        self.processor = processor
        self.with_attention = with_attention
        self.cache = FeatureCache(cache_bytes)
        self.texts: dict[tuple, tuple[Tensor, Tensor | None, Tensor, dict[str, Tensor]]] = {}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> AnswerBatch:
        samples = [self.encode(row) for row in rows]
        features = join_features([sample.features for sample in samples])
        inputs = self.model.pruning_inputs(
            **left_padded(samples, self.model.device),
            query_mask=left_pad([sample.query_mask for sample in samples]),
            visual_features=features,
            with_attention=self.with_attention,
        )
        return AnswerBatch(list(rows), samples, features, inputs)

    def encode(self, row: dict[str, Any]) -> EncodedSample:
        """One sample; its prompt and its features come from the caches where they can."""
        check_row(row)
        images = image_key(row)
        key = (images, repr(row["prompt"]), reference_answer(row))
        processed: dict[str, Any] = {}
        if key not in self.texts:
            if len(self.texts) >= MAX_CACHED_TEXTS:
                self.texts.clear()
            processed = self.process(row)
            self.texts[key] = self.encode_text(row, processed)
        prompt_ids, answer_ids, query_mask, types = self.texts[key]
        features = self.cache.get(images, lambda: self.encode_images(processed or self.process(row)))
        return EncodedSample(prompt_ids, answer_ids, query_mask, types, features)

    def process(self, row: dict[str, Any]) -> dict[str, Any]:
        """The processor's output for one prompt, on the model's device."""
        texts = self.render(row)[:1]
        images = open_images(images_of(row), row.get("image_id"))
        inputs = self.processor(images=[images] if images else None, text=texts, return_tensors="pt")
        return dict(inputs.to(self.model.device))

    def render(self, row: dict[str, Any]) -> tuple[str, str]:
        """The prompt, and the reference answer as the template continues with it; empty where there is none."""
        messages = chat_messages(row["prompt"], len(images_of(row)))
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        reference = reference_answer(row)
        if reference is None:
            return prompt, ""
        answer = {"role": "assistant", "content": [{"type": "text", "text": reference}]}
        whole = self.processor.apply_chat_template([*messages, answer], tokenize=False)
        return prompt, whole[len(prompt) :] if whole.startswith(prompt) else " " + reference

    def encode_text(
        self, row: dict[str, Any], processed: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Tensor, dict[str, Tensor]]:
        """Ids of prompt and answer, which of the prompt's are the question, and what else runs along the prompt."""
        prompt_ids = processed["input_ids"].cpu()
        rest = {name: value for name, value in processed.items() if name not in ("input_ids", "attention_mask")}
        types = {n: v[0].cpu() for n, v in rest.items() if torch.is_tensor(v) and v.shape == prompt_ids.shape}
        chat = chat_messages(row["prompt"], len(images_of(row)))
        query_mask = question_mask(self.processor, [chat], prompt_ids)
        if reference_answer(row) is None:
            return prompt_ids[0], None, query_mask[0], types
        answer_ids = self.processor.tokenizer(self.render(row)[1], add_special_tokens=False).input_ids
        ends = end_ids(self.model, self.processor)
        if any(token in ends for token in answer_ids):  # what a template writes behind it is not the answer
            answer_ids = answer_ids[: next(i for i, token in enumerate(answer_ids) if token in ends) + 1]
        else:
            answer_ids = [*answer_ids, ends[0]]
        return prompt_ids[0], torch.tensor(answer_ids), query_mask[0], types

    @torch.no_grad()
    def encode_images(self, processed: dict[str, Any]) -> VisualFeatures:
        """The visual tokens of one sample."""
        return self.model.adapter.encode(processed["input_ids"], processed, self.with_attention)
