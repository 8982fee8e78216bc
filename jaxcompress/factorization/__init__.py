"""Factorization and sharing: fewer numbers for the same matrix. `METHODS` lists every method."""

from functools import partial

from jaxcompress.core.method import Method
from jaxcompress.factorization.kmeans import kmeans
from jaxcompress.factorization.residual import loftq, qera
from jaxcompress.factorization.sharing import share, share_shapes
from jaxcompress.factorization.svd import no_root, survey, svd
from jaxcompress.factorization.whitened_svd import asvd, diagonal_root, svd_llm
from jaxcompress.layerwise.low_rank import cholesky_root

METHODS = {
    "svd": Method(svd, produces="factors", survey=partial(survey, no_root)),
    "svd_llm": Method(
        svd_llm,
        produces="factors",
        survey=partial(survey, cholesky_root),
    ),
    "asvd": Method(
        asvd,
        produces="factors",
        survey=partial(survey, diagonal_root),
    ),
    "loftq": Method(loftq, produces="quantized"),
    "qera": Method(qera, produces="quantized"),
    "kmeans": Method(kmeans, produces="quantized"),
    "share": Method(share, produces="model", shapes=share_shapes),
}
