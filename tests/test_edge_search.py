"""A search for edges finds those that were planted, and a graph is what its file and its model say."""
import base64
import json
import math
import warnings

import pytest
import torch
from safetensors.torch import load as load_arrays
from safetensors.torch import save as save_arrays

from mgprune import edges, tasks
from mgprune.arguments import InputError
from mgprune.circuit import as_text, from_kept, full_circuit
from mgprune.curves import read_scores
from mgprune.edge_controls import scrubbed
from mgprune.edge_pass import edge_logits, prepare_edges
from mgprune.edge_search import (budget_of, closing_slopes, gated, irreducible, thinned, true_edges, whole_nodes)
from mgprune.evaluation import bound
from mgprune.files import digest
from mgprune.graph import Graph
from mgprune.models import frozen
from mgprune.objective import kl_divergence
from mgprune.passes import answer_logits
from mgprune.planted import plant
from mgprune.recipe import Recipe
from mgprune.sites import find_sites
from mgprune.wiring import Wiring, closed_edges, edges_among

TRUE = dict(ioi=10, greater_than=3, gendered_pronoun=3)


@pytest.fixture(scope="module")
def planted():
    return plant(pairs=64)


def circuit_of(planted, name): return from_kept(planted.truth[name], find_sites(planted.model))


@pytest.mark.parametrize("architecture, name, among, learn", [
    ("gpt2", "ioi", "all", False), ("gpt2", "greater_than", "survivors", True), ("llama", "gendered_pronoun", "all", False)])
def test_planted_edges_are_found_and_no_others(planted, architecture, name, among, learn):
    if architecture != "gpt2": planted = plant(pairs=64, architecture=architecture)
    model, circuit = planted.model, circuit_of(planted, name)
    task = tasks.load(model, name, n=(16, 64, 8))
    true = true_edges(whole_nodes(circuit), prepare_edges(circuit, model, task, "train", 16))
    graph = edges(None if among == "all" else circuit, model, task, learn=learn, recipe=Recipe(steps=20))
    assert int(true.sum()) == TRUE[name] and torch.equal(graph.kept, true)
    if among == "all": assert graph.circuit == full_circuit(find_sites(model))


def test_what_is_left_is_needed_and_what_is_said_of_it_is_measured(planted):
    model, task = planted.model, tasks.greater_than(planted.model, n=(32, 64, 8))
    circuit = circuit_of(planted, "greater_than")
    whole, wiring = whole_nodes(circuit), Wiring(circuit.sites)
    budget, train = budget_of(whole, model, task, .2, None, .95), prepare_edges(whole, model, task, "train", 16)
    among = edges_among(wiring, whole)
    kept, said = irreducible(among, whole, budget, closing_slopes(among, whole, train))
    assert said["before"] == int(among.sum()) > said["edges"] == int(kept.sum()) == len(said["over"]["edge"])
    full = budget.pairs.full
    def over(some):
        each = kl_divergence(full, edge_logits(whole, model, budget.pairs, some.float())).double()
        return bound(each, .95, budget.pairs.batch.words) - .2
    assert over(kept) <= 0
    for reader, writer in kept.nonzero().tolist():
        fewer = kept.clone()
        fewer[reader, writer] = False
        assert over(closed_edges(wiring, fewer)) > 0


def test_a_graph_of_fewer_neurons_is_computed_saved_and_applied_with_these(planted, tmp_path):
    model, task = planted.model, tasks.greater_than(planted.model, n=(16, 64, 8))
    circuit = circuit_of(planted, "greater_than")
    graph = Graph(edges_among(Wiring(circuit.sites), whole_nodes(circuit)), whole_nodes(circuit))
    thin = thinned(graph, model, task, kl=.1, recipe=Recipe(steps=20))
    assert thin.circuit.n_neurons() < graph.circuit.n_neurons() / 2 and 0 < len(thin) <= len(graph)
    assert thin.provenance.metrics["valid_kl_bound"] <= .1
    again, batch = Graph.load(thin.save(tmp_path / "thin"), model), task.batch("test")
    assert again == thin and again.circuit == thin.circuit
    with again.applied(model, task), torch.no_grad(): answers = answer_logits(model, batch.clean, batch.attention_mask)
    assert torch.allclose(answers, edge_logits(thin.circuit, model, task, thin.kept.float()), atol=1e-3)


def test_slopes_of_edges_neurons_and_nodes_are_those_of_closing_them_a_little(planted):
    model, circuit = planted.model, whole_nodes(circuit_of(planted, "greater_than"))
    examples = prepare_edges(circuit, model, tasks.greater_than(model, n=(8, 8, 8)), "train", 4)
    graph = Graph(edges_among(Wiring(circuit.sites), circuit), circuit)
    gates = gated(graph, graph.wires(model), 3.)
    n = len(graph), len(gates.holder), len(gates.wires.writers) - 1
    def loss(open):
        with frozen(model): return kl_divergence(examples.full.double(), gates.answers(examples, open).double()).mean()
    for f, allowed in ((loss, .02), (gates.cost, 1e-3)):
        middle = torch.full((sum(n),), .5).requires_grad_()
        with torch.enable_grad(): slopes, = torch.autograd.grad(f(middle), middle)
        for first, kind in zip((0, n[0], n[0] + n[1]), slopes.split(n)):
            i = int(kind.abs().argmax())
            step = torch.zeros(sum(n)).index_fill(0, torch.tensor([first + i]), .05)
            with torch.no_grad(): rise = (f(middle + step) - f(middle - step)) / .1
            assert abs(rise - kind[i]) < allowed * kind[i].abs() + 1e-3


def test_one_search_of_the_whole_model_finds_planted_nodes_and_edges(planted):
    model, task = planted.model, tasks.greater_than(planted.model, n=(16, 64, 8))
    circuit = circuit_of(planted, "greater_than")
    true = true_edges(whole_nodes(circuit), prepare_edges(circuit, model, task, "train", 16))
    found = thinned(None, model, task, kl=.1, recipe=Recipe(steps=20))
    assert torch.equal(found.kept, true) and found.provenance.metrics["valid_kl_bound"] <= .1
    assert found.circuit.heads() == circuit.heads() and found.circuit.mlps() == circuit.mlps()
    assert found.circuit.n_neurons() <= circuit.n_neurons()


def test_a_file_says_all_of_a_search(planted, tmp_path):
    model, circuit = planted.model, circuit_of(planted, "greater_than")
    graph = edges(circuit, model, tasks.greater_than(model, n=(8, 64, 8)), recipe=Recipe(steps=3), kl=.2)
    again = Graph.load(graph.save(tmp_path / "graph"), model)
    assert again == graph and torch.equal(again.scores, graph.scores)
    assert dict(again.provenance) == json.loads(json.dumps(dict(graph.provenance)))
    with torch.no_grad(): next(model.parameters()).add_(1)
    try:
        with pytest.raises(InputError, match="belongs to"): Graph.load(tmp_path / "graph", model)
    finally:
        with torch.no_grad(): next(model.parameters()).sub_(1)


def test_a_budget_that_nothing_holds_is_said_and_too_few_pairs_are_refused(planted):
    model, circuit, off = planted.model, circuit_of(planted, "ioi"), Recipe(confidence=None)
    other = tasks.gendered_pronoun(model, n=(8, 8, 8))
    with pytest.warns(UserWarning, match="no graph holds"):
        graph = edges(circuit, model, other, kl=.01, learn=False, recipe=off)
    assert graph.provenance.metrics["valid_kl"] > .01 and "over" in graph.provenance.trimmed
    with pytest.raises(InputError, match="expected at least 59"): edges(circuit, model, other, kl=.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        share = edges(circuit, model, tasks.ioi(model, n=(8, 8, 8)), kl="10%", faithfulness=.3, learn=False, recipe=off)
    assert len(share) and share.provenance.settings["kl"] == "10%"


def test_scrubbing_takes_what_another_pair_holds(planted):
    model, circuit = planted.model, whole_nodes(circuit_of(planted, "ioi"))
    task = tasks.ioi(model, n=(32, 8, 8))
    graph = Graph(edges_among(Wiring(circuit.sites), circuit), circuit)
    marks, test = scrubbed(graph, model, task), task.batch("test")
    assert marks["closed_kl"] > 10 * marks["kl"] and marks["closed_scrubbed_kl"] > 10 * marks["scrubbed_kl"]
    assert marks == scrubbed(graph, model, task) and scrubbed(graph, model, test)["kl"] == marks["kl"]


@pytest.fixture(scope="module")
def some_graph(model):
    "A graph of half of the edges, with scores"
    whole, draw = full_circuit(find_sites(model)), torch.Generator().manual_seed(0)
    exists = Wiring(whole.sites).exists
    kept = exists & (torch.rand(exists.shape, generator=draw) < .5)
    return Graph(kept, whole, torch.randn(exists.shape, generator=draw, dtype=torch.double))


def rewritten(path, change):
    "The file with something changed, and a digest that fits"
    data = json.loads(path.read_text())
    change(data)
    data.pop("digest")
    path.write_text(json.dumps(data | dict(digest=digest(as_text(data).encode()))))
    return path


def other_tensors(data, of, **tensors):
    "Tensors of a file in place of those that it has"
    own = load_arrays(base64.b64decode(data[of]))
    data[of] = base64.b64encode(save_arrays(own | tensors)).decode()


@pytest.mark.parametrize("change", [
    lambda data: other_tensors(data, "circuit_arrays", **{"kept.mlp_neuron": torch.zeros(4, 512, dtype=torch.bool)}),
    lambda data: other_tensors(data, "circuit_arrays", **{"kept.block": torch.tensor([True, False, True, True])}),
    lambda data: other_tensors(data, "arrays", kept=torch.zeros(53, 21, dtype=torch.bool)), lambda data: data.update(edges=None), lambda data: data.pop("edges"),
    lambda data: other_tensors(data, "arrays", more=torch.zeros(2)), lambda data: data["edges"].pop()])
def test_a_graph_whose_file_contradicts_itself_is_refused(some_graph, change, tmp_path):
    path = some_graph.save(tmp_path / "graph")
    assert Graph.load(path) == some_graph
    with pytest.raises(InputError): Graph.load(rewritten(path, change))


def test_what_is_no_graph_is_refused(some_graph, tmp_path):
    (tmp_path / "nested.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(InputError, match="not a graph"): Graph.load(tmp_path / "nested.json")
    with pytest.raises(InputError, match="cannot be read"): read_scores(tmp_path / "nested.json", some_graph.circuit.sites)
    with pytest.raises(InputError, match="finite"): Graph(some_graph.kept, some_graph.circuit, torch.full(some_graph.kept.shape, math.nan))


def test_graphs_of_other_neurons_differ(some_graph):
    fewer = dict(some_graph.circuit.kept) | dict(mlp_neuron=some_graph.circuit.kept["mlp_neuron"] & (torch.arange(512) > 3))
    assert Graph(some_graph.kept, from_kept(fewer, some_graph.circuit.sites)) != some_graph == Graph(some_graph.kept, some_graph.circuit)
