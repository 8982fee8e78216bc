"""A text, a toy language model, and runs without the page that nobody looks at."""

from __future__ import annotations

import os

import jax
import pytest
import recipe_cases
from jax.experimental.compilation_cache import compilation_cache

from jaxcompress.core.model import Model
from jaxcompress.evaluation import report


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Prepared data sets end with the tests."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory):
    """What one recipe compiled serves all others, in other processes too."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    options = {
        "jax_compilation_cache_dir": str(base / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield


@pytest.fixture(scope="module", autouse=True)
def _no_page():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "page", lambda run: "<html></html>")
        yield


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> dict[str, str]:
    """`train` and `heldout` of `config.data`."""
    return recipe_cases.write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def toy() -> Model:
    """The same object in every test, so that its programs compile once in a module."""
    return recipe_cases.toy()
