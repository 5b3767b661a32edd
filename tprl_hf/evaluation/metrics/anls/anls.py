"""ANLS, as an `evaluate.Metric`: `evaluate.load` takes the path of this file, without a network."""

import evaluate

from tprl_hf.evaluation.metric_features import ANSWER_FEATURES
from tprl_hf.evaluation.scores import anls_score

DESCRIPTION = (
    """Average normalised Levenshtein similarity, each below 0.5 counted as 0 (DocVQA, InfographicVQA, ST-VQA)."""
)
KWARGS = """
Args:
    predictions (list of str): Answers.
    references (list of str, or list of list of str): For each answer what is right.
Returns:
    anls (float): Mean over the answers, in [0, 1].
"""
CITATION = """Biten et al., Scene Text Visual Question Answering, ICCV 2019, arXiv 1905.13648"""


class ANLS(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=KWARGS,
            features=ANSWER_FEATURES,
        )

    def _compute(self, predictions, references):
        scores = [anls_score(answer, right) for answer, right in zip(predictions, references, strict=True)]
        return {"anls": sum(scores) / len(scores)}
