"""Attention research in JAX: mechanisms as pure functions, modules, models, tasks and training."""
