"""Options of the command line: those of every method, read off the methods themselves."""

from __future__ import annotations

import re
from typing import Any

import click

from jaxcompress.core.errors import InputError

CALIBRATED = ["calibration", "calibration_samples", "ctx", "seed"]
WALK = ["sequential", "dense_target"]

kv_cache_option = click.option(
    "--kv-cache",
    type=click.Choice(["int8", "int4", "fp8"]),
    help="Keys and values are rounded, per token and head.  [default: as config.json says]",
)


class CompressCommand(click.Command):
    """`compress`, with the options of every method added when they are first asked for."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not getattr(self, "_filled", False):
            self._filled = True
            self.params += _method_options()
        return super().get_params(ctx)


def described(method: Any) -> dict[str, Any]:
    """A method and its options as JSON holds them."""
    return {
        "summary": method.summary,
        "needs": method.needs,
        "options": {
            o.name: {
                "type": o.type.__name__,
                "default": o.default,
                "choices": list(o.choices),
                "help": o.help,
            }
            for o in method.options.values()
        },
    }


def _method_options() -> list[click.Parameter]:
    """One click option per option name of any method; None where it is not given."""
    from jaxcompress.methods import METHODS

    users: dict[str, list[str]] = {}
    first: dict[str, Any] = {}
    for name, method in METHODS.items():
        for option in method.options.values():
            users.setdefault(option.name, []).append(name)
            first.setdefault(option.name, option)
    made: list[click.Parameter] = []
    for name, option in first.items():
        flag = name.replace("_", "-")
        text = f"[{', '.join(users[name])}] {option.help} [default: {option.default}]"
        if option.type is bool:
            made.append(click.Option([f"--{flag}/--no-{flag}", name], default=None, help=text))
            continue
        kind: Any = click.Choice(option.choices) if option.choices else option.type
        made.append(click.Option([f"--{flag}", name], type=kind, default=None, help=text))
    return made


def given_in_vain(method: Any) -> list[str]:
    """General options that were typed, but that this kind of method has no use for."""
    vain = [] if method.selects else ["include", "exclude"]
    if method.needs == "nothing":
        vain += CALIBRATED
    if not method.walks:
        vain += WALK
    typed = click.get_current_context().get_parameter_source
    return [name for name in vain if typed(name) is click.core.ParameterSource.COMMANDLINE]


def bytes_of(text: str) -> int:
    """Bytes of "2GB" or "500MB"; raises `InputError` of anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise InputError(f"verify-memory {text!r}: give bytes such as 2GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
