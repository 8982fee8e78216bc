"""Shared fixtures. Eight virtual CPU devices, set before JAX starts.

Most programs of tests run once: without LLVM's optimizations they are compiled sooner. Those that
several files, workers or commands need are compiled once, and kept until the tests end.
"""

import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers and commands inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="programs-")
    os.environ["PROGRAMS_OF"] = str(os.getpid())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "jaxcompress", deadline=None, derandomize=True, max_examples=25, print_blob=True
)
hypothesis.settings.load_profile("jaxcompress")


def pytest_unconfigure():
    """The process that made the folder of compiled programs removes it."""
    if os.environ.get("PROGRAMS_OF") == str(os.getpid()):
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def _clear_compiled_programs():
    """A process that compiles thousands of programs runs out of memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def assets() -> pathlib.Path:
    """Folder of real weights and text, named by JAXCOMPRESS_ASSETS; skips where unset."""
    folder = os.environ.get("JAXCOMPRESS_ASSETS")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("JAXCOMPRESS_ASSETS is not set to a folder of real weights and text")
    return pathlib.Path(folder)
