"""Find a circuit behind a language model's behaviour, at every granularity at once."""
__version__ = "0.1.0"

from mgprune import tasks
from mgprune.circuit import Circuit
from mgprune.evaluation import evaluate
from mgprune.many import discover_all
from mgprune.models import load_model
from mgprune.streams import prepare
from mgprune.training import discover, plan, sweep

__all__ = ["load_model", "tasks", "discover", "discover_all", "plan", "sweep", "Circuit", "evaluate", "prepare"]
