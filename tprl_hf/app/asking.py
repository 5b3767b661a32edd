"""What the page computes: answers, masks and times of one model, for one person after the other. Knows no gradio."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tprl_hf.costs import budget_in_use
from tprl_hf.evaluation.answers import chat_inputs
from tprl_hf.evaluation.benchmark import PrefillTime, measure_prefill
from tprl_hf.evaluation.trajectory import TrajectoryStep, trajectory_of
from tprl_hf.loading import unknown_words_note
from tprl_hf.modeling.budget import Budget, keep_counts
from tprl_hf.modeling.generation_tprl import GREEDY
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.outputs_tprl import PrunePlan
from tprl_hf.modeling.token_pruner import SetPruner, TokenPruner
from tprl_hf.modeling.visual_features import VisualFeatures
from tprl_hf.pictures import open_picture
from tprl_hf.pruners import DEFAULT_PRUNER, PRUNERS, UniformPruner
from tprl_hf.pruners.by_name import make_pruner, own_pruner
from tprl_hf.videos import Video, is_container, is_video, open_video
from tprl_hf.visualization import Figure, Panel, figures_by_block, seen_frames, seen_pictures

MAX_QUESTION = 1000  # characters
SMALLEST_SHARE = 18  # of the visual tokens at least one in so many is kept
ROUNDS = 3  # of each timed call, after one to warm up

Message = dict[str, Any]
Shown = Image.Image | Video  # what is asked about


class Refusal(ValueError):
    """What cannot be answered, in a sentence for the person who asked."""


@dataclass(frozen=True)
class Reply:
    """
    What the model says with the tokens that one pruner keeps, or with all of them.

    Args:
        pruner (`str`): Its name; "none" for all tokens.
        answer (`str`): Without special tokens.
        num_kept, num_visual (`int`): Visual tokens that the LLM read, and that there are.
        num_read (`int`): All tokens that the LLM read before its first word: the text and the kept visual tokens.
        kept (`Tensor`): The keep mask `[N]`, without separators, which have no place in a picture.
        figures (`list[Figure]`): One for each grid of tokens, over what the vision tower saw. Each has one panel with
            the keep mask, and with what the choice followed, where there is such a thing.
        meaning (`str`): What the panel's scores are: "probability", "score" in the pruner's own scale, or "" for
            pruners that choose tokens together and score none.
        time (`PrefillTime`, *optional*): Until the first word: medians of `ROUNDS` rounds.
    """

    pruner: str
    answer: str
    num_kept: int
    num_visual: int
    num_read: int
    kept: Tensor
    figures: list[Figure]
    meaning: str = ""
    time: PrefillTime | None = None


@dataclass(frozen=True)
class Answered:
    """
    One question under all chosen pruners.

    Args:
        question (`str`): As it was asked.
        replies (`list[Reply]`): The unpruned model first.
        note (`str`, *optional*): What to know about the question, such as words that the model cannot read.
    """

    question: str
    replies: list[Reply]
    note: str | None = None


class Asked:
    """
    A conversation as the model reads it. The vision tower runs once for all pruners that do not read its attention,
    and once for all that do.

    Args:
        model ([`TPRLForConditionalGeneration`]): The model.
        inputs (`Mapping`): What the processor made of the conversation.
    """

    def __init__(self, model: TPRLForConditionalGeneration, inputs: Mapping[str, Any]):
        self.model, self.inputs = model, inputs
        self.encoded: dict[bool, VisualFeatures] = {}

    @torch.no_grad()
    def features(self, with_attention: bool) -> VisualFeatures:
        """What the tower made of its pictures; with the attention that each token received there."""
        if with_attention not in self.encoded:
            self.encoded[with_attention] = self.model.encode_images(**self.inputs, with_attention=with_attention)
        return self.encoded[with_attention]


class Asker:
    """
    One model that answers one request at a time, whoever asks. It keeps nothing of a request.

    Args:
        model ([`TPRLForConditionalGeneration`]):
            In evaluation mode.
        processor ([`ProcessorMixin`]):
            Its processor.
        name (`str`):
            What people call the model; of a directory the last part.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Length of the longest answer.
    """

    def __init__(self, model: TPRLForConditionalGeneration, processor: Any, name: str, max_new_tokens: int = 64):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.name = Path(name).resolve().name if Path(name).is_dir() else name
        # times of one request are not those of another one beside it
        self.lock = threading.Lock()
        self.pruners = self._usable_pruners()
        self.why_no_videos = self._why_no_videos()

    def read(self, file: str | Path | None) -> Shown:
        """
        A picture that somebody sent, upright and in RGB, or the frames of a short video. Models that read no videos
        get the first frame of an animated picture.

        Raises:
            `Refusal`: Where there is no file, and for a video that the model does not read.
            `PictureError`: For a file that is neither, is damaged, or too large; its message says which.
        """
        if file is None:
            raise Refusal("Choose a picture first: upload one, or take an example.")
        if self.why_no_videos is None and is_video(file):
            return open_video(file)
        if is_container(file):
            raise Refusal(f"{self.name} does not read videos ({self.why_no_videos}): upload a picture.")
        return open_picture(file, "The picture")

    def describe(self) -> str:
        """Size, place and number format of the model, in a line."""
        count = sum(parameter.numel() for parameter in self.model.lvlm.parameters())
        size = f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
        return f"{size} parameters, {str(self.model.dtype).removeprefix('torch.')}, on {self.model.device.type}"

    def default_pruner(self) -> str:
        """The checkpoint's own, or the usual one where it has none."""
        own = own_pruner(self.model)
        return own if own in self.pruners else DEFAULT_PRUNER

    def default_keep(self, num_visual: int) -> int:
        """How many of a picture's tokens the checkpoint would keep; a third where it does not say."""
        budget = budget_in_use({}, self.model.pruner.budget, self.model.config)
        if budget is None or budget.threshold is not None:
            budget = Budget(keep_ratio=1 / 3)
        wanted = int(keep_counts(torch.tensor([num_visual]), budget))
        return min(max(wanted, fewest(num_visual)), num_visual)

    def has_policy(self) -> bool:
        """Whether there are steps to look at: a trained policy."""
        return "learned" in self.pruners

    def count_visual(self, shown: Shown) -> int:
        """Visual tokens that the LLM reads of a picture or video without pruning."""
        return self._num_visual(self._inputs([user_turn(shown, "?")]))

    def ask(self, shown: Shown, question: str, pruners: Sequence[str], num_keep: int) -> Answered:
        """
        One question under several pruners, with the times until the first word.

        Args:
            shown (`PIL.Image.Image` or [`Video`]): In RGB, see [`Asker.read`].
            question (`str`): The text.
            pruners (`Sequence[str]`): Names out of `self.pruners`.
            num_keep (`int`): Visual tokens to keep; more than there are is all.

        Raises:
            `Refusal`: For a question without words or too long, and for no pruner or an unknown one.
        """
        if not pruners:
            raise Refusal("Choose at least one pruner.")
        methods = {name: self._method(name) for name in pruners}
        with self.lock:
            asked = self._encoded([user_turn(shown, question)])
            replies = [self._reply(shown, asked, "none", None, None)]
            replies += [self._reply(shown, asked, name, method, num_keep) for name, method in methods.items()]
            times = self._times(asked.inputs, methods, min(num_keep, replies[0].num_visual))
        timed = [replace(reply, time=times[reply.pruner]) for reply in replies]
        return Answered(question, timed, unknown_words_note(self.processor, question))

    def two_questions(
        self, shown: Shown, questions: tuple[str, str], pruner: str, num_keep: int
    ) -> tuple[list[Answered], int]:
        """
        Two questions about one picture, under one pruner.

        Returns:
            `tuple`: What [`ask`] returns for each, without times, and how many visual tokens are kept for both.
        """
        method, found = self._method(pruner), []
        with self.lock:
            for question in questions:
                asked = self._encoded([user_turn(shown, question)])
                full = self._reply(shown, asked, "none", None, None)
                reply = self._reply(shown, asked, pruner, method, num_keep)
                found.append(Answered(question, [full, reply], unknown_words_note(self.processor, question)))
        first, second = (one.replies[1].kept for one in found)
        return found, int((first & second).sum())

    def say(
        self, shown: Shown, said: Sequence[tuple[str, str, str]], question: str, pruner: str, num_keep: int
    ) -> list[Reply]:
        """
        The next turn of a conversation, of which each model has its own answers in mind.

        Args:
            shown (`PIL.Image.Image` or [`Video`]): What the first turn is about.
            said (`Sequence[tuple]`): Earlier turns: the question, the answer with all tokens, and the pruned answer.
            question (`str`): What is asked now.
            pruner, num_keep: As for [`ask`]. Tokens are chosen anew in each turn, for its question.

        Returns:
            `list[Reply]`: Unpruned and pruned.

        Raises:
            `Refusal`: As for [`ask`], and for a conversation that is longer than the model can read.
        """
        method = self._method(pruner)
        with self.lock:
            found = []
            for number, (name, one, keep) in enumerate((("none", None, None), (pruner, method, num_keep))):
                turns = [(asked, *answers) for asked, *answers in said]
                earlier = [(turn[0], turn[1 + number]) for turn in turns]
                asked_now = self._encoded(conversation(shown, earlier, question))
                found.append(self._reply(shown, asked_now, name, one, keep))
        return found

    def steps(
        self, shown: Shown, question: str, num_keep: int, num_steps: int
    ) -> tuple[list[TrajectoryStep], list[Figure]]:
        """
        What the policy keeps after each of its steps.

        Returns:
            `tuple`: The states from 0 (nothing pruned) to `num_steps`, and a figure for each grid of tokens, with a
            panel for each state.

        Raises:
            `Refusal`: As for [`ask`], and for a model without a trained policy.
        """
        if not self.has_policy():
            raise Refusal("This model has no trained policy, so there are no steps to look at.")
        with self.lock:
            messages = [user_turn(shown, question)]
            inputs = self._inputs(messages)
            budget = Budget(num_keep=min(num_keep, self._num_visual(inputs)))
            sample = sample_of(messages)
            steps = trajectory_of(self.model, self.processor, sample, budget, num_steps, self.max_new_tokens)
            plan = self.model.prune(**inputs, keep_mask=steps[-1].keep_mask)
            panels = [Panel("", "", step.keep_mask, step.probs) for step in steps]
            return steps, self._figures(shown, inputs, plan, panels)

    # ---- parts ----

    def _usable_pruners(self) -> list[str]:
        """The names of those that work with this model: the policy first, if it is trained."""
        inputs = self._inputs([user_turn(Image.new("RGB", (64, 64), "white"), "?")])
        names = []
        for name in ("learned", *PRUNERS):
            if name == "none":
                continue
            try:
                with self._using(self._method_of(name)):
                    self.model.prune(**inputs, num_keep=1)
            except ValueError:  # which says why not; `tprl compare` prints it
                continue
            names.append(name)
        return names

    def _why_no_videos(self) -> str | None:
        """Why a video does not go the whole way, through processor, model and drawing; `None` where it does."""
        if not hasattr(self.processor, "video_processor"):
            return "its processor takes none"
        video = Video([Image.new("RGB", (64, 64), colour) for colour in ("white", "black")] * 2, fps=1)
        try:
            inputs = self._inputs([user_turn(video, "?")])
            with self.model.using(UniformPruner()):
                plan = self.model.prune(**inputs, num_keep=1)
            self._figures(video, inputs, plan, [Panel("", "", plan.keep_mask)])
        except Exception as error:  # processors, templates and towers say it in many ways
            return " ".join(str(error).split()).split(". ")[0]
        return None

    def _method_of(self, name: str) -> TokenPruner | None:
        return None if name == own_pruner(self.model) else make_pruner(self.model, name)

    def _method(self, name: str) -> TokenPruner | None:
        """A pruner for one request; `None` leaves the choice to the checkpoint."""
        if name not in self.pruners:
            raise Refusal(f"This model has no pruner {name!r}; choose from {', '.join(self.pruners)}.")
        return self._method_of(name)

    def _using(self, method: TokenPruner | None) -> AbstractContextManager:
        return nullcontext() if method is None else self.model.using(method)

    def _inputs(self, messages: list[Message]) -> Any:
        """What the processor makes of a conversation, whose pictures stand in its messages."""
        question = messages[-1]["content"][-1]["text"]
        if not question.strip():
            raise Refusal("Write a question first.")
        if len(question) > MAX_QUESTION:
            raise Refusal(f"The question has {len(question):,} characters; at most {MAX_QUESTION:,} are read.")
        inputs = chat_inputs(self.processor, [sample_of(messages)], self.model.device)
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1]
        if longest is not None and length + self.max_new_tokens > longest:
            most = longest - self.max_new_tokens
            raise Refusal(
                f"With what is shown this is {length:,} tokens, and the model reads {most:,}. "
                "Shorten the question, shrink what is shown, or begin a new conversation."
            )
        return inputs

    def _num_visual(self, inputs: Any) -> int:
        return int(self.model.adapter.find_visual(inputs["input_ids"]).sum())

    def _encoded(self, messages: list[Message]) -> "Asked":
        return Asked(self.model, self._inputs(messages))

    def _reply(
        self, shown: Shown, asked: "Asked", name: str, method: TokenPruner | None, num_keep: int | None
    ) -> Reply:
        inputs = asked.inputs
        length, num_visual = inputs["input_ids"].shape[1], self._num_visual(inputs)
        with self._using(method):
            features = asked.features(num_keep is not None and self.model.pruner.needs_attention)
            arguments = {**inputs, **budget_of(num_keep, num_visual), "visual_features": features}
            plan = self.model.prune(**arguments)
            sequences = self.model.generate(
                **arguments,
                **GREEDY,
                max_new_tokens=self.max_new_tokens,
                tokenizer=self.processor.tokenizer,
            )
            meaning, values = ("", None) if num_keep is None else self._what_it_followed(name, asked, plan)
        answer = self.processor.decode(sequences[0, length:], skip_special_tokens=True).strip()
        num_kept = int(plan.num_kept)
        kept = plan.keep_mask[~plan.layout.protected.to(plan.keep_mask.device)]
        figures = self._figures(shown, inputs, plan, [Panel(name, "", plan.keep_mask, values)])
        return Reply(name, answer, num_kept, num_visual, length - num_visual + num_kept, kept, figures, meaning)

    def _what_it_followed(self, name: str, asked: "Asked", plan: PrunePlan) -> tuple[str, Tensor | None]:
        """What the scores are, and the scores `[V]`: of the policy the probability that it last gave each token."""
        pruner = self.model.pruner
        if isinstance(pruner, SetPruner):
            return "", None
        if name != "learned":
            return "score", plan.scores
        seen = self.model.pruning_inputs(**asked.inputs, visual_features=asked.features(False), with_attention=False)
        probabilities, left = torch.zeros_like(plan.scores), torch.ones_like(plan.keep_mask)
        with torch.no_grad():
            policy = self.model.learned_pruner()
            for step, (keep_mask, scores) in enumerate(policy.trajectory(seen, Budget(num_keep=int(plan.num_kept)))):
                probabilities = torch.where(left, scores[0] - step, probabilities)
                left = keep_mask[0]
        return "probability", probabilities

    def _figures(self, shown: Shown, inputs: Any, plan: PrunePlan, panels: list[Panel]) -> list[Figure]:
        if isinstance(shown, Image.Image):
            return figures_by_block(seen_pictures([shown], self.processor, inputs, plan.layout), plan.layout, panels)
        seen = seen_frames(shown.frames, self.processor, inputs, plan.layout)
        figures = figures_by_block(seen, plan.layout, panels)
        titles = frame_titles(len(shown.frames), len(figures))
        return [replace(figure, title=title) for figure, title in zip(figures, titles, strict=True)]

    def _times(self, inputs: Any, methods: Mapping[str, TokenPruner | None], num_keep: int) -> dict[str, PrefillTime]:
        def call(method: TokenPruner | None, budget: dict[str, Any]) -> Callable[[], Any]:
            def forward() -> Any:
                with self._using(method):
                    return self.model(**inputs, **budget, logits_to_keep=1)

            return forward

        budget = budget_of(num_keep, self._num_visual(inputs))
        calls = {"none": call(None, {"prune": False})}
        calls |= {name: call(method, budget) for name, method in methods.items()}
        return measure_prefill(self.model.lvlm.get_decoder(), calls, ROUNDS, warmup=1)


def fewest(num_visual: int) -> int:
    """The smallest number of tokens to keep that can be chosen."""
    return max(1, round(num_visual / SMALLEST_SHARE))


def budget_of(num_keep: int | None, num_visual: int) -> dict[str, Any]:
    """As `generate` takes it; `None` keeps all."""
    return {"prune": False} if num_keep is None else {"num_keep": min(num_keep, num_visual)}


def user_turn(shown: Shown, question: str) -> Message:
    """A question about a picture or video, as a chat message."""
    kind = "image" if isinstance(shown, Image.Image) else "video"
    return {"role": "user", "content": [{"type": kind, kind: shown}, {"type": "text", "text": question}]}


def sample_of(messages: list[Message]) -> dict[str, Any]:
    """A sample as [`~tprl_hf.evaluation.answers.chat_inputs`] takes it, with what its messages show."""
    parts = [part for message in messages for part in message["content"]]
    images, videos = ([part[kind] for part in parts if part["type"] == kind] for kind in ("image", "video"))
    return {"images": images, "videos": videos, "prompt": messages}


def conversation(shown: Shown, earlier: Sequence[tuple[str, str]], question: str) -> list[Message]:
    """Chat messages: the picture or video stands in the first one."""
    messages: list[Message] = []
    for asked, answer in earlier:
        messages.append({"role": "user", "content": [{"type": "text", "text": asked}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
    messages[0] = user_turn(shown, messages[0]["content"][0]["text"])
    return messages


def frame_titles(num_frames: int, num_grids: int) -> list[str]:
    """
    Which frames each grid of tokens stands for.

    Example:

    ```python
    >>> frame_titles(3, 3), frame_titles(5, 3)
    (['frame 1 of 3', 'frame 2 of 3', 'frame 3 of 3'], ['frames 1 and 2 of 5', 'frames 3 and 4 of 5', 'frame 5 of 5'])
    ```
    """
    shared, titles = math.ceil(num_frames / num_grids), []
    for first in range(1, num_frames + 1, shared):
        last = min(first + shared - 1, num_frames)
        between = "" if last == first else f"{' and ' if last == first + 1 else ' to '}{last}"
        titles.append(f"frame{'s' * (last > first)} {first}{between} of {num_frames}")
    return titles
