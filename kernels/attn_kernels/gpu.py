"""When kernels are run on GPUs, and on which."""

import importlib.util

import jax

from attn_kernels.parallel import of_one_device

MULTIPROCESSORS = 132  # of an H100
NEEDED = (0, 11, 1)  # of JAX, which needs Python 3.12


def interpreted() -> bool:
    """Whether there is no GPU: an interpreter then runs the kernels, for tests."""
    return jax.default_backend() == "cpu"


def supported() -> bool:
    """Whether this JAX has what the kernels are written in."""
    return jax.version.__version_info__ >= NEEDED


def missing_triton() -> str | None:
    """Why Triton kernels cannot be run, None if they can."""
    for package in "triton", "jax_triton":
        if importlib.util.find_spec(package) is None:
            return f"it needs the package {package}"
    return None


def hopper() -> bool:
    """Whether kernels are for a Hopper GPU, as they are where there is none at all."""
    if jax.default_backend() != "gpu":
        return True
    return getattr(jax.local_devices()[0], "compute_capability", None) == "9.0"


def available() -> bool:
    """Whether kernels may be chosen: on a Hopper GPU, where the compiler has nothing to split."""
    return jax.default_backend() == "gpu" and supported() and hopper() and of_one_device()
