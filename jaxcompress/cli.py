"""The command line: `jaxcompress run`, `compress`, `sweep`, `evaluate`, `methods` and others."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
import re
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from jaxcompress.cli_options import (
    CALIBRATED,
    WALK,
    CompressCommand,
    bytes_of,
    described,
    given_in_vain,
    kv_cache_option,
)
from jaxcompress.core.errors import InputError

EXAMPLE = "jaxcompress compress MODEL OUT --method {method} --calibration text.txt"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="jaxcompress", message="%(prog)s %(version)s")
def cli() -> None:
    """Make trained models smaller and faster, with the loss measured."""


@cli.command(cls=CompressCommand)
@click.argument("model")
@click.argument("out")
@click.option(
    "--method",
    default="auto",
    show_default=True,
    help="See `jaxcompress methods`; auto: the best for what is asked and the data given.",
)
@click.option(
    "--format",
    "container",
    type=click.Choice(
        ["auto", "compressed-tensors", "gptq", "awq", "bitsandbytes", "dense", "native"]
    ),
    default="auto",
    show_default=True,
    help="The container.",
)
@click.option("--include", multiple=True, help="Paths to compress: glob, or re:REGEX. Repeatable.")
@click.option("--exclude", multiple=True, help="Paths to leave alone. Repeatable.")
@click.option("--calibration", help="Text file for methods that need data.")
@click.option("--calibration-samples", default=32, show_default=True, help="Windows drawn from it.")
@click.option("--ctx", default=512, show_default=True, help="Tokens in a window.")
@click.option("--seed", default=0, show_default=True, help="Seed of the draw.")
@click.option(
    "--sequential",
    type=click.Choice(["none", "block", "matrix"]),
    help="Where a matrix's inputs come from: the dense model, the blocks compressed before it, "
    "also the matrices before it.  [default: the method's]",
)
@click.option(
    "--dense-target",
    type=float,
    help="0: a matrix does to its inputs what it did; 1: what the dense model gives in its place.  "
    "[default: the method's]",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option(
    "--verify-memory",
    default="2GB",
    show_default=True,
    help="Compare logits after the export where the dense model fits in this.",
)
def compress(model: str, out: str, method: str, **given: Any) -> None:
    """Compress MODEL (a directory or a hub name) into the new directory OUT."""
    from jaxcompress.convert import convert, parameters_in
    from jaxcompress.methods import resolved

    asked = method
    count = parameters_in(model) if method == "auto" else None
    method, chosen = resolved(method, given, given["calibration"], count)
    if method != asked:
        click.echo(f"method: {method}")
    general = {name: given.pop(name) for name in (*CALIBRATED, *WALK, "overwrite")}
    include, exclude = list(given.pop("include")), list(given.pop("exclude"))
    container, verify_memory = given.pop("container"), bytes_of(given.pop("verify_memory"))
    options = {name: value for name, value in given.items() if value is not None}
    integer = re.fullmatch(r"int(\d+)", options.get("dtype", ""))
    if integer and options.setdefault("bits", int(integer[1])) != int(integer[1]):
        raise InputError(
            f"--dtype {options['dtype']} and --bits {options['bits']} contradict each other"
        )
    if integer:
        del options["dtype"]
    if chosen.needs == "calibration" and general["calibration"] is None:
        raise InputError(
            f"{method}: needs --calibration FILE, for example: {EXAMPLE.format(method=method)}"
        )
    used, unused = chosen.accepted(options)
    for name in [*unused, *given_in_vain(chosen)]:
        _say(f"note: {method} does not use --{name.replace('_', '-')}")
    for line in convert(
        model,
        out,
        method,
        options=used,
        container=container,
        include=include if chosen.selects and include else None,
        exclude=exclude if chosen.selects and exclude else None,
        verify_memory=verify_memory,
        **general,
    ):
        click.echo(line)


@cli.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option("--config", required=True, help="Python file with get_config(); FILE:ARG passes ARG.")
@click.option("--workdir", help="Directory of the run; the same one goes on.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan only.")
@click.option("--topology", help="With --dry-run: compile the training steps for this TPU pod.")
@click.pass_context
def run(
    ctx: click.Context, config: str, workdir: str | None, dry_run: bool, topology: str | None
) -> None:
    """Run the recipe of a config, stage by stage; a killed run goes on where it stopped.

    Fields are changed by --config.FIELD=VALUE, such as --config.mesh.fsdp=4.
    """
    from jaxcompress.recipe.files import read_file

    if topology is not None and not dry_run:
        raise InputError("--topology: compiles for a pod, and is used with --dry-run")
    fields = read_file(config, ctx.args)
    from jaxcompress import recipe

    if dry_run:
        for line in recipe.plan(fields, topology):
            click.echo(line)
        return
    if workdir is None:
        raise InputError("--workdir: is needed; give the directory of the run")
    from jaxcompress.training.distributed import EXIT_PREEMPTED, initialize
    from jaxcompress.training.preemption import Preempted, preemptible

    try:
        with initialize() as processes, preemptible(workdir):
            found = recipe.run(fields, workdir)
    except Preempted as stop:
        _say(f"jaxcompress: {stop}")
        sys.exit(EXIT_PREEMPTED)
    failed = [check["name"] for check in found["checks"] if not check["passed"]]
    if failed:
        if processes.process_index == 0:
            _say(f"jaxcompress: {len(failed)} of {len(found['checks'])} checks failed: {failed[0]}")
        sys.exit(1)


@cli.command()
@click.argument("model")
@click.option("--methods", default="all", show_default=True, help="NAME or NAME:option=value, ...")
@click.option(
    "--sparsity", default="0.3,0.5,0.7,0.8,0.9", show_default=True, help="Shares that go."
)
@click.option("--patterns", default="2:4", show_default=True, help="n:m or block:RxC, besides.")
@click.option("--text", required=True, help="Text file, held out: perplexity.")
@click.option("--calibration", required=True, help="Text file that the methods are given.")
@click.option("--calibration-samples", default=32, show_default=True, help="Windows drawn from it.")
@click.option("--ctx", default=256, show_default=True, help="Tokens in a window.")
@click.option("--tokens", default=20_000, show_default=True, help="Use so many of the text.")
@click.option("--seed", default=0, show_default=True, help="Seed of the draws.")
@click.option("--out", required=True, help="Directory; the same one goes on.")
def sweep(model: str, out: str, **given: Any) -> None:
    """Run every method at every strength over MODEL: rows, a figure for each, heat maps."""
    from jaxcompress.recipe.sweep import sweep_text

    click.echo("\n".join(sweep_text(model, out, **given)))


@cli.command()
@click.argument("model")
@click.option("--text", help="Text file: perplexity.")
@click.option("--images", help="Parquet file of labelled images: accuracy.")
@click.option("--arch", help="Architecture of a bare state dict, such as resnet20.")
@click.option("--ctx", default=512, show_default=True, help="Tokens in a window.")
@click.option("--tokens", type=int, help="Use only so many tokens of the text.")
@click.option("--stride", type=int, help="Tokens from window to window. [default: ctx]")
@click.option("--limit", type=int, help="Use only so many images.")
@kv_cache_option
@click.option("--against", help="The dense model: adds KL and top-1 agreement.")
@click.option("--json", "as_json", is_flag=True, help="The last line is one JSON object.")
def evaluate(
    model: str,
    text: str | None,
    images: str | None,
    against: str | None,
    kv_cache: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Perplexity of MODEL on a text, or its accuracy on images."""
    from jaxcompress import api
    from jaxcompress.models import quantize_kv_cache

    if (text is None) == (images is None):
        raise InputError("evaluate: give either --text FILE or --images FILE")
    arch = given.pop("arch")
    loaded = api.load(model, arch=arch)
    if kv_cache is not None:
        loaded = quantize_kv_cache(loaded, kv_cache)
    dense = api.load(against, arch=arch) if against else None
    result = api.evaluate(loaded, text=text, images=images, against=dense, **given)
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result.items():
        click.echo(f"{name:16} {value:.6g}" if isinstance(value, float) else f"{name:16} {value}")


@cli.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def inspect(path: str, as_json: bool) -> None:
    """What a checkpoint holds: parameters, shapes, formats, bits, sparsity, bytes."""
    from jaxcompress import api

    found = api.inspect(path)
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = found["tensors"]
    width = max([len(row["name"]) for row in rows] + [4])
    click.echo(
        f"{'name':{width}}  {'shape':>18} {'dtype':>10} {'format':>18} {'bits':>6} "
        f"{'sparsity':>8} {'bytes':>12}"
    )
    for row in rows:
        shape = "x".join(map(str, row["shape"])) or "scalar"
        sparsity = "" if row["sparsity"] is None else f"{row['sparsity']:.4f}"
        click.echo(
            f"{row['name']:{width}}  {shape:>18} {row['dtype']:>10} {row['format']:>18} "
            f"{row['bits']:>6.3g} {sparsity:>8} {row['bytes']:>12,}"
        )
    total = found["total"]
    click.echo(
        f"{len(rows)} tensors, {total['parameters']:,} parameters, {total['bytes']:,} bytes, "
        f"{total['bits_per_weight']:.3f} bits per weight"
    )


@cli.command()
@click.argument("model")
@click.option("--prompt", required=True, help="Text to go on from.")
@click.option("--max-new-tokens", default=64, show_default=True)
@click.option("--temperature", default=0.0, show_default=True, help="0: the most likely token.")
@click.option("--top-k", type=int, help="Draw from the k most likely tokens only.")
@click.option("--seed", default=0, show_default=True)
@kv_cache_option
def generate(model: str, prompt: str, kv_cache: str | None, **given: Any) -> None:
    """Let MODEL go on from a prompt."""
    from jaxcompress import api
    from jaxcompress.models import quantize_kv_cache

    loaded = api.load(model)
    if kv_cache is not None:
        loaded = quantize_kv_cache(loaded, kv_cache)
    click.echo(api.generate_text(loaded, prompt, **given))


@cli.command()
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with all options.")
def methods(names: tuple[str, ...], as_json: bool) -> None:
    """Every method in a line; of those NAMED, their options too."""
    from jaxcompress.methods import METHODS, method_named

    asked = {name: method_named(name) for name in names or METHODS}
    if as_json:
        click.echo(json.dumps({name: described(method) for name, method in asked.items()}))
        return
    if not names:
        width = max(map(len, METHODS))
        for name, method in METHODS.items():
            click.echo(f"{name:{width}}  {method.summary}")
        click.echo("Options of one: jaxcompress methods NAME")
        return
    for name, method in asked.items():
        click.echo(f"{name}: {method.summary}\n  needs {method.needs}")
        for option in method.options.values():
            choices = f" ({', '.join(option.choices)})" if option.choices else ""
            flag = "--" + option.name.replace("_", "-")
            click.echo(f"  {flag:16} {option.help}{choices} [default: {option.default}]")


def _say(line: str) -> None:
    click.echo(line, err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Bad input: one line on stderr and exit code 2."""
    _look_for_no_absent_tpu()
    _keep_compiled_programs()
    try:
        code = cli.main(args=arguments, prog_name="jaxcompress", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except InputError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(error.format_message())
    except click.Abort:
        sys.exit(130)
    except (OSError, MemoryError) as error:
        _fail(f"{type(error).__name__}: {error}")


def _look_for_no_absent_tpu() -> None:
    """An installed libtpu without a TPU costs seconds and prints pages before it gives up."""
    devices = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")
    if sys.platform == "linux" and not any(glob.glob(pattern) for pattern in devices):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _keep_compiled_programs() -> None:
    """JAX's own cache of compiled programs, unless the environment says where it is, or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # What was compiled for one processor need not run on another that shares the home directory.
    with contextlib.suppress(OSError):
        flags = re.search(r"^(?:flags|Features).*", Path("/proc/cpuinfo").read_text(), re.M)
        kind = zlib.crc32(flags[0].encode() if flags else b"")
        cache = cache / "jaxcompress" / "programs" / f"{platform.machine()}-{kind:08x}"
        cache.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(1 << 30))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _fail(message: str) -> None:
    click.echo(f"jaxcompress: error: {' '.join(message.split())}", err=True)
    sys.exit(2)
