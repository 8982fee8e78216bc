#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/tpu_vm.sh NAME ZONE [--setup COMMAND] RUN_OPTIONS...

jaxcompress run RUN_OPTIONS... on every worker of the Cloud TPU VM slice NAME, through
`gcloud compute tpus tpu-vm ssh --worker=all`. Paths must mean the same on every worker: a shared
file system or a bucket.

  --setup COMMAND  run on each worker first, such as 'source ~/venv/bin/activate'

example: launch/tpu_vm.sh my-v5p-64 us-east5-a --setup 'source ~/venv/bin/activate' \
             --config configs/demo.py --workdir /mnt/bucket/out
TEXT
}

case "${1:-}" in
-h | --help)
    usage
    exit 0
    ;;
esac
[ "$#" -ge 3 ] || {
    usage >&2
    exit 2
}
name=$1
zone=$2
shift 2
setup=true
if [ "$1" = --setup ]; then
    setup=${2:?--setup needs a command}
    shift 2
fi
[ "$#" -gt 0 ] || {
    usage >&2
    exit 2
}
# One word for each argument again, after the shell of the worker has read the line.
printf -v command '%s && exec jaxcompress run%s' "$setup" "$(printf ' %q' "$@")"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
