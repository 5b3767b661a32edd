"""Data: Mosaic-VQA and Photo-VQA, generated; easy-VQA, read from its package; your JSON Lines.

All are in the format of `samples.py`.
"""

from .easy import easy_vqa
from .jsonl import jsonl_samples
from .mosaic import QUESTION_TYPES, mosaic_vqa
from .photo import photo_vqa
from .samples import SAMPLE_FEATURES

__all__ = ["QUESTION_TYPES", "SAMPLE_FEATURES", "easy_vqa", "jsonl_samples", "mosaic_vqa", "photo_vqa"]
