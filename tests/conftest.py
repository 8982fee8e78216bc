"""Shared fixtures. Eight virtual CPU devices, set before JAX starts.

Most programs of tests run once: without LLVM's optimizations they are compiled sooner.
"""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "jaxcompress", deadline=None, derandomize=True, max_examples=25, print_blob=True
)
hypothesis.settings.load_profile("jaxcompress")


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
