"""What is left after trimming is needed, and nothing else is: against circuits that are closed by hand, part by part."""
import pytest
import torch

from families import pairs, tiny
from mgprune import Circuit, discover, tasks
from mgprune.circuit import from_kept, from_scores, full_circuit
from mgprune.checks import trusted
from mgprune.evaluation import bound, cut_by_size
from mgprune.objective import kl_divergence
from mgprune.recipe import Recipe
from mgprune.streams import prepare
from mgprune.trimming import closing, parts, trimmed, without


@pytest.fixture(scope="module")
def task(model):
    return tasks.ioi(model, n=(64, 64, 64))


@pytest.fixture(scope="module")
def examples(model, task):
    return prepare(model, task, "valid")


def divergence(circuit, examples):
    "Of each pair, by masks that close nothing but what the circuit closes"
    return kl_divergence(examples.full, examples.logits(circuit.masks())).double()


def closed_by_hand(circuit, level, node):
    "The circuit without a head, MLP or expert"
    kept = {l: k.clone() for l, k in circuit.kept.items()}
    kept[level][node] = False
    return from_kept(kept, circuit.sites)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral", "deepseek_v3"])
def test_every_part_is_needed_or_gone(kind):
    model = tiny(kind)
    examples = prepare(model, pairs())
    sites = examples.sites
    draw = torch.Generator().manual_seed(0)
    scores = {"head": torch.rand(sites.n_layers, sites.n_heads, generator=draw), "mlp": torch.rand(sites.n_layers, generator=draw)}
    circuit = from_scores(scores, sites, cut_by_size(scores, sites, .7))
    allowed = 1.3 * divergence(circuit, examples).mean().item()
    small = trimmed(circuit, examples, allowed)
    assert divergence(small, examples).mean() <= allowed and not (small.masks().attention > circuit.masks().attention).any()
    levels = [level for level in ("head", "mlp", "expert") if level in small.kept]
    said = small.provenance.trimmed["over"]
    for level in levels:
        for node in small.nodes(level):
            by = divergence(closed_by_hand(small, level, node), examples).mean().item() - allowed
            assert by > 0 and said[level][".".join(map(str, node))] == pytest.approx(by, abs=2e-5)  # all pairs are measured: there are few
    assert {*said} == {*levels} | {f"neurons of {level}" for level in levels} if small.n_neurons() else not said


def test_the_bound_is_held_and_not_the_mean_alone(model, examples):
    kept = {"head": torch.ones(4, 4, dtype=torch.bool), "mlp": torch.tensor([False, False, True, True])}
    circuit = from_kept(kept, examples.sites)
    for confidence in (None, .95):
        small = trimmed(circuit, examples, .5, confidence)
        assert bound(divergence(small, examples), confidence, examples.batch.words) <= .5
        assert small.provenance.trimmed["neurons"] == small.n_neurons() < small.provenance.trimmed["before"]


def test_where_it_is_to_be_sure_all_pairs_say_so(model):
    examples = prepare(model, tasks.ioi(model, n=(64, 100, 64)), "valid")
    kept = {"head": torch.arange(16).view(4, 4) < 8, "mlp": torch.tensor([True, False, False, False])}
    circuit = from_kept(kept, examples.sites)
    allowed = bound(divergence(circuit, examples), .95, examples.batch.words) + .02
    small = trimmed(circuit, examples, allowed, .95, sure=True)
    cost = closing(small, examples)
    assert small.provenance.trimmed["sure"] and bound(divergence(small, examples), .95, examples.batch.words) <= allowed
    for part in parts(small, cost) + parts(small, cost, .1): assert bound(divergence(without(small, part), examples), .95, examples.batch.words) > allowed
    quick = trimmed(circuit, examples, allowed, .95)  # which may leave more, and never breaks the budget
    assert bound(divergence(quick, examples), .95, examples.batch.words) <= allowed and quick.n_neurons() >= .9 * small.n_neurons()


def test_neurons_are_tried_by_their_slope(model, examples):
    circuit = full_circuit(examples.sites)
    circuit = without(circuit, parts(circuit, closing(circuit, examples))[0])
    cost = closing(circuit, examples)
    for part in parts(circuit, cost, .25):
        own, chosen = circuit.kept[part.finest] & part_of(circuit, part), part.neurons
        assert chosen.sum() == -(-own.sum() // 4) and (chosen & ~own).sum() == 0
        assert cost[part.finest][chosen].abs().max() <= cost[part.finest][own & ~chosen].abs().min()


def part_of(circuit, part):
    "The neurons of a head or an MLP of a model without experts"
    own = torch.zeros_like(circuit.kept[part.finest])
    own[part.node] = True
    return own


def test_a_found_circuit_is_a_cut_of_its_scores(model, task, tmp_path):
    quick = dict(kl=1., progress=False, recipe=Recipe(steps=20, pairs=32, confidence=None))
    circuit = discover(model, task, **quick)
    about = circuit.provenance
    assert about.trimmed["neurons"] < about.trimmed["before"]
    assert from_scores(circuit.scores, circuit.sites, about.settings["threshold"]) == circuit
    again = Circuit.load(circuit.save(tmp_path / "ioi.json"), model)
    assert again == circuit and again.provenance.trimmed == about.trimmed and "ablated alone, the least important part" in repr(again)
    whole = discover(model, task, **quick | dict(recipe=Recipe(steps=20, pairs=32, confidence=None, trim=False)))
    assert whole.n_neurons() == about.trimmed["before"] and whole.provenance.trimmed is None and "ablated alone" not in repr(whole)


@pytest.mark.parametrize("levels, finest", [(("head", "mlp"), ()), (("head", "mlp_neuron"), ("mlp_neuron",)), (("block",), ())])
def test_only_what_was_searched_is_closed(model, task, levels, finest):
    circuit = discover(model, task, kl=2., levels=levels, progress=False, recipe=Recipe(steps=12, pairs=32, confidence=None))
    kept, whole = circuit.kept, {"attention_neuron": circuit.kept["head"][..., None], "mlp_neuron": circuit.kept["mlp"][:, None]}
    for level, parent in whole.items():
        if level not in finest: assert torch.equal(kept[level], parent.expand_as(kept[level]))
    if levels == ("block",): assert torch.equal(kept["head"], kept["block"][:, None].expand_as(kept["head"]))
    assert from_scores(circuit.scores, circuit.sites, circuit.provenance.settings["threshold"]) == circuit


@pytest.mark.parametrize("kl, kept", [(1e-9, True), (1e9, False)])
def test_ends(examples, kl, kept):
    circuit = from_kept({"head": torch.arange(16).view(4, 4) > 7}, examples.sites)
    found = trimmed(circuit, examples, kl)
    assert found == circuit if kept else found.n_neurons() == 0
    assert found.provenance.trimmed["over"] == {}


def test_an_interrupted_one_leaves_the_model_as_it_came(model, examples, monkeypatch):
    from mgprune import trimming
    from test_compact import state
    before, calls = state(model), []
    def interrupted(*of):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return one_pass(*of)
    one_pass = trimming.one_pass
    monkeypatch.setattr(trimming, "one_pass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(3): closing(full_circuit(examples.sites), examples)
    assert state(model) == before and trusted(model)


def test_it_says_what_it_had_no_time_to_try(model, examples, monkeypatch):
    from mgprune import trimming
    circuit = from_kept({"head": torch.ones(4, 4, dtype=torch.bool), "mlp": torch.tensor([True, False, False, False])}, examples.sites)
    allowed = divergence(circuit, examples).mean().item() + 1e-4
    whole = trimmed(circuit, examples, allowed)
    about = whole.provenance.trimmed
    assert about["untried"] == 0 and "not tried" not in repr(whole)
    for level in ("head", "mlp"): assert {*about["over"][level]} == {".".join(map(str, node)) for node in whole.nodes(level)}
    monkeypatch.setattr(trimming, "PASSES", 2)
    monkeypatch.setattr(trimming, "ENOUGH", 0)
    some = trimmed(circuit, examples, allowed)
    about = some.provenance.trimmed
    named, parts_left = sum(map(len, about["over"].values())), 2 * (len(some.nodes("head")) + len(some.nodes("mlp")))
    assert 0 < about["untried"] <= parts_left - named
    assert divergence(some, examples).mean() <= allowed
    assert not named or f"{about['untried']} heads, MLPs or tenths of their neurons were not tried" in repr(some)
