"""Metrics of the public benchmarks, one folder each, for use in-process and through `evaluate.load`."""

from .anls.anls import ANLS
from .exact_match_answer.exact_match_answer import ExactMatchAnswer
from .iou_at_50.iou_at_50 import IoUAt50
from .multiple_choice.multiple_choice import MultipleChoice
from .pope.pope import POPE
from .relaxed_accuracy.relaxed_accuracy import RelaxedAccuracy
from .vqa_accuracy.vqa_accuracy import VQAAccuracy

__all__ = ["ANLS", "POPE", "ExactMatchAnswer", "IoUAt50", "MultipleChoice", "RelaxedAccuracy", "VQAAccuracy"]
