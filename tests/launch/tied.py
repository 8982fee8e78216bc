"""A process with a lifeline and without JAX: files in a folder stand for JAX's key-value store.

Arguments: index, count, folder. Then, from stdin, one word: `finish`, `stop`, `fail`, or none to
wait for.
"""

import importlib.util
import pathlib
import sys
import time

# By its file: the package around it takes seconds to import, and the lifeline needs none of it.
FILE = pathlib.Path(__file__).parents[2] / "jaxcompress" / "training" / "lifeline.py"
spec = importlib.util.spec_from_file_location("lifeline", FILE)
assert spec
assert spec.loader
lifeline_module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lifeline_module)
Lifeline = lifeline_module.Lifeline


class Client:
    def __init__(self, folder: pathlib.Path, count: int) -> None:
        self.folder, self.count = folder, count

    def _file(self, key: str) -> pathlib.Path:
        return self.folder / key.replace("/", ".")

    def key_value_set(self, key: str, value: str) -> None:
        made = self._file(key).with_suffix(".new")
        made.write_text(value)
        made.rename(self._file(key))

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        while not self._file(key).exists():
            time.sleep(0.01)
        return self._file(key).read_text()

    def wait_at_barrier(self, key: str, timeout_in_ms: int) -> None:
        self._file(f"{key}-{sys.argv[1]}").touch()
        until = time.monotonic() + timeout_in_ms / 1000
        while len(list(self.folder.glob(f"{self._file(key).name}-*"))) < self.count:
            if time.monotonic() > until:
                raise TimeoutError(key)
            time.sleep(0.01)


def main() -> None:
    index, count = int(sys.argv[1]), int(sys.argv[2])
    client = Client(pathlib.Path(sys.argv[3]), count)
    lifeline = Lifeline(index, count, f"host{index}", "127.0.0.1", client, 60)
    print("tied", flush=True)
    order = sys.stdin.readline().strip()
    if order == "finish":
        lifeline.finish()
    elif order == "stop":
        if not lifeline.stop():
            lifeline.fail("told to stop")
            lifeline.leave()
        sys.exit(75)
    elif order == "fail":
        lifeline.fail("OSError: disk full")
        print("the traceback", file=sys.stderr)
        lifeline.leave()
        sys.exit(1)


if __name__ == "__main__":
    main()
