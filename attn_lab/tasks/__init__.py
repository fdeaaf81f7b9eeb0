"""Synthetic tasks: pure, jit-able generators of batches, and their metrics."""

from attn_lab.tasks.metrics import accuracy, cross_entropy
from attn_lab.tasks.mqar import mqar, mqar_assemble, mqar_slot_probabilities

__all__ = [
    "accuracy",
    "cross_entropy",
    "mqar",
    "mqar_assemble",
    "mqar_slot_probabilities",
]
