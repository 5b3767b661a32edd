"""VQA accuracy, as an `evaluate.Metric`: `evaluate.load` takes the path of this file, without a network."""

import evaluate

from tprl_hf.evaluation.metric_features import ANSWER_FEATURES
from tprl_hf.evaluation.scores import vqa_score

DESCRIPTION = (
    """VQAv2's accuracy: normalised texts, and min(1, n / 3) for n of the other nine people who gave the answer."""
)
KWARGS = """
Args:
    predictions (list of str): Answers.
    references (list of str, or list of list of str): For each answer what is right.
Returns:
    vqa_accuracy (float): Mean over the answers, in [0, 1].
"""
CITATION = """Antol et al., VQA: Visual Question Answering, ICCV 2015, arXiv 1505.00468"""


class VQAAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=KWARGS,
            features=ANSWER_FEATURES,
        )

    def _compute(self, predictions, references):
        scores = [vqa_score(answer, right) for answer, right in zip(predictions, references, strict=True)]
        return {"vqa_accuracy": sum(scores) / len(scores)}
