"""POPE, as an `evaluate.Metric`: `evaluate.load` takes the path of this file, without a network."""

import datasets
import evaluate

from tprl_hf.answer_rules import expects_yes, says_yes

DESCRIPTION = (
    """Object hallucination: yes-no questions about what is in the image, with "yes" as the positive class."""
)
KWARGS = """
Args:
    predictions (list of str): Answers; one with "no" or "not" in its first sentence is a no, all others are a yes.
    references (list of str): "yes" or "no".
Returns:
    accuracy, precision, recall, f1, yes_ratio (float): In [0, 1]; 0 where nothing is there to divide by.
"""
CITATION = (
    """Li et al., Evaluating Object Hallucination in Large Vision-Language Models, EMNLP 2023, arXiv 2305.10355"""
)


class POPE(evaluate.Metric):
    __doc__ = f"{DESCRIPTION}\n{KWARGS}"

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=KWARGS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        said = [says_yes(answer) for answer in predictions]
        true = [expects_yes(reference) for reference in references]
        hits = sum(yes and expected for yes, expected in zip(said, true, strict=True))
        precision = hits / sum(said) if any(said) else 0.0
        recall = hits / sum(true) if any(true) else 0.0
        return {
            "accuracy": sum(yes == expected for yes, expected in zip(said, true, strict=True)) / len(said),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
            "yes_ratio": sum(said) / len(said),
        }
