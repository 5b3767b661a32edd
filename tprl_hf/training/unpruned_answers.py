"""Training without labels: the reference is what the frozen LVLM itself answers when it sees all visual tokens."""

import contextlib
import copy
import functools
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from tprl_hf.modeling.generation_tprl import GREEDY
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.pictures import images_of, stored_picture, to_rgb

from .answer_batches import AnswerBatch, SampleEncoder
from .answer_ids import answer_lengths, end_ids
from .answer_scores import answer_logits, answered_prompts
from .divergence import UnprunedAnswer, top_tokens
from .fingerprint import config_digest, fingerprint, processor_digest
from .micro_batches import MAX_TOKENS, within_memory

OWN_ANSWER_SCORES = ("agreement", "kl")  # those that read no label
COLUMN = "unpruned_answer"  # of demonstrations
COLUMN_FEATURES = {"text": Value("string"), "ids": List(Value("int32")), "settings": Value("string")}
TOP_K = 32
MAX_LOGITS = 2**28  # of one pass, 1 GiB: with a vocabulary of 150,000, fourteen answers of 128 tokens
# Settings of a generation config that change the distribution which tokens are chosen from.
CHANGES_LOGITS = (
    *("bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale"),
    *("min_length", "min_new_tokens", "no_repeat_ngram_size", "repetition_penalty", "sequence_bias"),
    *("suppress_tokens", "watermarking_config"),
)


@contextlib.contextmanager
def likeliest_tokens(model: TPRLForConditionalGeneration) -> Iterator[None]:
    """Inside, `generate` takes what the model itself finds likeliest, which is what answers are compared with."""
    before, plain = model.generation_config, GenerationConfig()
    model.generation_config = copy.deepcopy(before)
    for name in CHANGES_LOGITS:
        setattr(model.generation_config, name, getattr(plain, name, None))
    try:
        yield
    finally:
        model.generation_config = before


class UnprunedAnswers:
    """
    Gives samples the LVLM's own unpruned answers as their references. Each is generated greedily, once, and kept.

    Answers come from the files of `directory`, or from the LVLM; of a row of demonstrations, which has the answer but
    not its probabilities, in one pass. Processes and runs may share a directory: each writes a file of its own and
    reads those of all. Answers of another LVLM, of another length or to another picture or prompt are not taken.

    Args:
        model ([`TPRLForConditionalGeneration`]): its LVLM answers.
        processor: its processor.
        directory (`str` or `Path`, *optional*): where answers are kept. Without one, in memory.
        max_answer_length (`int`, defaults to 128): tokens of the longest answer; a longer one ends there.
        top_k (`int`, defaults to 32): next tokens whose probabilities are kept at each place of an answer.
        batch_size (`int`, defaults to 64), max_tokens (`int`, defaults to 40,960): prompts, and tokens, that the LLM
            reads together.

    Example:

    ```python
    >>> unpruned_answers = UnprunedAnswers(model, processor, "run/unpruned_answers")
    >>> batch = unpruned_answers(encoder(rows))
    >>> scores = score_answers(model, batch, keep_mask, sample_index)
    >>> scores.logprobs, scores.divergence  # agreement, and KL(unpruned || pruned)
    ```
    """

    def __init__(
        self,
        model: TPRLForConditionalGeneration,
        processor: Any,
        directory: str | os.PathLike | None = None,
        max_answer_length: int = 128,
        top_k: int = TOP_K,
        batch_size: int = 64,
        max_tokens: int = MAX_TOKENS,
    ):
        self.model = model
        self.processor = processor
        self.directory = None if directory is None else Path(directory)
        self.max_answer_length = max_answer_length
        self.top_k = top_k
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.num_generated = 0
        self.in_memory: dict[str, UnprunedAnswer] = {}
        self.places: dict[str, tuple[Path, int]] = {}  # of each answer, its file and the place of its line
        self.read_until: dict[Path, int] = {}
        self.own_file: Path | None = None
        self.pictures: dict[str, bytes] = {}  # digests of files
        self.settings_line: str | None = None

    def __call__(self, batch: AnswerBatch) -> AnswerBatch:
        """The same samples; `answer_ids` of each is the LVLM's own answer, and `unpruned` has its distributions."""
        answers = self.answers(batch)
        samples = [
            replace(sample, answer_ids=answer.ids, unpruned=answer)
            for sample, answer in zip(batch.samples, answers, strict=True)
        ]
        return replace(batch, samples=samples)

    def answers(self, batch: AnswerBatch) -> list[UnprunedAnswer]:
        """The LVLM's own answer to each sample of a batch."""
        keys = [self.key(row) for row in batch.rows]
        found = self.found(keys)
        missing = [index for key, index in {key: i for i, key in enumerate(keys)}.items() if found[key] is None]
        tokens = [len(batch.samples[index].prompt_ids) + self.max_answer_length for index in missing]
        for part in within_memory(tokens, self.max_tokens, self.batch_size):
            chunk = [missing[place] for place in part]
            made = self.generate(batch, chunk)
            self.add([keys[index] for index in chunk], made)
            found.update(zip([keys[index] for index in chunk], made, strict=True))
        return [answer for key in keys if (answer := found[key]) is not None]

    def add_to(self, dataset: Dataset, encoder: SampleEncoder) -> Dataset:
        """`dataset` with a column `unpruned_answer`: text, ids, and what they depend on."""
        column: list[dict[str, Any]] = []
        for start in range(0, len(dataset), self.batch_size):
            rows = [dataset[index] for index in range(start, min(start + self.batch_size, len(dataset)))]
            keys = [self.key(row) for row in rows]
            found = self.found(keys)
            if None in found.values():
                found = dict(zip(keys, self.answers(encoder(rows)), strict=True))
            answers = [answer for key in keys if (answer := found[key]) is not None]
            column += [{"text": one.text, "ids": one.ids.tolist(), "settings": self.settings} for one in answers]
        of_all = Dataset.from_dict({COLUMN: column}, features=Features({COLUMN: COLUMN_FEATURES}))
        others = dataset.remove_columns([name for name in dataset.column_names if name == COLUMN])
        return others.add_column(COLUMN, of_all.data.column(COLUMN).combine_chunks())

    # ---- what is kept ----

    @property
    def settings(self) -> str:
        """What answers depend on besides picture and prompt, as the first line of each file has it."""
        if self.settings_line is None:
            depends_on = {
                "weights": fingerprint(self.model.lvlm),
                "config": config_digest(self.model),
                "max_answer_length": self.max_answer_length,
                "top_k": self.top_k,
                "processor": processor_digest(self.processor),
            }
            self.settings_line = json.dumps(depends_on)
        return self.settings_line

    def key(self, row: Mapping[str, Any]) -> str:
        """Equal for the same pictures, whatever their `image_id`, and the same prompt."""
        digest = hashlib.sha256(repr(row["prompt"]).encode())
        for image in map(stored_picture, images_of(row)):
            if isinstance(image, Image.Image):
                digest.update(repr(image.size).encode() + to_rgb(image).tobytes())
            elif isinstance(image, bytes):
                digest.update(hashlib.sha256(image).digest())
            else:
                digest.update(self.digest_of_file(image))
        return digest.hexdigest()

    def digest_of_file(self, path: str) -> bytes:
        """Of its bytes; each file is read once."""
        if path not in self.pictures:
            with open(path, "rb") as file:
                self.pictures[path] = hashlib.file_digest(file, "sha256").digest()
        return self.pictures[path]

    def found(self, keys: Sequence[str]) -> dict[str, UnprunedAnswer | None]:
        """The answers that are kept, by their keys."""
        found = {key: self.find(key) for key in keys}
        if None in found.values():
            self.read_new_lines()
            found.update({key: self.find(key) for key, answer in found.items() if answer is None})
        return found

    def find(self, key: str) -> UnprunedAnswer | None:
        """The answer in memory, or in a line whose place is known."""
        if key in self.in_memory:
            return self.in_memory[key]
        if key not in self.places:
            return None
        path, place = self.places[key]
        with path.open("rb") as file:
            file.seek(place)
            try:
                return UnprunedAnswer.from_json(json.loads(file.readline().partition(b" ")[2]))
            except json.JSONDecodeError:  # a half line and the one behind it
                return None

    def read_new_lines(self) -> None:
        """Notes where the answers lie that this and other processes have written since. A half line is left alone."""
        if self.directory is None:
            return
        for path in sorted(self.directory.glob("*.jsonl")):
            with path.open("rb") as file:
                start = self.read_until.get(path, 0)
                file.seek(start)
                for line in file:
                    if not line.endswith(b"\n") or (start == 0 and line[:-1].decode() != self.settings):
                        break
                    if start > 0:
                        self.places[line[:64].decode()] = path, start
                    start += len(line)
                self.read_until[path] = start

    def add(self, keys: Sequence[str], answers: Sequence[UnprunedAnswer]) -> None:
        """Keeps answers."""
        if self.directory is None:
            self.in_memory.update(zip(keys, answers, strict=True))
            return
        head = ""
        if self.own_file is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.own_file, head = self.directory / f"{secrets.token_hex(8)}.jsonl", f"{self.settings}\n"
        lines = [f"{key} {json.dumps(one.to_json())}\n" for key, one in zip(keys, answers, strict=True)]
        path, self.own_file = self.own_file, None  # where writing fails, the next answers get a file of their own
        with path.open("a", encoding="utf-8") as file:
            file.write(head + "".join(lines))
        self.own_file = path
        self.read_new_lines()

    # ---- the LVLM ----

    @torch.no_grad()
    def generate(self, batch: AnswerBatch, index: Sequence[int]) -> list[UnprunedAnswer]:
        """Answers samples `index` greedily; those that come with their answers are read for the distributions."""
        known = {sample: ids for sample in index if (ids := self.known_ids(batch.rows[sample])) is not None}
        unknown = [sample for sample in index if sample not in known]
        self.num_generated += len(unknown)
        rows = max(1, MAX_LOGITS // (self.max_answer_length * self.model.get_output_embeddings().weight.shape[0]))
        found: dict[int, UnprunedAnswer] = {}
        for read, samples in ((self.answer_chunk, unknown), (functools.partial(self.read_chunk, known), [*known])):
            for start in range(0, len(samples), rows):
                found |= read(batch, samples[start : start + rows])
        return [found[sample] for sample in index]

    def answer_chunk(self, batch: AnswerBatch, index: list[int]) -> dict[int, UnprunedAnswer]:
        """Answers of samples `index`, with the distributions that they were chosen from."""
        prompts, ends = batch.prompts(index), end_ids(self.model, self.processor)
        length, stops = prompts["input_ids"].shape[1], self.model.generation_config.stop_strings
        with likeliest_tokens(self.model):
            output = self.model.generate(
                **prompts,
                keep_mask=self.keep_all(batch, index),
                max_new_tokens=self.max_answer_length,
                output_logits=True,
                tokenizer=self.processor.tokenizer,
                **GREEDY | {"return_dict_in_generate": True},
            )
        new, logits = output.sequences[:, length:].cpu(), torch.stack(output.logits, 1)
        lengths = answer_lengths(output.sequences, length, ends, self.processor.tokenizer, stops)
        ids = [row[:count] for row, count in zip(new, lengths, strict=True)]
        return {
            sample: self.as_answer(of_sample, row[: len(of_sample)])
            for sample, of_sample, row in zip(index, ids, logits, strict=True)
        }

    def read_chunk(self, ids: Mapping[int, Tensor], batch: AnswerBatch, index: list[int]) -> dict[int, UnprunedAnswer]:
        """The distributions along the answers `ids` of samples `index`, which were generated before."""
        answered = [replace(one, answer_ids=ids.get(sample)) for sample, one in enumerate(batch.samples)]
        batch = replace(batch, samples=answered)
        inputs, labels = answered_prompts(self.model, batch, index)
        logits, labels = answer_logits(self.model, inputs, labels, self.keep_all(batch, index))
        return {
            sample: self.as_answer(ids[sample], row[label_mask])
            for sample, row, label_mask in zip(index, logits, labels != -100, strict=True)
        }

    def as_answer(self, ids: Tensor, logits: Tensor) -> UnprunedAnswer:
        """The answer `ids [A]`, whose tokens have `logits [A, vocab]`."""
        top_ids, top_logprobs = top_tokens(logits.float(), self.top_k)
        text = self.processor.decode(ids, skip_special_tokens=True).strip()
        return UnprunedAnswer(text, ids, top_ids.cpu(), top_logprobs.cpu())

    def known_ids(self, row: Mapping[str, Any]) -> Tensor | None:
        """The answer that a row of demonstrations has, if it is of this LVLM."""
        saved = row.get(COLUMN)
        return None if saved is None or saved["settings"] != self.settings else torch.tensor(saved["ids"])

    def keep_all(self, batch: AnswerBatch, index: Sequence[int]) -> Tensor:
        """A keep mask of all visual tokens of samples `index`, `bool [V]`."""
        valid = batch.inputs.valid[list(index)]
        return valid[valid]
