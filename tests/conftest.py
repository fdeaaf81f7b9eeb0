import atexit
import itertools
import os
import shutil
import tempfile

import jax
import jaxlib
import pytest

# With libtpu, which compiles for TPUs that are not there, JAX would look for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cuda":
    os.environ["JAX_PLATFORMS"] = "cuda,cpu"  # references are computed on the latter
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_default_matmul_precision", "highest")  # tolerances are those of float32

if os.environ["JAX_PLATFORMS"] == "cpu":
    # Arrays are small: compiling is the work. Programs that tests start must compute the same bits.
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
if jaxlib.version.__version_info__ < (0, 11):  # later ones end at a flag that they do not know
    flag = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
else:
    # Programs of the interpreter of GPUs wait for each other, each in a thread of XLA's.
    os.environ.setdefault("NPROC", "16")


# All workers compile the same small programs, and again whenever they forget theirs.
if "TESTS_COMPILED" not in os.environ:
    os.environ["TESTS_COMPILED"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["TESTS_COMPILED"], ignore_errors=True)
if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_compilation_cache_dir", os.environ["TESTS_COMPILED"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

COUNT = itertools.count(1)


@pytest.fixture(autouse=True)
def fresh_caches():
    """Compiled functions of many tests take gigabytes together."""
    yield
    if next(COUNT) % 50 == 0:
        jax.clear_caches()


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield
