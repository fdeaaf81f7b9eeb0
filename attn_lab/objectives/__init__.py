"""What is trained and tuned."""

from attn_lab.objectives.states import expand_initial_state, initial_state_params

__all__ = ["expand_initial_state", "initial_state_params"]
