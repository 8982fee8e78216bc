"""Random rotations folded into the weights: no input channel stands out any more."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxcompress.core.model import Model, of_arrays
from jaxcompress.quantization.rotations import rotatable, rotate


def quarot(model: Model, *, calibration: Any = None, random_seed: int = 0) -> Model:
    """Rotate every axis that may be rotated by a randomized Hadamard matrix, in the weights alone.

    Gains of norms go into the matrices behind them; then the residual stream may be rotated as a
    whole, and the values of each attention head. Where there is a layer norm, which takes the mean
    away, the rotation leaves the vector of ones as it is. Which parameters take part is derived
    from the function, which stays the same; rotations in the midst of nonlinear layers, which need
    operations at run time, are not made.

    Source: Ashkboos et al., "QuaRot", arXiv:2404.00456, section 4 (stages 1a and 1b, without the
    online Hadamard transforms).

    Args:
      model: any model; a tied output layer gets weights of its own.
      calibration: some inputs `[samples, ...]`, for their shapes; a model with a config of a
        language model needs none.
      random_seed: of the signs.

    Returns:
      The dense model of the same function, without outliers.

    Raises:
      InputError: nobody says what the inputs of the model are.
    """
    model, restored = of_arrays(model)
    network, rotations, notes = rotatable(model, calibration, what="quarot")
    rng = np.random.default_rng(random_seed)
    params = rotate(network, rotations, [rotation.start(rng) for rotation in rotations])
    return restored(network.model.replace(params=params, notes=(*model.notes, *notes)))
