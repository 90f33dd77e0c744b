"""Find a circuit behind a language model's behaviour, at every granularity at once."""
__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mgprune import tasks
from mgprune.applied import next_tokens
from mgprune.circuit import Circuit
from mgprune.evaluation import evaluate
from mgprune.many import discover_all
from mgprune.models import load_model
from mgprune.planning import plan
from mgprune.recipe import Recipe
from mgprune.streams import prepare
from mgprune.training import discover, sweep

if TYPE_CHECKING:
    from mgprune.edge_search import edges
    from mgprune.graph import Graph

__all__ = ["load_model", "tasks", "next_tokens", "discover", "discover_all", "plan", "sweep", "Recipe", "Circuit", "evaluate",
           "prepare", "edges", "Graph"]

LATER = dict(edges="mgprune.edge_search", Graph="mgprune.graph")  # they draw, and what draws is slow to load


def __getattr__(
    name: str,  # that the package has not loaded
) -> Any:
    "What is loaded when it is asked for"
    if name not in LATER: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(LATER[name]), name)
