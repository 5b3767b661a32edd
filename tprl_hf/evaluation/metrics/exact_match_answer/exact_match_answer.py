"""Exact match, as an `evaluate.Metric`: `evaluate.load` takes the path of this file, without a network."""

from tprl_hf.answer_rules import exact_score
from tprl_hf.evaluation import answer_metric


class ExactMatchAnswer(answer_metric.AnswerMetric):
    score = staticmethod(exact_score)
    result = "exact_match"
    about = "Share of answers that equal a reference, letter case and a closing full stop aside."
