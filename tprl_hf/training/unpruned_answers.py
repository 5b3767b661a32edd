"""Training without labels: the reference is what the frozen LVLM itself answers when it sees all visual tokens."""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration

from .answer_batches import AnswerBatch, EncodedSample, end_ids, images_of
from .answer_scores import answer_logits, answered_prompts
from .divergence import UnprunedAnswer, top_tokens
from .fingerprint import fingerprint

OWN_ANSWER_SCORES = ("agreement", "kl")  # those that read no label
COLUMN = "unpruned_answer"  # of demonstrations
TOP_K = 32
MAX_LOGITS = 2**28  # of one pass, 1 GiB: with a vocabulary of 150,000, fourteen answers of 128 tokens


class UnprunedAnswers:
    """
    Gives samples the LVLM's own unpruned answers as their references. Each is generated greedily, once, and kept.

    Answers come from a sample's column `unpruned_answer`, from the files of `directory`, or from the LVLM. Processes
    and runs may share a directory: each writes a file of its own and reads those of all. Answers of another LVLM, of
    another length or to another picture or prompt are not taken.

    Args:
        model ([`TPRLForConditionalGeneration`]): its LVLM answers.
        processor: its processor.
        directory (`str` or `Path`, *optional*): where answers are kept. Without one, in memory.
        max_answer_length (`int`, defaults to 128): tokens of the longest answer; a longer one ends there.
        top_k (`int`, defaults to 32): next tokens whose probabilities are kept at each place of an answer.
        batch_size (`int`, defaults to 64): prompts that the LLM reads together.

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
    ):
        self.model = model
        self.processor = processor
        self.directory = None if directory is None else Path(directory)
        self.max_answer_length = max_answer_length
        self.top_k = top_k
        self.batch_size = batch_size
        self.num_generated = 0
        self.in_memory: dict[str, UnprunedAnswer] = {}
        self.places: dict[str, tuple[Path, int]] = {}  # of each answer, its file and the place of its line
        self.read_until: dict[Path, int] = {}
        self.own_file: Path | None = None
        self.pictures: dict[str, str] = {}  # digests of files
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
        keys = [self.key(row, sample) for row, sample in zip(batch.rows, batch.samples, strict=True)]
        found = {key: self.find(key, row) for key, row in zip(keys, batch.rows, strict=True)}
        if None in found.values():
            self.read_new_lines()
            found.update({key: self.find(key) for key, answer in found.items() if answer is None})
        missing = [index for key, index in {key: i for i, key in enumerate(keys)}.items() if found[key] is None]
        for start in range(0, len(missing), self.batch_size):
            chunk = missing[start : start + self.batch_size]
            made = self.generate(batch, chunk)
            self.add([keys[index] for index in chunk], made)
            found.update(zip([keys[index] for index in chunk], made, strict=True))
        return [answer for key in keys if (answer := found[key]) is not None]

    # ---- what is kept ----

    @property
    def settings(self) -> str:
        """What answers depend on besides picture and prompt, as the first line of each file has it."""
        if self.settings_line is None:
            depends_on = {
                "weights": fingerprint(self.model.lvlm),
                "max_answer_length": self.max_answer_length,
                "top_k": self.top_k,
            }
            self.settings_line = json.dumps(depends_on)
        return self.settings_line

    def key(self, row: Mapping[str, Any], sample: EncodedSample) -> str:
        """Equal for the same pictures and the same tokens of the prompt."""
        digest = hashlib.sha256(sample.prompt_ids.numpy().tobytes())
        for image in images_of(row):
            if not isinstance(image, Mapping):
                digest.update(repr(image.size).encode() + image.tobytes())
            elif image["bytes"]:
                digest.update(image["bytes"])
            else:
                digest.update(self.digest_of_file(image["path"]).encode())
        return digest.hexdigest()

    def digest_of_file(self, path: str) -> str:
        if path not in self.pictures:
            with open(path, "rb") as file:
                self.pictures[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return self.pictures[path]

    def find(self, key: str, row: Mapping[str, Any] | None = None) -> UnprunedAnswer | None:
        """The answer that a row, the memory or a file that was read has."""
        saved = None if row is None else row.get(COLUMN)
        if saved is not None and saved["settings"] == self.settings:
            return UnprunedAnswer.from_json(saved)
        if key in self.in_memory:
            return self.in_memory[key]
        if key not in self.places:
            return None
        path, place = self.places[key]
        with path.open("rb") as file:
            file.seek(place)
            return UnprunedAnswer.from_json(json.loads(file.readline().partition(b" ")[2]))

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
        """Keeps answers that were generated."""
        self.num_generated += len(answers)
        if self.directory is None:
            self.in_memory.update(zip(keys, answers, strict=True))
            return
        head = ""
        if self.own_file is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.own_file, head = self.directory / f"{secrets.token_hex(8)}.jsonl", f"{self.settings}\n"
        lines = [f"{key} {json.dumps(one.to_json())}\n" for key, one in zip(keys, answers, strict=True)]
        with self.own_file.open("a", encoding="utf-8") as file:
            file.write(head + "".join(lines))
        self.read_new_lines()

    # ---- the LVLM ----

    @torch.no_grad()
    def generate(self, batch: AnswerBatch, index: Sequence[int]) -> list[UnprunedAnswer]:
        """Answers samples `index` greedily, and reads the answers once more for their distributions."""
        prompts, keep_all = batch.prompts(index), self.keep_all(batch, index)
        sequences = self.model.generate(
            **prompts, keep_mask=keep_all, max_new_tokens=self.max_answer_length, do_sample=False, num_beams=1
        )
        ends = end_ids(self.model, self.processor)
        ids = [until_end(row, ends) for row in sequences[:, prompts["input_ids"].shape[1] :].cpu()]
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        answered = list(batch.samples)
        for sample, answer_ids in zip(index, ids, strict=True):
            answered[sample] = replace(batch.samples[sample], answer_ids=answer_ids)
        batch = replace(batch, samples=answered)

        found: list[UnprunedAnswer] = []
        rows = max(1, MAX_LOGITS // (max(map(len, ids)) * self.model.get_output_embeddings().weight.shape[0]))
        for start in range(0, len(index), rows):
            chunk = list(index[start : start + rows])
            inputs, labels = answered_prompts(self.model, batch, chunk)
            logits, labels = answer_logits(self.model, inputs, labels, self.keep_all(batch, chunk))
            for row, label_mask in zip(logits, labels != -100, strict=True):
                top_ids, top_logprobs = top_tokens(row[label_mask], self.top_k)
                number = len(found)
                found.append(UnprunedAnswer(texts[number].strip(), ids[number], top_ids.cpu(), top_logprobs.cpu()))
        return found

    def keep_all(self, batch: AnswerBatch, index: Sequence[int]) -> Tensor:
        """A keep mask of all visual tokens of samples `index`, `bool [V]`."""
        valid = batch.inputs.valid[list(index)]
        return valid[valid]


def until_end(ids: Tensor, ends: Sequence[int]) -> Tensor:
    """`ids [A]` up to the first of `ends`, which belongs to them."""
    is_end = torch.isin(ids, torch.tensor(ends))
    return ids[: int(is_end.long().argmax()) + 1] if is_end.any() else ids
