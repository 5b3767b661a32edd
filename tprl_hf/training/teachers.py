"""Teachers that know the reference answer, and so can demonstrate better than any pruner; for training only."""

import torch
from torch import Tensor

from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.pictures import images_of
from tprl_hf.pruners.oracle import OraclePruner

from .answer_batches import AnswerBatch, open_images
from .answer_scores import gradient_saliency, score_answers


class AnswerTeacher:
    """Says which tokens the frozen LVLM needs for the reference answer."""

    reads_answers = True

    def score(self, model: TPRLForConditionalGeneration, batch: AnswerBatch, keep_mask: Tensor) -> Tensor:
        """How much each token of `keep_mask [B, N]` matters, float `[B, N]`; higher is kept."""
        raise NotImplementedError(f"{type(self).__name__} must define `score`.")


class GradientTeacher(AnswerTeacher):
    """`|d log p(answer) / dv . v|`: one backward pass for each sample."""

    def score(self, model: TPRLForConditionalGeneration, batch: AnswerBatch, keep_mask: Tensor) -> Tensor:
        return gradient_saliency(model, batch, keep_mask)


class LeaveOutTeacher(AnswerTeacher):
    """How far the answer's log-probability falls when a token and its neighbours are removed.

    One forward pass for each group of tokens: slow, but without the gradient's blindness to what saturates.

    Args:
        group_size (`int`, defaults to 4): neighbouring tokens, in their order, that are left out together.
        batch_size (`int`, defaults to 64): masks that run through the LLM together.
    """

    def __init__(self, group_size: int = 4, batch_size: int = 64):
        if group_size < 1:
            raise ValueError(f"group_size is at least 1; got {group_size}.")
        self.group_size = group_size
        self.batch_size = batch_size

    def score(self, model: TPRLForConditionalGeneration, batch: AnswerBatch, keep_mask: Tensor) -> Tensor:
        group = keep_mask.cumsum(1).sub(1).clamp(min=0) // self.group_size  # (B, N)
        masks, sample_index, groups = [], [], []
        for sample, kept in enumerate(keep_mask):
            for index in range(int(group[sample].max()) + 1):
                masks.append(kept & (group[sample] != index))
                sample_index.append(sample)
                groups.append(index)
        whole = score_answers(model, batch, keep_mask, list(range(len(batch))), self.batch_size).logprobs
        rest = score_answers(model, batch, torch.stack(masks), sample_index, self.batch_size).logprobs
        scores = torch.zeros(keep_mask.shape, device=keep_mask.device)
        for sample, index, logprob in zip(sample_index, groups, rest, strict=True):
            scores[sample][group[sample] == index] = whole[sample] - logprob
        return scores


class BoxTeacher(AnswerTeacher):
    """Tokens on the boxes that the question is about, by how much of them is covered, then an even grid; without a box
    the even grid. It needs no pass through the LLM, but data with `boxes`, and a tower that sees the image as a whole.
    """

    reads_answers = False

    def score(self, model: TPRLForConditionalGeneration, batch: AnswerBatch, keep_mask: Tensor) -> Tensor:
        boxes, sizes = [], []
        for row in batch.rows:
            if row.get("boxes") is None:
                raise ValueError(
                    f"The boxes teacher got a row without `boxes`, only {', '.join(row)}: give each row a list of "
                    "(x0, y0, x1, y1) in pixels of its first image, empty where the question is about no place."
                )
            boxes.append(row["boxes"])
            pictures = open_images(images_of(row)[:1])
            sizes.append(pictures[0].size if pictures else (1, 1))
        return OraclePruner(boxes, sizes).score(batch.inputs)
