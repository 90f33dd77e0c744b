"""Find a circuit behind a language model's behaviour, at every granularity at once."""
__version__ = "0.1.0"

from mgprune import tasks
from mgprune.circuit import Circuit
from mgprune.evaluation import evaluate
from mgprune.models import load_model
from mgprune.streams import prepare
from mgprune.training import discover, sweep

__all__ = ["load_model", "tasks", "discover", "sweep", "Circuit", "evaluate", "prepare"]
