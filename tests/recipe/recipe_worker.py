"""One process of a recipe, run by tests: argument is JSON of the config, the directory, devices.

Only the first process may write what is written once.
"""

from __future__ import annotations

import json
import os
import sys


def main(settings: dict) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={settings['devices']}"
    from jaxcompress.training.distributed import initialize

    with initialize() as processes:
        import datasets

        from jaxcompress import recipe
        from jaxcompress.layerwise import journal
        from jaxcompress.recipe import runner, stages, store

        datasets.config.HF_DATASETS_CACHE = settings["cache"]

        def never(*args: object, **options: object) -> None:
            raise AssertionError("only the first process writes")

        written = [
            (journal, "write_native"),
            (journal, "write_json"),
            (runner, "write_report"),
            (stages, "save"),
            (store, "write_json"),
        ]
        for module, name in written:
            if processes.process_index > 0:
                setattr(module, name, never)
        report = recipe.run(settings["config"], settings["workdir"])
        print("checks", len(report["checks"]), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
