"""One training loop for pretraining, fine-tuning, distilling and sparse training.

objective = next_token(model)
optimizer = make_optimizer("adamw", steps=1000, learning_rate=1e-3, warmup=50)
model = fit(model, objective, batches, optimizer, steps=1000, workdir=Path("out"))
"""

from jaxcompress.training.loop import Batches, Diverged, fit
from jaxcompress.training.mesh import make_mesh
from jaxcompress.training.objective import Objective, classification, next_token
from jaxcompress.training.optimizers import make_optimizer
from jaxcompress.training.preemption import Preempted

__all__ = [
    "Batches",
    "Diverged",
    "Objective",
    "Preempted",
    "classification",
    "fit",
    "make_mesh",
    "make_optimizer",
    "next_token",
]
