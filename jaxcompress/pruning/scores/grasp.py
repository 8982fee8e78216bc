"""GraSP: what keeps the gradient flowing."""

from __future__ import annotations

from jaxcompress.core.arrays.base import Array


def grasp(weight: Array, hessian_gradient: Array) -> Array:
    """GraSP: the weights go whose removal weakens the gradient's flow least, over all layers.

    Removing w changes |dL/dw|^2 by -2 w (H g), to first order; where w (H g) is negative, the flow
    grows without the weight. Meant for networks before they are trained.

    Source: Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow",
    arXiv:2002.07376, section 4: the highest S = -w (H g) go.

    Args:
      weight: `[*lead, N, K]`.
      hessian_gradient: H g of the mean loss, `[*lead, N, K]`.
    """
    return weight * hessian_gradient
