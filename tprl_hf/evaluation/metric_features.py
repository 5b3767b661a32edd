"""What our metrics for free answers take, in the terms of `evaluate`."""

import datasets

_TEXT = datasets.Value("string")

# For each answer one reference, or a list of them.
ANSWER_FEATURES = [
    datasets.Features({"predictions": _TEXT, "references": datasets.Sequence(_TEXT)}),
    datasets.Features({"predictions": _TEXT, "references": _TEXT}),
]
