"""Distillation: a student learns the outputs of its teacher. `LOSSES` lists what is compared.

student = student_from(teacher, layers=6)
objective = distill(student, teacher, temperature=2.0)   # for the training loop
"""

from jaxcompress.distillation.losses import LOSSES, Loss
from jaxcompress.distillation.objective import distill
from jaxcompress.distillation.student import resnet_student, student_from
from jaxcompress.distillation.vocabulary import aligned_vocabulary

__all__ = [
    "LOSSES",
    "Loss",
    "aligned_vocabulary",
    "distill",
    "resnet_student",
    "student_from",
]
