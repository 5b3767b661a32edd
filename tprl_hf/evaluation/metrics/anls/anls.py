"""ANLS, as an `evaluate.Metric`: `evaluate.load` takes the path of this file, without a network."""

from tprl_hf.answer_rules import anls_score
from tprl_hf.evaluation import answer_metric


class ANLS(answer_metric.AnswerMetric):
    score = staticmethod(anls_score)
    result = "anls"
    about = "Average normalised Levenshtein similarity, each below 0.5 counted as 0 (DocVQA, InfographicVQA, ST-VQA)."
    source = "Biten et al., Scene Text Visual Question Answering, ICCV 2019, arXiv 1905.13648"
