#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/mpi.sh [MPIRUN_OPTIONS... --] RUN_OPTIONS...

jaxcompress run RUN_OPTIONS... as the processes that Open MPI's mpirun starts.

One process a machine takes all its accelerators; of several on a machine each takes one. Rank 0
must be on the machine where this script runs, or JAX_COORDINATOR_ADDRESS=HOST:PORT must name its
machine; with Open MPI 5 and later it must be set in any case, or mpi4py be installed.

examples: launch/mpi.sh -np 2 -- --config configs/demo.py --workdir out
          launch/mpi.sh --hostfile hosts --map-by ppr:1:node -- --config configs/demo.py
TEXT
}

case "${1:-}" in
"" | -h | --help)
    usage
    [ "$#" -gt 0 ]
    exit
    ;;
esac

options=()
for argument in "$@"; do
    if [ "$argument" = -- ]; then
        while [ "$1" != -- ]; do
            options+=("$1")
            shift
        done
        shift
        break
    fi
done
for name in JAX_COORDINATOR_ADDRESS JAX_PLATFORMS XLA_FLAGS; do
    if [ -n "${!name:-}" ]; then options+=(-x "$name"); fi
done
# Unbound, or each process would have one core. When one process fails or mpirun is told to end, the
# others have 20 seconds, in which they may write a checkpoint.
exec mpirun --bind-to none --tag-output --mca odls_base_sigkill_timeout 20 \
    "${options[@]}" jaxcompress run "$@"
