"""A search for edges finds those that were planted, and a graph is what its file and its model say."""
import json
import warnings

import pytest
import torch

from mgprune import edges, tasks
from mgprune.arguments import InputError
from mgprune.circuit import from_kept
from mgprune.edge_pass import prepare_edges
from mgprune.edge_search import true_edges, whole_nodes
from mgprune.graph import Graph
from mgprune.planted import plant
from mgprune.recipe import Recipe
from mgprune.sites import find_sites

TRUE = dict(ioi=10, greater_than=3, gendered_pronoun=3)


@pytest.fixture(scope="module")
def planted():
    return plant(pairs=64)


@pytest.mark.parametrize("name, recipe", [("ioi", None), ("ioi", Recipe(steps=20)), ("greater_than", None), ("gendered_pronoun", None)])
def test_planted_edges_are_found_and_no_others(planted, name, recipe):
    model, circuit = planted.model, from_kept(planted.truth[name], find_sites(planted.model))
    task = tasks.load(model, name, n=(32, 16, 8))
    true = true_edges(whole_nodes(circuit), prepare_edges(circuit, model, task, "train", 32))
    graph = edges(circuit, model, task, recipe=recipe)
    assert int(true.sum()) == TRUE[name] and torch.equal(graph.kept, true)


def test_a_file_says_all_of_a_search(planted, tmp_path):
    model, circuit = planted.model, from_kept(planted.truth["greater_than"], find_sites(planted.model))
    graph = edges(circuit, model, tasks.greater_than(model, n=(8, 8, 8)), recipe=Recipe(steps=3), kl=.2)
    again = Graph.load(graph.save(tmp_path / "graph"), model)
    assert again == graph and torch.equal(again.scores, graph.scores)
    assert dict(again.provenance) == json.loads(json.dumps(dict(graph.provenance)))
    with torch.no_grad(): next(model.parameters()).add_(1)
    try:
        with pytest.raises(InputError, match="belongs to"): Graph.load(tmp_path / "graph", model)
    finally:
        with torch.no_grad(): next(model.parameters()).sub_(1)


def test_a_budget_that_nothing_holds_is_said(planted):
    model, circuit = planted.model, from_kept(planted.truth["ioi"], find_sites(planted.model))
    with pytest.warns(UserWarning, match="no graph holds"):
        graph = edges(circuit, model, tasks.gendered_pronoun(model, n=(8, 8, 8)), kl=.01, recipe=None)
    assert graph.provenance.metrics["valid_kl"] > .01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edges(circuit, model, tasks.ioi(model, n=(8, 8, 8)), kl=.2, recipe=None)
