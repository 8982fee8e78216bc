#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/local.sh [--cpu-devices N] RUN_OPTIONS...

One process with the devices of this machine: jaxcompress run RUN_OPTIONS...

  --cpu-devices N  let the CPU appear as N devices, to try a mesh without accelerators

example: launch/local.sh --cpu-devices 8 --config configs/demo.py --workdir out
TEXT
}

case "${1:-}" in
-h | --help)
    usage
    exit 0
    ;;
--cpu-devices)
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || {
        echo "local.sh: --cpu-devices needs a number" >&2
        exit 2
    }
    export JAX_PLATFORMS=cpu
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$2"
    shift 2
    ;;
esac
[ "$#" -gt 0 ] || {
    usage >&2
    exit 2
}
exec jaxcompress run "$@"
