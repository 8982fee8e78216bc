"""A run to try the launchers on: sums over all devices of all processes, turn after turn.

Arguments: turns, what befalls one process at its 10th turn (`none`, `raise:1`: process 1 raises,
`bad:1`: an InputError, `exit:1`: it ends without a word), and optionally a file in which the
turns done are kept, from which a later run goes on. Ends with exit code 75 on SIGTERM.
"""

import os
import pathlib
import sys
import time

from jaxcompress.core.errors import InputError
from jaxcompress.training.distributed import EXIT_PREEMPTED, Processes, initialize
from jaxcompress.training.preemption import Preempted, Preemption


def main() -> None:
    turns, fate = int(sys.argv[1]), sys.argv[2]
    kept = pathlib.Path(sys.argv[3]) if len(sys.argv) > 3 else None
    try:
        with initialize() as processes, Preemption() as preemption:
            loop(processes, preemption, turns, fate, kept)
    except Preempted as end:
        print(end, flush=True)
        sys.exit(EXIT_PREEMPTED)
    print("finished", flush=True)


def loop(
    processes: Processes, preemption: Preemption, turns: int, fate: str, kept: pathlib.Path | None
) -> None:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    print(f"{processes} pid={os.getpid()}", flush=True)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    ones = np.full(jax.local_device_count(), 1 + processes.process_index, np.float32)
    x = jax.make_array_from_process_local_data(sharding, ones)
    total = jax.jit(lambda x: x.sum())
    begin = int(kept.read_text()) if kept and kept.exists() else 0
    for turn in range(begin, turns):
        if preemption.requested():
            raise Preempted(f"preempted before turn {turn}")
        print(f"turn {turn} devices {jax.device_count()} sum {float(total(x)):g}", flush=True)
        if kept and processes.process_index == 0:
            kept.write_text(str(turn + 1))
        if turn == 10:
            suffer(fate, processes.process_index)
        time.sleep(0.1)


def suffer(fate: str, index: int) -> None:
    what, _, victim = fate.partition(":")
    if victim != str(index):
        return
    if what == "raise":
        raise OSError("no space left\non the device")
    if what == "bad":
        raise InputError("the data are other ones")
    os._exit(9)


if __name__ == "__main__":
    main()
