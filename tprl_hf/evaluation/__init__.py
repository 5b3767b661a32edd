"""Accuracy and time of pruned models, always beside the unpruned one."""
