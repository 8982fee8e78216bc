"""Placeholder while the kernel is written."""


def product(*operands, spec):
    raise NotImplementedError("mosaic_gpu")
