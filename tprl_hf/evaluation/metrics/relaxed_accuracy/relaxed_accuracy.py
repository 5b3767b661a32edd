"""Relaxed accuracy, as an `evaluate.Metric`: `evaluate.load` takes the path of this file, without a network."""

from tprl_hf.answer_rules import relaxed_score
from tprl_hf.evaluation import answer_metric


class RelaxedAccuracy(answer_metric.AnswerMetric):
    score = staticmethod(relaxed_score)
    result = "relaxed_accuracy"
    about = "ChartQA's accuracy: numbers within 5 % of the reference are correct, other answers must be equal."
    source = "Masry et al., ChartQA, Findings of ACL 2022, arXiv 2203.10244"
