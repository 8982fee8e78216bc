"""Quantization: fewer bits per number. `METHODS` lists every method by its name.

`FOLDS` change a dense model so that it rounds better and computes the same; under their names
`METHODS` holds them followed by the rounding that they were published with.
"""

from jaxcompress.core.method import Chain, Link, Method
from jaxcompress.quantization.activations import activations
from jaxcompress.quantization.autoround import autoround
from jaxcompress.quantization.awq import awq
from jaxcompress.quantization.clip import clip
from jaxcompress.quantization.coordinate import coordinate
from jaxcompress.quantization.gptq import gptq
from jaxcompress.quantization.hqq import hqq
from jaxcompress.quantization.low_rank import eora, svdquant
from jaxcompress.quantization.mixed import mixed, mixed_allocation
from jaxcompress.quantization.quarot import quarot
from jaxcompress.quantization.rtn import rtn
from jaxcompress.quantization.smoothquant import smoothquant
from jaxcompress.quantization.spinquant import spinquant
from jaxcompress.quantization.squeezellm import squeezellm
from jaxcompress.quantization.tune import tune

FOLDS = {
    "awq": Method(awq, produces="model"),
    "smoothquant": Method(smoothquant, produces="model"),
    "quarot": Method(quarot, produces="model"),
    "spinquant": Method(spinquant, produces="model"),
}
_ROUNDING = {
    "rtn": Method(rtn, produces="quantized", rowwise=True),
    "hqq": Method(hqq, produces="quantized", rowwise=True),
    "clip": Method(clip, produces="quantized"),
    "gptq": Method(gptq, produces="quantized"),
    "gptaq": Method(gptq, produces="quantized", dense_target=1.0),
    "coordinate": Method(coordinate, produces="quantized", sequential="matrix", dense_target=0.75),
    "autoround": Method(autoround, produces="quantized"),
    "squeezellm": Method(squeezellm, produces="quantized"),
    "eora": Method(eora, produces="quantized"),
    "svdquant": Method(svdquant, produces="quantized"),
    "mixed": Method(mixed, produces="quantized", plan=mixed_allocation),
}
_AFTERWARDS = {
    "activations": Method(activations, produces="quantized"),
    "tune": Method(tune, produces="quantized"),
}


def _followed(fold: str, *links: Link) -> Chain:
    return Chain.of(Link(fold, FOLDS[fold]), *links)


METHODS = {
    **_ROUNDING,
    **_AFTERWARDS,
    "awq": _followed("awq", Link("clip", _ROUNDING["clip"])),
    "smoothquant": _followed(
        "smoothquant",
        Link("rtn", _ROUNDING["rtn"], {"bits": 8, "group_size": -1}),
        Link("activations", _AFTERWARDS["activations"]),
    ),
    "quarot": _followed("quarot", Link("gptq", _ROUNDING["gptq"])),
    "spinquant": _followed("spinquant", Link("gptq", _ROUNDING["gptq"])),
}
