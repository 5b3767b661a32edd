"""Exact match, as an `evaluate.Metric`: `evaluate.load` takes the path of this file, without a network."""

import evaluate

from tprl_hf.evaluation.metric_features import ANSWER_FEATURES
from tprl_hf.evaluation.scores import exact_score

DESCRIPTION = """Share of answers that equal a reference, letter case and a closing full stop aside."""
KWARGS = """
Args:
    predictions (list of str): Answers.
    references (list of str, or list of list of str): For each answer what is right.
Returns:
    exact_match (float): Mean over the answers, in [0, 1].
"""
CITATION = """"""


class ExactMatchAnswer(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=KWARGS,
            features=ANSWER_FEATURES,
        )

    def _compute(self, predictions, references):
        scores = [exact_score(answer, right) for answer, right in zip(predictions, references, strict=True)]
        return {"exact_match": sum(scores) / len(scores)}
