import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")  # tolerances are those of float32
jax.config.update("jax_disable_most_optimizations", True)  # small arrays: compiling is the work


@pytest.fixture(autouse=True, scope="module")
def fresh_caches():
    """Compiled functions of one file are not those of the next, and take gigabytes together."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield
