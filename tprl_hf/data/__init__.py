"""Data: Mosaic-VQA, generated; easy-VQA, read from its package. Both in the one sample format of `samples.py`."""

from .easy import easy_vqa
from .mosaic import QUESTION_TYPES, mosaic_vqa
from .samples import SAMPLE_FEATURES

__all__ = ["QUESTION_TYPES", "SAMPLE_FEATURES", "easy_vqa", "mosaic_vqa"]
