"""Questions in, answers out: one road for every model that has a processor with a chat template."""

from collections.abc import Sequence
from typing import Any

import torch

from tprl_hf.modeling.generation_tprl import GREEDY
from tprl_hf.modeling.text_query import chat_messages, question_mask, special_tokens
from tprl_hf.pictures import images_of, name_of_picture, picture_of


def chat_inputs(processor, samples: Sequence[dict[str, Any]], device: torch.device | str = "cpu"):
    """
    Renders samples by the processor's chat template and turns them into one left-padded batch.

    Args:
        processor ([`ProcessorMixin`]):
            The model's processor.
        samples (`Sequence[dict]`):
            Each with `images` (a list of `PIL.Image.Image`, of paths, or of files as undecoded rows have them; may be
            empty), or one `image`, and `prompt` (the question as a string, or chat messages). Messages may hold
            videos, whose [`~tprl_hf.videos.Video`]s are then in `videos`.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the tensors go.

    Returns:
        `BatchFeature`: `input_ids` int64 [B, L], `attention_mask`, `query_mask` bool [B, L] (exactly the questions),
        and `pixel_values` where there is an image, `pixel_values_videos` of most families where there is a video.

    Raises:
        `ValueError`: If the processor has no chat template, and for pictures that cannot be read.
    """
    if not processor.chat_template:
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so the question cannot be put as the model was trained "
            "to read it. Save one beside the model (processor.chat_template = ...; processor.save_pretrained(...))."
        )
    chats = [chat_messages(sample["prompt"], len(images_of(sample))) for sample in samples]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    images = [[picture_of(image, name_of_picture(sample)) for image in images_of(sample)] for sample in samples]
    videos = [video for sample in samples for video in sample.get("videos") or ()]
    shown: dict[str, Any] = {"images": images if any(images) else None}
    if videos:
        shown["videos"] = [list(video.frames) for video in videos]
        shown["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": [video.metadata for video in videos]}
    shown |= special_tokens(processor, texts)
    inputs = processor(**shown, text=texts, padding=True, padding_side="left", return_tensors="pt")
    inputs.pop("labels", None)  # of PaliGemma's processor: a question has none, and losses need all logits
    inputs["query_mask"] = question_mask(processor, chats, inputs["input_ids"], inputs["attention_mask"])
    return inputs.to(device)


def generate_answers(
    model, processor, samples: Sequence[dict[str, Any]], batch_size: int = 32, **generate_kwargs: Any
) -> list[str]:
    """
    Answers each sample's question greedily.

    Args:
        model ([`TPRLForConditionalGeneration`]):
            The model, with whatever pruner it uses at the moment.
        processor ([`ProcessorMixin`]):
            Its processor.
        samples (`Sequence[dict]`):
            See [`chat_inputs`].
        batch_size (`int`, *optional*, defaults to 32):
            Samples that are answered at once. Answers do not depend on it beyond rounding.
        generate_kwargs:
            Handed to `model.generate`: `max_new_tokens`, `keep_ratio`, `prune`, ...

    Returns:
        `list[str]`: One answer a sample, without special tokens and surrounding blanks.
    """
    answers: list[str] = []
    for start in range(0, len(samples), batch_size):
        inputs = chat_inputs(processor, samples[start : start + batch_size], model.device)
        # generate() needs the tokenizer where the checkpoint has stop strings.
        sequences = model.generate(**inputs, tokenizer=processor.tokenizer, **GREEDY | generate_kwargs)
        new_tokens = sequences[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
    return answers
