"""Relaxed accuracy, as an `evaluate.Metric`: `evaluate.load` takes the path of this file, without a network."""

import evaluate

from tprl_hf.evaluation.metric_features import ANSWER_FEATURES
from tprl_hf.evaluation.scores import relaxed_score

DESCRIPTION = """ChartQA's accuracy: numbers within 5 % of the reference are right, other answers must be equal."""
KWARGS = """
Args:
    predictions (list of str): Answers.
    references (list of str, or list of list of str): For each answer what is right.
Returns:
    relaxed_accuracy (float): Mean over the answers, in [0, 1].
"""
CITATION = """Masry et al., ChartQA, Findings of ACL 2022, arXiv 2203.10244"""


class RelaxedAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=KWARGS,
            features=ANSWER_FEATURES,
        )

    def _compute(self, predictions, references):
        scores = [relaxed_score(answer, right) for answer, right in zip(predictions, references, strict=True)]
        return {"relaxed_accuracy": sum(scores) / len(scores)}
