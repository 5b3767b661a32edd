"""Box accuracy at IoU 0.5, as an `evaluate.Metric`: `evaluate.load` takes the path of this file, without a network."""

import datasets
import evaluate

from tprl_hf.answer_rules import box_iou

DESCRIPTION = """Share of boxes whose intersection over union with the reference is at least 0.5 (RefCOCO)."""
KWARGS = """
Args:
    predictions, references (list of list of float): Boxes (x0, y0, x1, y1).
Returns:
    iou_at_50 (float): The share, in [0, 1].
    mean_iou (float): Mean intersection over union.
"""
CITATION = """Yu et al., Modeling Context in Referring Expressions, ECCV 2016, arXiv 1608.00272"""


class IoUAt50(evaluate.Metric):
    __doc__ = f"{DESCRIPTION}\n{KWARGS}"

    def _info(self):
        box = datasets.Sequence(datasets.Value("float64"), length=4)
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=KWARGS,
            features=datasets.Features({"predictions": box, "references": box}),
        )

    def _compute(self, predictions, references):
        ious = [box_iou(first, second) for first, second in zip(predictions, references, strict=True)]
        return {"iou_at_50": sum(iou >= 0.5 for iou in ious) / len(ious), "mean_iou": sum(ious) / len(ious)}
