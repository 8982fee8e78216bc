"""Quantization: fewer bits per number. `METHODS` lists every method by its name."""

from jaxcompress.core.method import Method
from jaxcompress.quantization.rtn import rtn

METHODS = {
    "rtn": Method(rtn, produces="quantized", rowwise=True),
}
