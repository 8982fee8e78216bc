"""A run to try the launchers on: sums over all devices of all processes until told to stop.

Arguments: seconds, then what befalls one process: `none`, `raise:1` (process 1 raises after the
first sums), `bad:1` (an InputError), `exit:1` (os._exit without a word).
"""

import os
import sys
import time

from jaxcompress.core.errors import InputError
from jaxcompress.training.distributed import initialize


def main() -> None:
    seconds, fate = float(sys.argv[1]), sys.argv[2]
    what, _, victim = fate.partition(":")
    with initialize() as processes:
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        print(processes, os.getpid(), flush=True)
        mesh = Mesh(np.array(jax.devices()), ("data",))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        ones = np.full(jax.local_device_count(), 1 + processes.process_index, np.float32)
        x = jax.make_array_from_process_local_data(sharding, ones)
        total = jax.jit(lambda x: x.sum())
        began, turn = time.monotonic(), 0
        # A number of turns, not a time, so that all processes do the same.
        while turn < seconds * 10:
            print(f"turn {turn} devices {jax.device_count()} sum {float(total(x)):g}", flush=True)
            turn += 1
            if turn == 10 and victim == str(processes.process_index):
                if what == "raise":
                    raise OSError("no space left\non the device")
                if what == "bad":
                    raise InputError("the data are other ones")
                if what == "exit":
                    os._exit(9)
            time.sleep(0.1)
    print(f"finished after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
