"""VQA accuracy, as an `evaluate.Metric`: `evaluate.load` takes the path of this file, without a network."""

from tprl_hf.answer_rules import vqa_score
from tprl_hf.evaluation import answer_metric


class VQAAccuracy(answer_metric.AnswerMetric):
    score = staticmethod(vqa_score)
    result = "vqa_accuracy"
    about = "VQAv2's accuracy: normalised texts, and min(1, n / 3) for n of the other nine people who gave the answer."
    source = "Antol et al., VQA: Visual Question Answering, ICCV 2015, arXiv 1505.00468"
