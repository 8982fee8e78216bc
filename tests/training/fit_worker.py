"""One process of a training, run by tests; its settings are JSON on the command line."""

from __future__ import annotations

import json
import pathlib
import sys
import time

import numpy as np

from jaxcompress.training.distributed import initialize
from jaxcompress.training.preemption import Preempted


def main(settings: dict) -> None:
    with initialize():
        import jax
        from test_fit_meshes import trained_on
        from training_cases import Drawn, perceptron, points, train, whole

        from jaxcompress.training.mesh import make_mesh

        class Slow(Drawn):
            """Says which batch it gives, and takes its time."""

            def __next__(self):
                print("batch", self.given, flush=True)
                time.sleep(settings.get("seconds", 0))
                return super().__next__()

        workdir = pathlib.Path(settings["workdir"])
        mesh = make_mesh(*settings["mesh"])
        try:
            if settings.get("decoder"):
                losses, params = trained_on(mesh, workdir, **settings.get("options", {}))
                print("losses", json.dumps(losses), flush=True)
            else:
                batches = Slow(points, poisoned=settings.get("poisoned"))
                out = train(
                    perceptron(), workdir, mesh=mesh, batches=batches, **settings["options"]
                )
                params = whole(out.params)
        except Preempted as stopped:
            print("preempted", stopped, flush=True)
            return
        if jax.process_index() == 0 and "out" in settings:
            np.savez(settings["out"], *jax.tree.leaves(params))
        print("done", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
