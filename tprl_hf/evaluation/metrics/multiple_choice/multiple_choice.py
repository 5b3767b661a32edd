"""Multiple choice, as an `evaluate.Metric`: `evaluate.load` takes the path of this file, without a network."""

from tprl_hf.answer_rules import choice_score
from tprl_hf.evaluation import answer_metric


class MultipleChoice(answer_metric.AnswerMetric):
    score = staticmethod(choice_score)
    result = "multiple_choice"
    about = "Share of answers that name the letter of the correct option, much as ScienceQA's evaluation reads them."
    source = "Lu et al., Learn to Explain (ScienceQA), NeurIPS 2022, arXiv 2209.09513"
