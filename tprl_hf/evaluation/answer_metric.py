"""What our metrics for free answers share, in the terms of `evaluate`: the mean of a score over the answers."""

from typing import Any, ClassVar

import datasets
import evaluate

_TEXT = datasets.Value("string")

# For each answer one reference, or a list of them.
ANSWER_FEATURES = [
    datasets.Features({"predictions": _TEXT, "references": datasets.Sequence(_TEXT)}),
    datasets.Features({"predictions": _TEXT, "references": _TEXT}),
]

INPUTS = """
Args:
    predictions (list of str): Answers.
    references (list of str, or list of list of str): The reference or references of each answer.
Returns:
    {result} (float): Mean over the answers, in [0, 1].
"""


class AnswerMetric(evaluate.Metric):
    """
    Base of a metric whose value is a mean over the answers. A subclass says which score.

    `evaluate.load` takes the first metric that a file names, so such a file imports this module, not this class.
    """

    result: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str] = ""

    def __init_subclass__(cls, **arguments):
        super().__init_subclass__(**arguments)
        cls.__doc__ = f"{cls.about}\n{INPUTS.format(result=cls.result)}"  # for `help`

    @staticmethod
    def score(answer: str, reference: Any, /) -> float:
        """How correct an answer is, in [0, 1]; `reference` is one, or several."""
        raise NotImplementedError

    def _info(self):
        return evaluate.MetricInfo(
            description=self.about,
            citation=self.source,
            inputs_description=INPUTS.format(result=self.result),
            features=ANSWER_FEATURES,
        )

    def _compute(self, predictions, references):
        scores = [self.score(answer, reference) for answer, reference in zip(predictions, references, strict=True)]
        return {self.result: sum(scores) / len(scores)}
