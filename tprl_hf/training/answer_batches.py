"""Samples as the frozen LVLM reads them: prompt, reference answer, visual features, and what a policy may look at."""

import hashlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from tprl_hf.answer_rules import as_texts
from tprl_hf.data.own_rows import is_answer, with_names
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.text_query import chat_messages, messages_of, question_mask, special_tokens, text_parts
from tprl_hf.modeling.token_pruner import PruningInputs
from tprl_hf.modeling.values import wrong
from tprl_hf.modeling.visual_features import VisualFeatures
from tprl_hf.pictures import image_digest, images_of, name_of_picture, picture_of

from .answer_ids import end_ids, reference_ids
from .divergence import UnprunedAnswer
from .feature_cache import FeatureCache, join_features
from .processed_ahead import Group, ProcessedAhead
from .stored_features import moved
from .stored_texts import packed, unpacked

MAX_CACHED_TEXTS = 100_000  # of about a kilobyte
MARK = "[answer]"  # stands for an answer, to see what a chat template writes around it


@dataclass
class EncodedSample:
    """One sample without batch mates, on the CPU.

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

    @property
    def num_visual(self) -> int:
        """Its visual tokens."""
        return sum(len(one.rows) for one in self.features.modalities.values())


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
    """
    The same dataset, whose images stay bytes until they are needed: most are needed once, for their features. Names
    stand for the numbers of a `ClassLabel`.
    """
    if dataset.format["type"] not in (None, "custom"):  # others give no lists and texts
        dataset = dataset.with_format(None)
    for name in ("images", "image"):
        if dataset.features.get(name) == List(ImageFeature()):
            dataset = dataset.cast_column(name, List(ImageFeature(decode=False)))
        elif dataset.features.get(name) == ImageFeature():
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
    return with_names(dataset)


def reference_answer(row: Mapping[str, Any]) -> str | None:
    """The answer of a row; of several, the one that is given most often. `None` where the row has none."""
    answer = row.get("answer")
    texts = as_texts(answer)
    return max(texts, key=texts.count, default=None)


def open_images(images: Sequence[Any], name: str | None = None) -> list[Image.Image]:
    """Decodes images that are still bytes or paths; messages call those without a path `name`."""
    return [picture_of(image, name) for image in images]


def answered(text: str) -> dict[str, Any]:
    """An answer as a chat message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def check_row(row: Mapping[str, Any]) -> None:
    """Raises `ValueError` for fields of a row that are not those of a sample."""
    if not isinstance(row.get("prompt"), (str, list)) or not row["prompt"]:
        raise wrong("prompt", row.get("prompt"), "a question, or a list of chat messages", "Fill the column.")
    answer = row.get("answer")
    answers = answer if isinstance(answer, list) else [answer]
    if not all(one is None or is_answer(one) for one in answers):
        raise wrong("answer", answer, "the reference answer as a text or a number, or a list of them")
    if any(isinstance(one, str) and "<image>" in one for one in answers):
        raise ValueError("`answer` has <image> in its text, which stands for a picture: leave it out.")
    check_messages(messages_of(row["prompt"]), len(images_of(row)))


def check_messages(messages: Sequence[Mapping[str, Any]], num_images: int) -> None:
    """Raises `ValueError` for messages with other things than texts and the row's pictures, or with the answer."""
    parts = [part for message in messages for part in text_parts(message["content"])]
    others = sorted({part["type"] for part in parts} - {"text", "image"})
    if others:
        raise ValueError(f"`prompt` has a part of type {others[0]!r}: trainers read texts and images only.")
    if any(part["type"] == "text" and "<image>" in part["text"] for part in parts):
        raise ValueError(
            "`prompt` has <image> in its text: leave it out. Pictures stand before the first question, or where a "
            "message has a part {'type': 'image'}."
        )
    named = sum(part["type"] == "image" for part in parts)
    if named not in (0, num_images):
        raise ValueError(
            f"`prompt` has {named} parts of type 'image', and its row {num_images} pictures: give each picture one, "
            "or leave all of them out."
        )
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"The last message of `prompt` is of {messages[-1]['role']!r}: end it with the question, of 'user'. What "
            "the assistant says to it belongs in `answer`."
        )


class SampleEncoder:
    """Turns rows of a dataset into an [`AnswerBatch`]. Each image is encoded once while the cache has room.

    Args:
        model ([`TPRLForConditionalGeneration`]): whose base model encodes.
        processor: its processor, with a chat template.
        cache ([`FeatureCache`] or `int`, defaults to 1 GiB): where features are kept; a number of bytes is room in
            memory, on the CPU.
        with_attention (`bool`, defaults to `False`): also note the tower's attention, for teachers that read it.
        encode_batch_size (`int`, defaults to 1): images that the tower encodes at once. One image gives the same bits
            whatever images come before it; in larger batches rounding depends on them.
        prefetch_threads (`int`, defaults to 0): threads that process the rows of [`prefetch`].
    """

    def __init__(
        self,
        model: TPRLForConditionalGeneration,
        processor: Any,
        cache: FeatureCache | int = 2**30,
        with_attention: bool = False,
        encode_batch_size: int = 1,
        prefetch_threads: int = 0,
    ):
        if not processor.chat_template:
            raise ValueError(
                f"{type(processor).__name__} has no chat template: set processor.chat_template, so that questions are "
                "put as the model was trained to read them."
            )
        self.model = model
        self.processor = processor
        self.with_attention = with_attention
        self.encode_batch_size = encode_batch_size
        self.cache = FeatureCache(cache) if isinstance(cache, int) else cache
        self.ahead = ProcessedAhead(processor, self.process_together, prefetch_threads)
        self.texts: dict[bytes, Any] = {}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> AnswerBatch:
        return self.batch(rows, self.encode_rows(rows))

    def batch(self, rows: Sequence[dict[str, Any]], samples: list[EncodedSample]) -> AnswerBatch:
        """Rows that were encoded as a batch on the model's device."""
        features = moved(join_features([sample.features for sample in samples]), self.model.device)
        inputs = self.model.pruning_inputs(
            **left_padded(samples, self.model.device),
            query_mask=left_pad([sample.query_mask for sample in samples]),
            visual_features=features,
            with_attention=self.with_attention,
        )
        return AnswerBatch(list(rows), samples, features, inputs)

    def encode(self, row: dict[str, Any]) -> EncodedSample:
        """One sample."""
        return self.encode_rows([row])[0]

    def encode_rows(self, rows: Sequence[dict[str, Any]]) -> list[EncodedSample]:
        """Each row by itself; texts and features come from the caches where they can."""
        for row in rows:
            check_row(row)
        keys = [self.keys_of(row) for row in rows]
        texts = {text: self.texts[text] for _, text in keys if text in self.texts}
        features = {}
        for image in dict.fromkeys(image for image, _ in keys):
            if image in self.cache and (found := self.cache.get(image)) is not None:
                features[image] = found
        prepared = self.ahead.take({text for image, text in keys if text not in texts or image not in features})
        for group, processed in prepared:
            self.take_in(group, processed, texts, features)
        for group, processed in self.ahead.run(self.groups(rows, keys, texts, features)):
            self.take_in(group, processed, texts, features)
        samples = []
        for image, text in keys:
            prompt_ids, answer_ids, query_mask, types = unpacked(texts[text])
            samples.append(EncodedSample(prompt_ids, answer_ids, query_mask, types, features[image]))
        return samples

    def prefetch(self, rows: Sequence[dict[str, Any]]) -> None:
        """Begins to read and process what [`encode_rows`] will need for `rows`, in the background."""
        if self.ahead.num_threads:
            keys = [self.keys_of(row) for row in rows]
            known = dict.fromkeys(image for image, _ in keys if image in self.cache)
            groups = self.groups(rows, keys, self.texts, known)
            self.ahead.start(groups, [partial(self.cache.read_ahead, image) for image in known])

    def keys_of(self, row: Mapping[str, Any]) -> tuple[str, bytes]:
        """Under which the features of a row's images, and its texts, are kept."""
        images = image_digest(row)
        return images, hashlib.sha256(repr((images, row["prompt"], reference_answer(row))).encode()).digest()

    def groups(
        self,
        rows: Sequence[dict[str, Any]],
        keys: Sequence[tuple[str, bytes]],
        texts: Container[bytes],
        features: Container[str],
    ) -> list[Group]:
        """What is to be processed of `rows`, besides what is among `texts` and `features`."""
        first: dict[str, int] = {}  # the row that an image is encoded with
        for number, (image, _) in enumerate(keys):
            if image not in features:
                first.setdefault(image, number)
        chosen = list(first.values())
        together = [number for number in chosen if images_of(rows[number])]
        size = self.encode_batch_size
        parts = [together[start : start + size] for start in range(0, len(together), size)]
        parts += [[number] for number in chosen if not images_of(rows[number])]
        met, alone = {keys[number][1] for number in chosen}, []
        for number, (_, text) in enumerate(keys):
            if text not in texts and text not in met:
                met.add(text)
                alone.append([number])
        return [
            Group([rows[n] for n in part], [keys[n][0] for n in part], [keys[n][1] for n in part], is_encoded)
            for found, is_encoded in ((parts, True), (alone, False))
            for part in found
        ]

    def take_in(
        self, group: Group, processed: BatchFeature, texts: dict[bytes, Any], features: dict[str, VisualFeatures]
    ) -> None:
        """Adds texts and features of a group to those of the batch, and to the caches while they have room."""
        ids = processed["input_ids"]
        attended = processed.get("attention_mask", torch.ones_like(ids)).bool()
        along = {
            name: value for name, value in processed.items() if torch.is_tensor(value) and value.shape == ids.shape
        }
        for number, (row, key) in enumerate(zip(group.rows, group.keys, strict=True)):
            of_row = {name: value[number, attended[number]][None] for name, value in along.items()}
            texts[key] = packed(self.encode_text(row, of_row))
            if len(self.texts) < MAX_CACHED_TEXTS:
                self.texts[key] = texts[key]
        if not group.is_encoded or all(image in features for image in group.images):
            return
        encoded = moved(self.encode_images(dict(processed.to(self.model.device))), torch.device("cpu"))
        for number, image in enumerate(group.images):
            features[image] = self.cache.rounded(encoded.take([number]) if len(group.images) > 1 else encoded)
            self.cache.add(image, features[image])

    def process(self, row: dict[str, Any]) -> dict[str, Any]:
        """The processor's output for one prompt, on the model's device."""
        return dict(self.process_together(self.processor, [row]).to(self.model.device))

    def process_together(self, processor: Any, rows: Sequence[dict[str, Any]]) -> BatchFeature:
        """The processor's output for the prompts of rows; of several, each has images."""
        images = [open_images(images_of(row), name_of_picture(row)) for row in rows]
        padding = {"padding": True} if len(rows) > 1 else {}
        texts = [self.render(row)[0] for row in rows]
        padding |= special_tokens(processor, texts)
        return processor(images=images if any(images) else None, text=texts, return_tensors="pt", **padding)

    def render(self, row: dict[str, Any]) -> tuple[str, str, str]:
        """The prompt, the reference answer as the template continues with it, and what it writes behind that; empty
        where there is none."""
        messages = chat_messages(row["prompt"], len(images_of(row)))
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        reference = reference_answer(row)
        if reference is None:
            return prompt, "", ""
        whole, marked = (
            self.processor.apply_chat_template([*messages, answered(text)], tokenize=False)
            for text in (reference, MARK)
        )
        if not whole.startswith(prompt) or not marked.startswith(prompt):
            return prompt, f" {reference}", ""
        whole, (head, _, tail) = whole[len(prompt) :], marked[len(prompt) :].partition(MARK)
        if not whole.startswith(head) or not whole.endswith(tail):  # it does not write all answers alike
            return prompt, whole, ""
        text = whole.removesuffix(tail)
        return prompt, text if reference.strip() else text.rstrip(" "), tail

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
        ends = end_ids(self.model, self.processor)
        answer_ids = reference_ids(self.processor.tokenizer, *self.render(row), ends)
        return prompt_ids[0], torch.tensor(answer_ids), query_mask[0], types

    @torch.no_grad()
    def encode_images(self, processed: dict[str, Any]) -> VisualFeatures:
        """The visual tokens of one sample."""
        return self.model.adapter.encode(processed["input_ids"], processed, self.with_attention)
