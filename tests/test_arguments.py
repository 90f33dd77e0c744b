"""Every public function meets arguments of wrong types, ranges and shapes: it gives a result, or says in an InputError what is wrong."""
import importlib
import inspect
import math
import random
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mgprune
from families import pairs, tiny
from mgprune import Circuit, load_model, plots, tasks
from mgprune.attribution import attribute
from mgprune.circuit import from_kept, full_circuit
from mgprune.gates import HardConcrete, Sigmoid
from mgprune.models import EMBEDDED, InputError
from mgprune.recipe import Goal, Recipe
from mgprune.sites import find_sites
from mgprune.streams import Batch, prepare

MODULES = ("attribution", "circuit", "corruption", "evaluation", "export", "files", "models", "pairs", "planning", "plots", "reading",
           "streams", "tasks", "training", "widgets", "words")
MEASURES = ("worth", "agreement", "curves", "necessity", "hypotheses", "controls", "report", "prompts", "trimming", "edge_search")
HUB = {"push_to_hub", "from_hub"}          # would ask the network


def public(modules=MODULES):
    "Name -> function, for every function of a module that checks its arguments, whether or not the module lists it"
    found = {}
    for module in map(importlib.import_module, (f"mgprune.{name}" for name in modules)):
        for name, f in vars(module).items():
            if name.startswith("_"): continue
            if getattr(f, "__module__", None) == module.__name__ and getattr(f, "checks_arguments", False):
                found[f"{module.__name__.removeprefix('mgprune.')}.{name}"] = f
    return found


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    "Argument name -> a value that fits, for a search that takes no time"
    folder, model = tmp_path_factory.mktemp("valid"), load_model()
    task, sites = tasks.ioi(model, n=(4, 2, 2)), find_sites(model)
    circuit = mgprune.discover(model, task, keep=.1, recipe=Recipe(steps=2, batch_size=2), progress=False)
    examples = prepare(model, task.batch("test"))
    batch, path = task.batch("test"), circuit.save(folder / "circuit.json")
    rows = [dict(clean=p.clean, corrupt=p.corrupt, answer=p.answer, wrong=p.wrong) for p in task.train]
    return dict(
        model=model, task=task, sites=sites, circuit=circuit, a=circuit, b=full_circuit(sites), examples=examples, batch=batch, pairs=rows, source=rows,
        scores=attribute(model, examples, "gradient"), kept=circuit.kept, f=torch.logical_or, recipe=Recipe(steps=1, batch_size=2), gate=Sigmoid(), progress=False,
        keep=.2, kl=None, penalties=None, levels=("head", "mlp"), seed=0, n=(3, 1, 1), threshold=0., provenance={}, measure="kl", steps=1,
        batch_size=2, sizes=(.5,), path=path, folder=folder / "new", memory=0, circuits=[circuit], text="The war", words=["Mary"], question="Who?",
        answer=" Mary", level="head", pair=task.test[0], prompt=task.test[0].clean, splits="test", output=False, closed=True, confidence=None, faithfulness=None, guess=None, tries=1,
        heads=[(0, 0)], places=[(0, 0, 0)], pool=tasks.word_pool(model), slots=dict(first="Mary", second="John", giver="John"), rng=random.Random(0))


def arguments(name, f, valid, tmp_path):
    "Arguments that fit the function, as far as they have no default"
    special = {
        "models.load_model": {}, "circuit.load": dict(path=valid["path"]), "circuit.save": dict(path=tmp_path / "c.json"), "export.write": dict(path=tmp_path / "c.csv"),
        "export.export": dict(path=tmp_path / "e"), "export.to_folder": dict(path=tmp_path / "t"), "files.write_file": dict(path=tmp_path / "f", content=b"x"),
        "evaluation.cut_by_kl": dict(kl=1.), "evaluation.score": dict(found=valid["circuit"], truth=valid["circuit"].kept), "evaluation.neurons_at": dict(kl=3.), "tasks.load": dict(name="ioi", n=(3, 1, 1)), "plots.save_figures": dict(folder=tmp_path / "p"),
        "pairs.cut_before": dict(text="When Mary met John, John saw Mary", answer=" Mary"), "training.discover": dict(keep=.2, recipe=valid["recipe"], progress=False),
        "training.sweep": dict(keep=(.2,), recipe=valid["recipe"], progress=False),
        "corruption.corruption_named": dict(name="swap_subject", allowed=("swap_subject",)), "corruption.random_tokens": dict(rng=random.Random(0)),
        **{f"corruption.{name}": dict(slots=slots) for name, slots in SLOTS.items()}, "plots.written_logits": dict(level="attention_neuron"),
        "pairs.read_prompt": dict(tokenizer=valid["model"].tokenizer), "pairs.answer_id": dict(tokenizer=valid["model"].tokenizer),
        "tasks.templated": dict(name="own", templates=["Then {name} met"], draw=someone, corruption="other_gender"),
        "files.write_folder": dict(path=tmp_path / "w", fill=lambda folder: (folder / "a").write_text("a")),
    }.get(name, {})
    if name.startswith("tasks.") and "n" in inspect.signature(f).parameters: special.setdefault("n", (3, 1, 1))
    needed = {p.name for p in inspect.signature(f).parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return {k: valid[k] for k in needed if k in valid and k not in special} | special


BRIEF = Recipe(steps=2, confidence=None)
QUICK = {  # of the measures, so that one that takes its arguments takes no time
    "agreement.optimal": dict(steps=1), "agreement.under_ablations": dict(ablations=("zero",), draws=5), "controls.controls": dict(draws=1, shares=(.5,), most=2),
    "curves.mib_curve": dict(draws=5, fractions=(.5,)), "curves.read_scores": dict(source=[(0, 0)]), "edge_search.edges": dict(recipe=BRIEF, kl=5.), "edge_search.thinned": dict(recipe=BRIEF, kl=5.),
    "hypotheses.hypotheses": dict(draws=1, shuffles=3, most=2),
    "necessity.necessity": dict(draws=1, steps=1, tries=1, most=2), "prompts.by_prompt": dict(most=2, steps=1), "report.report": dict(draws=1, most=2, ablations=("zero",)),
    "trimming.trimmed": dict(kl=5.), "worth.worth": dict(draws=5), "worth.difference": dict(draws=5)}


def someone(pool, rng): return tasks.Drawn(dict(name=rng.choice(pool["names"])), " Anna")


SLOTS = dict(
    year_01=dict(century="17", tens="3", units="2"), decade_start=dict(century="17", tens="3", units="2"), other_gender=dict(name="Mary"),
    neutral_word=dict(name="Mary"), other_number=dict(subject="cat", counterpart="cats"), other_question=dict(asked="France", other="Spain"),
    swap_listed=dict(right="cat", other="dog", listed0="cat", listed1="dog"), unrelated_words=dict(listed0="cat"))
WRONG = [None, True, -1, 0, 10 ** 400, math.nan, math.inf, -2.5, 3.7, "", "nonsense", "\0", "\ud800", b"bytes", [], {}, (), (1,), ["head", "head"], {"head": 1},
         {"x": torch.ones(2)}, {"head": torch.ones(2, 2)}, object(), torch.zeros(2), len, int, Path("/no/such/place"), Sigmoid, HardConcrete(), Goal(kl=1), range(3)]
OWN = {("agreement.optimal", "loss"), ("files.write_folder", "fill"), ("tasks.templated", "draw"), ("tasks.templated", "corruption")}  # a function of the caller's, whose errors are the caller's
ADVICE = re.compile("expected|: |[Uu]se |[Gg]ive ")
SLOW = {"attribution.patching"}  # closes every neuron: only what it refuses is tried


def outcome(f, given):
    "'result', 'refused', or the name of another error; a refusal says what was expected or what to do"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            f(**given)
    except InputError as e: return "refused" if ADVICE.search(str(e)) else f"says too little: {e}"[:200]
    except Exception as e: return f"{type(e).__name__}: {e}"[:200]
    return "result"


def test_every_public_function_gives_a_result_or_says_what_is_wrong(valid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts, bad, functions, draw = {"result": 0, "refused": 0}, [], public(), random.Random(0)
    assert len(functions) > 60
    for number, (name, f) in enumerate(functions.items()):
        if f.__name__ in HUB: continue
        for parameter in inspect.signature(f).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD or (name, parameter.name) in OWN: continue
            for i, wrong in enumerate(draw.sample(WRONG, 8)):  # all of them take minutes
                (place := tmp_path / f"{number}-{parameter.name}-{i}").mkdir()
                given = arguments(name, f, valid, place) | {parameter.name: wrong}
                if name in SLOW and parameter.name not in ("model", "task"): continue
                said = outcome(f, given)
                if said in counts: counts[said] += 1
                else: bad.append(f"{name}({parameter.name}={wrong!r:.40}): {said}")
    assert not bad, f"{len(bad)} of {sum(counts.values()) + len(bad)}\n" + "\n".join(bad)
    assert counts["refused"] > 1000


def test_every_measure_says_what_is_wrong(valid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused, bad, functions, draw = 0, [], public(MEASURES), random.Random(0)
    model = load_model()  # that of the others has been looked into, and keeps the hooks that its library put there
    small = {"model": model, "examples": prepare(model, valid["batch"]), "circuit": full_circuit(valid["sites"]), "task": valid["task"].test, "kl": 5., "progress": False}
    small["graph"] = mgprune.edges(small["circuit"], model, small["task"], kl=5., learn=False, recipe=BRIEF)
    assert {*functions} == {*QUICK}
    for name, f in functions.items():
        for parameter in inspect.signature(f).parameters:
            if (name, parameter) in OWN: continue
            for wrong in draw.sample(WRONG, 12):
                given = {k: v for k, v in (valid | small).items() if k in inspect.signature(f).parameters} | QUICK[name]
                if name == "worth.difference": given["other"] = small["circuit"]
                said = outcome(f, given | {parameter: wrong})
                if said == "result": break  # what it takes is tried once, for it takes time
                if said == "refused": refused += 1
                else: bad.append(f"{name}({parameter}={wrong!r:.40}): {said}")
    assert not bad, f"{len(bad)}\n" + "\n".join(bad)
    assert refused > 300


def test_a_graph_says_what_is_wrong(valid):
    model = load_model()
    graph = mgprune.edges(valid["circuit"], model, valid["task"], kl=5., learn=False, recipe=BRIEF)
    draw, bad = random.Random(0), []
    given = dict(model=model, task=valid["task"], pairs=valid["task"], n=2, most=5, other=graph)
    for name in ("paths", "evaluate", "applied", "plot", "jaccard", "wires"):
        f = getattr(graph, name)
        for parameter in inspect.signature(f).parameters:
            for wrong in draw.sample(WRONG, 10):
                fitting = {k: v for k, v in given.items() if k in inspect.signature(f).parameters}
                said = outcome(f, fitting | {parameter: wrong})
                if said not in ("result", "refused"): bad.append(f"{name}({parameter}={wrong!r:.40}): {said}")
    for make in (lambda wrong: mgprune.Graph(wrong, graph.circuit), lambda wrong: mgprune.Graph(graph.kept, wrong), lambda wrong: graph | wrong):
        for wrong in draw.sample(WRONG, 10):
            if (said := outcome(make, dict(wrong=wrong))) != "refused": bad.append(f"{wrong!r:.40}: {said}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("make", [Recipe, HardConcrete, Goal, tasks.Pair])
def test_values_are_checked_where_they_are_made(make):
    start = {tasks.Pair: dict(clean="a", corrupt="b", answer="c"), Goal: {}}.get(make, {})
    for name in inspect.signature(make).parameters:
        for wrong in WRONG:
            assert outcome(make, start | {name: wrong}) in ("result", "refused"), (name, wrong)


def test_batches_of_other_shapes_are_refused():
    model, batch = tiny("llama"), pairs()
    others = [Batch(batch.clean[:, 1:], batch.corrupt, batch.attention_mask, batch.answer, batch.wrong), batch[:0],
              Batch(batch.clean, batch.corrupt, 1 - batch.attention_mask, batch.answer, batch.wrong), Batch(batch.clean + 100, batch.corrupt, batch.attention_mask, batch.answer, batch.wrong),
              replace(batch, words=batch.answer[:1]), replace(batch, words=batch.answer[:, 0]), replace(batch, words=batch.answer.float())]
    for other in others:
        with pytest.raises(InputError): prepare(model, other)
    with pytest.raises(InputError): prepare(model, [1])


def test_a_circuit_takes_only_tensors_of_its_model():
    sites = find_sites(load_model())
    for wrong in WRONG:
        assert outcome(Circuit, dict(kept=wrong, sites=sites)) == "refused", wrong
        if wrong != {}: assert outcome(Circuit, dict(kept=full_circuit(sites).kept, sites=wrong)) == "refused", wrong
    assert (from_kept({"head": torch.ones(4, 4, dtype=torch.bool)}, sites) == None) is False  # noqa: E711


def test_the_embedded_folder_is_a_path_too():
    assert load_model(EMBEDDED).num_parameters() == load_model().num_parameters()
