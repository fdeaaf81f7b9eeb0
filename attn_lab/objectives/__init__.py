"""What is trained and tuned."""

from attn_lab.objectives.distillation import attention_distillation
from attn_lab.objectives.lookup import lookup_penalty
from attn_lab.objectives.states import expand_initial_state, initial_state_params

__all__ = [
    "attention_distillation",
    "expand_initial_state",
    "initial_state_params",
    "lookup_penalty",
]
