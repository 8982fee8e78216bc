"""Times the weight-only quantized product (W4A16) against the same product in 16 bits.

    python benchmarks/wna16.py                   # the GPU or TPU at hand
    python benchmarks/wna16.py --platform cpu    # the forms that a CPU may run, smaller shapes

Every form is checked against a product in float64 first. A timed program is one jit that goes
through many distinct weights, together over 200 MB in 16 bits and in 4, so that none is found in a
cache and launching costs little; forms alternate, and the median is reported. Roofline is the
time in which the memory would deliver the weight's bytes once, or the arithmetic units multiply,
whichever is longer, over the time measured. Prints a table; ``--json`` writes the rows with date,
versions and hardware.
"""

import argparse
import datetime
import functools
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

GROUP = 128
LARGE = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192)]  # N, K
SMALL = [(1024, 1024), (2048, 2048), (4096, 4096)]
ROWS = [1, 8, 16, 32, 64, 128, 256]
CYCLED_BYTES = 200e6
# Peak memory bandwidth in bytes/s and bfloat16 arithmetic in FLOP/s, from the vendors' data sheets.
PEAKS = {
    "H200": (4.8e12, 989e12),
    "H100": (3.35e12, 989e12),
    "TPU v5 lite": (819e9, 197e12),
    "TPU v5": (2765e9, 459e12),
    "TPU v6 lite": (1640e9, 918e12),
}


def make_weights(n: int, k: int, copies: int) -> tuple[Any, Any]:
    """Random codes [copies, N, K/8] and scales [copies, N, K/GROUP], made on the device."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def make(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        bits, scales = jax.random.split(key)
        codes = jax.random.bits(bits, (copies, n, k // 8), jnp.uint32)
        scale = jax.random.uniform(scales, (copies, n, k // GROUP), minval=0.5) / (8 * k**0.5)
        return jax.lax.bitcast_convert_type(codes, jnp.int32), scale.astype(jnp.bfloat16)

    return make(jax.random.key(0))


def decode(codes: Any, scale: Any) -> Any:
    """The dense weights [..., N, K] in bfloat16."""
    import jax.numpy as jnp

    from pallas_kernels.packing import unpack

    w = unpack(codes, 4).astype(scale.dtype) - 8
    w = w.reshape(*scale.shape, GROUP) * scale[..., None]
    return w.reshape(*codes.shape[:-1], -1).astype(jnp.bfloat16)


def forms(platform: str) -> dict[str, Callable[..., Any]]:
    """Name to function (x, codes, scale, dense) of one product, x @ W^T."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.wna16 import wna16_matmul

    def product(x: Any, w: Any) -> Any:
        # Written so that a CPU, too, takes its fast path: a float32 result, no transpose.
        y = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return y.astype(x.dtype)

    matmul = functools.partial(wna16_matmul, bits=4)
    kernel = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(platform)
    layout = {"gpu": "gpu", "tpu": "tpu"}.get(platform, "canonical")
    found = {
        "dense": lambda x, codes, scale, dense: product(x, dense),
        "xla": lambda x, codes, scale, dense: matmul(x, codes, scale, implementation="xla"),
    }
    if platform == "cpu":
        found["whole"] = lambda x, codes, scale, dense: product(x, decode(codes, scale))
    if kernel:
        found[kernel] = lambda x, codes, scale, dense: matmul(
            x, codes, scale, implementation=kernel, layout=layout
        )
    return found


def place(codes: Any, scale: Any, name: str) -> tuple[Any, Any]:
    """Operands in the layout that the form named reads."""
    from pallas_kernels.wna16 import scale_to_kernel_layout, to_tpu_layout

    if name == "mosaic_tpu":
        codes = to_tpu_layout(codes, bits=4)
    if name.startswith("mosaic"):
        scale = scale_to_kernel_layout(scale, scale.shape[-2])
    return codes, scale


def measure_shape(
    n: int,
    k: int,
    rows: list[int],
    repeats: int,
    platform: str,
    peaks: tuple[float, float] | None,
) -> list[dict]:
    """Checks and times every form for one weight [N, K] and each number of rows of x."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    copies = max(2, math.ceil(CYCLED_BYTES / (n * k / 2)))
    if platform == "cpu":
        copies = max(1, min(copies, 2**26 // (n * k)))
    codes, scale = make_weights(n, k, copies)
    dense = jax.jit(decode)(codes, scale)
    tried = forms(platform)
    operands: dict[str, Any] = {}
    for name in tried:
        words, scales = place(codes, scale, name)
        operands[name] = tuple(zip(*((words[i], scales[i]) for i in range(copies)), strict=True))
    dense_list = tuple(dense[i] for i in range(copies))
    del codes, dense
    exact = np.asarray(dense_list[0].astype(jnp.float32), np.float64)
    results = []
    for m in rows:
        x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
        expected = np.asarray(x.astype(jnp.float32), np.float64) @ exact.T
        programs, notes = {}, {}
        for name, form in tried.items():
            try:
                weights = dense_list if name == "dense" else (None,) * copies
                words, scales = operands[name]
                program, error = prepare(form, x, words, scales, weights, expected)
            except NotImplementedError as reason:
                notes[name] = str(reason)
                continue
            if error > 0.02:
                raise SystemExit(f"{name} is wrong at N={n} K={k} M={m}: relative error {error}")
            programs[name] = program
        times: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(repeats):
            for name, program in programs.items():
                start = time.perf_counter()
                program().block_until_ready()
                times[name].append((time.perf_counter() - start) / copies)
        row = {name: statistics.median(values) * 1e6 for name, values in times.items()}
        result = {"N": n, "K": k, "M": m, "copies": copies, "us": row, "notes": notes}
        if peaks:
            result["roofline_percent"] = {
                name: 100 * roofline(n, k, m, 16 if name == "dense" else 4 + 16 / GROUP, peaks) / us
                for name, us in row.items()
            }
        results.append(result)
        print_row(result)
    return results


def prepare(
    form: Callable[..., Any], x: Any, codes: tuple, scale: tuple, dense: tuple, expected: Any
) -> tuple[Callable[[], Any], float]:
    """Compiles the chain of products; returns it and the relative error of its first."""
    import jax
    import numpy as np

    @jax.jit
    def first(x: Any, codes: Any, scale: Any, dense: Any) -> Any:
        return form(x, codes, scale, dense)

    @jax.jit
    def all_of(x: Any, codes: tuple, scale: tuple, dense: tuple) -> Any:
        total = 0
        for one in zip(codes, scale, dense, strict=True):
            x, y = jax.lax.optimization_barrier((x, form(x, *one)))
            total = total + y
        return total

    y = np.asarray(first(x, codes[0], scale[0], dense[0]), np.float64)
    error = float(np.abs(y - expected).max() / np.abs(expected).max())
    run = functools.partial(all_of, x, codes, scale, dense)
    run().block_until_ready()
    return run, error


def roofline(n: int, k: int, m: int, bits: float, peaks: tuple[float, float]) -> float:
    """The shortest possible time in microseconds."""
    traffic = n * k * bits / 8 + 2 * m * (n + k)
    return 1e6 * max(traffic / peaks[0], 2 * m * n * k / peaks[1])


def print_row(row: dict) -> None:
    percent = row.get("roofline_percent", {})
    cells = [
        f"{name} {us:9.1f}" + (f" ({percent[name]:3.0f} %)" if percent else "")
        for name, us in row["us"].items()
    ]
    best = min((us, name) for name, us in row["us"].items() if name not in ("dense", "whole"))
    gain = row["us"]["dense"] / best[0]
    print(f"N={row['N']:<6} K={row['K']:<6} M={row['M']:<4}", *cells, f"{gain:5.2f}x", sep="  ")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), help="default: JAX's")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the rows to")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", help="M; default 1 8 16 32 64 128 256")
    options = parser.parse_args()
    if options.platform == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    import jax

    device = jax.devices()[0]
    platform = device.platform
    if options.platform not in (None, platform):
        raise SystemExit(f"JAX finds no {options.platform}: its device is {device.device_kind}")
    peaks = next((v for name, v in PEAKS.items() if name in device.device_kind), None)
    print(f"{device.device_kind}, jax {jax.__version__}; microseconds per product, g{GROUP}")
    rows = options.rows or (ROWS if platform != "cpu" else [1, 16, 128])
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": device.device_kind,
        "peaks": peaks,
        "jax": jax.__version__,
        "rows": [],
    }
    for n, k in LARGE if platform != "cpu" else SMALL:
        record["rows"] += measure_shape(n, k, rows, options.repeats, platform, peaks)
        if options.json:  # after each shape, so that a run cut short leaves what it has
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
