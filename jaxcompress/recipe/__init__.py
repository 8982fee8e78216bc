"""An ordered list of stages over one model, from a config, run with resume.

run(config, "out")      # config: an ml_collections.ConfigDict, or nested dicts
"""

from jaxcompress.recipe.config import Recipe, read_config
from jaxcompress.recipe.plan import plan
from jaxcompress.recipe.runner import run

__all__ = ["Recipe", "plan", "read_config", "run"]
