"""Imports point one way, and importing the package costs nothing."""

import subprocess
import sys


def test_layers_hold():
    """The contracts of import-linter in pyproject.toml."""
    from importlinter.cli import lint_imports

    assert lint_imports() == 0


def test_import_is_lazy():
    code = (
        "import sys, jaxcompress; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "set()")


def test_every_public_name_is_there():
    import jaxcompress

    for name in jaxcompress.__all__:
        assert getattr(jaxcompress, name) is not None


def test_core_needs_jax_and_numpy_alone():
    code = (
        "import sys, jaxcompress.core.readers.lift, jaxcompress.core.readers.capture;"
        "print([m for m in ('flax', 'optax', 'orbax', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "set()")
