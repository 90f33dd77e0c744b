"""Searches that must fail clearly, and a model that must leave as it came."""
import dataclasses
import json
import math
import warnings

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mgprune import Circuit, discover, evaluate, load_model, search, sweep, tasks
from mgprune.circuit import from_scores
from mgprune.recipe import Goal, Recipe
from mgprune.training import check_circuit
from mgprune.tree import level_shapes
from mgprune.models import InputError, fingerprint
from mgprune.sites import find_sites

QUICK = Recipe(steps=20, confidence=None)


@pytest.fixture(scope="module")
def task(model):
    return tasks.ioi(model, n=(48, 16, 16))


@pytest.fixture(scope="module")
def circuit(model, task):
    return discover(model, task, kl=.1, recipe=QUICK, progress=False)


def state(model):
    return ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()], [p.grad for p in model.parameters()], fingerprint(model))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_model_leaves_as_it_came(task, monkeypatch, error):
    model = load_model().train()
    model.transformer.wte.weight.requires_grad_(False)
    before = state(model)
    if error is None:
        discover(model, task, keep=.1, recipe=QUICK, progress=False)
    else:
        step, calls = search.step, []
        def fails(search):
            calls.append(1)
            if len(calls) > 3: raise error
            step(search)
        monkeypatch.setattr(search, "step", fails)
        with pytest.raises(error): discover(model, task, recipe=QUICK, progress=False)
    assert state(model) == before


def test_same_seed_same_circuit(model, task):
    first, second, other = (discover(model, task, keep=.1, seed=s, recipe=QUICK, progress=False) for s in (0, 0, 1))
    assert first == second and all(torch.equal(first.scores[l], second.scores[l]) for l in first.scores)
    assert any(not torch.equal(first.scores[l], other.scores[l]) for l in first.scores)


@pytest.mark.parametrize("levels", [("head",), ("head", "mlp"), ("mlp_neuron",), ("attention", "head", "mlp", "attention_neuron", "mlp_neuron", "mlp_output")])
def test_levels_are_selectable(model, task, levels):
    circuit = discover(model, task, penalties=dict.fromkeys(levels, .01), levels=levels, recipe=QUICK, progress=False)
    assert set(circuit.scores) == set(levels) and {"block", "head", "mlp", "attention_neuron", "mlp_neuron"} <= set(circuit.counts())
    assert abs(evaluate(circuit, model, task)["kl"] - circuit.provenance["metrics"]["kl"]) < 1e-6


@pytest.mark.parametrize("wrong, says", [(dict(kl=-1), "above 0"), (dict(keep=2), "at most 1"), (dict(kl=.1, keep=.1), "exactly one"),
                                         (dict(levels=["neuron"]), "expected one or more"), (dict(levels=[]), "expected one or more"),
                                         (dict(penalties={"head": -1}), "0 or more"), (dict(keep=(.1, .2)), "sweep takes several")])
def test_wrong_arguments(model, task, wrong, says):
    with pytest.raises(InputError, match=says): discover(model, task, progress=False, **wrong)


def test_sweep_is_nested_and_of_the_sizes_asked_for(model, task):
    circuits = sweep(model, task, keep=(.3, .1, .02), recipe=QUICK, progress=False)
    assert [c.n_neurons() for c in circuits] == [round(k * 2560) for k in (.3, .1, .02)]
    assert all((small.kept[l] <= large.kept[l]).all() for large, small in zip(circuits, circuits[1:]) for l in small.kept)
    assert all(abs(evaluate(c, model, task)["kl"] - c.provenance["metrics"]["kl"]) < 1e-6 for c in circuits)


def test_a_share_and_a_faithfulness_hold_on_the_pairs_to_choose_on(model, task, tmp_path):
    circuits = sweep(model, task, kl=("20%", "10%"), faithfulness=.2, recipe=QUICK, progress=False)
    for circuit, share in zip(circuits, (.2, .1)):
        measured = evaluate(circuit, model, list(task.valid))
        assert measured["kl"] <= share * measured["closed_kl"] and abs(1 - measured["faithfulness"]) <= .2
    one = discover(model, task, kl="10%", faithfulness=.2, recipe=QUICK, progress=False)
    measured = evaluate(one, model, list(task.valid))
    assert measured["kl"] <= .1 * measured["closed_kl"] and one.provenance["hold_out"] == "words"
    for circuit in (one, *circuits): assert Circuit.load(circuit.save(tmp_path / "share.json"), model) == circuit
    with pytest.raises(InputError, match="16 validation pairs .* expected at least 59"): discover(model, task, kl=.1, progress=False)
    with pytest.raises(InputError, match="at most 0.5: how far from 1"): discover(model, task, kl=.1, faithfulness=.9)


def test_nan_is_refused(task):
    broken = load_model()
    with torch.no_grad(): broken.transformer.h[1].mlp.c_proj.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"): discover(broken, task, recipe=QUICK, progress=False)


def test_unknown_architecture(task):
    class Other(torch.nn.Module): pass
    with pytest.raises(InputError, match="Other has no config: hand over the Hugging Face model"): discover(Other(), task)


def test_a_model_that_cannot_do_the_task(task):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=64, vocab_size=len(task.tokenizer), bos_token_id=0, eos_token_id=0)
    with pytest.warns(UserWarning) as seen: discover(load_model(GPT2LMHeadModel(config), task.tokenizer), task, recipe=QUICK, progress=False)
    said = " ".join(str(w.message) for w in seen)
    assert "correct on only" in said and "the corruption changes (almost) nothing" in said
    assert "Ask for a smaller kl" not in said and "This comes of what was warned of before the search: the model is correct on only" in said


def test_all_closed_and_all_open(model, task):
    with pytest.warns(UserWarning, match="all gates are closed"):
        discover(model, task, penalties=dict.fromkeys(("block", "head", "mlp"), 1e6), recipe=dataclasses.replace(QUICK, steps=60, rate=.5), progress=False)
    with pytest.warns(UserWarning, match="all gates are open"): discover(model, task, penalties={}, recipe=QUICK, progress=False)


def test_over_the_budget_and_half_way(model):
    sites = find_sites(model)
    undecided = from_scores({l: torch.zeros(s) for l, s in level_shapes(sites).items()}, sites, -.5, dict(metrics=dict(kl=.2), settings=dict(threshold=-.5)))
    felt = {l: torch.ones_like(s, dtype=torch.bool) for l, s in undecided.scores.items()}
    with pytest.warns(UserWarning) as seen: check_circuit(undecided, Goal(kl=.1), felt)
    said = " ".join(str(w.message) for w in seen)
    assert "KL 0.2 on held-out pairs, over the 0.1 asked for" in said and "100% of the gates are stuck half-way" in said


def test_hardly_smaller_than_the_model(model):
    sites = find_sites(model)
    scores = {l: torch.arange(math.prod(s), dtype=torch.float).view(s) for l, s in level_shapes(sites, ["mlp_neuron"]).items()}
    large = from_scores(scores, sites, 99., dict(metrics=dict(kl=.05), settings=dict(threshold=99.)))
    felt = {l: torch.ones_like(s, dtype=torch.bool) for l, s in scores.items()}
    share = large.n_neurons() / 2560
    assert .9 < share < 1
    with pytest.warns(UserWarning, match=f"the circuit keeps {share:.0%} of the neurons: it says little"): check_circuit(large, Goal(kl=.1), felt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_circuit(large, Goal(keep=share), felt)  # who asks for the size knows it


def test_circuit_of_another_model(model, task, circuit, tmp_path):
    path = circuit.save(tmp_path / "ioi.json")
    other = load_model()
    with torch.no_grad(): other.transformer.h[0].mlp.c_fc.bias[0] += 1
    with pytest.raises(InputError, match="fingerprint"): Circuit.load(path, other)
    with pytest.raises(InputError, match="fingerprint"): evaluate(circuit, other, task)
    assert Circuit.load(path, model) == circuit


def test_damaged_files(circuit, tmp_path):
    path = circuit.save(tmp_path / "ioi.json")
    text = path.read_text()
    edited = json.loads(text); edited["counts"]["head"] = [1, 16]
    for damaged in (text[:-40], json.dumps(edited), "{}", "", text.replace('"arrays": "', '"arrays": "AAAA')):
        path.write_text(damaged)
        with pytest.raises(InputError): Circuit.load(path)
    with pytest.raises(InputError, match="cannot read"): Circuit.load(tmp_path / "missing.json")
