#!/usr/bin/env bash
# On a machine with a CUDA device: the tests marked `gpu`, then the benchmark of the weight-only
# product. Needs jax with CUDA, numpy and pytest in $PYTHON, or in the python3 of PATH.
# Writes benchmarks/results/wna16.json, or the file named as the first argument. Exits with 2 and
# one line where there is no CUDA device, with 1 where something fails.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${1:-benchmarks/results/wna16.json}
unset JAX_PLATFORMS

if ! "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")' 2>/dev/null; then
    echo "gpu_check: $python finds no CUDA device through jax; nothing was checked." >&2
    exit 2
fi
export XLA_PYTHON_CLIENT_PREALLOCATE=false
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0
# conftest.py asks for a CPU, and for hypothesis.
"$python" -m pytest tests/pallas_kernels/test_wna16_device.py --noconftest -m gpu \
    -p no:cacheprovider || failed=1
timeout 330 "$python" benchmarks/wna16.py --platform gpu --json "$results" || failed=1
exit $failed
