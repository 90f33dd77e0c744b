"Circuits, graphs and pairs that do not belong together are refused, wherever they meet; what a file says is checked before it is used."
import json
import os
import resource
from dataclasses import replace

import pandas as pd
import pytest
import torch

from mgprune import Circuit, Graph, edges, evaluate, load_model, prepare, tasks
from mgprune.agreement import optimal, under_ablations
from mgprune.arguments import InputError
from mgprune.circuit import as_text, full_circuit, intersection, jaccard, union
from mgprune.edge_search import thinned
from mgprune.export import to_folder
from mgprune.files import digest
from mgprune.graph import load as load_graph
from mgprune.prompts import by_prompt
from mgprune.recipe import Recipe
from mgprune.stability import consensus
from mgprune.training import discover
from mgprune.trimming import trimmed
from mgprune.worth import worth

QUICK = dict(recipe=Recipe(steps=3, confidence=None), progress=False)


@pytest.fixture(scope="module")
def task(model): return tasks.ioi(model, n=(32, 32, 16))


@pytest.fixture(scope="module")
def circuit(model, task): return discover(model, task, keep=.3, **QUICK)


@pytest.fixture(scope="module")
def other():
    "A model of the same shape with other weights"
    model = load_model()
    with torch.no_grad(): model.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    return model


@pytest.fixture(scope="module")
def graph(model, task, circuit): return edges(circuit, model, task, kl=1, learn=False, recipe=QUICK["recipe"])


def test_another_model_is_refused_by_all_that_measure(circuit, graph, other, task):
    elsewhere = prepare(other, task, "valid")
    for f in (lambda: trimmed(circuit, elsewhere, 1.), lambda: consensus([circuit, circuit]).cut(elsewhere, 1.), lambda: optimal(circuit, other, task, steps=1, most=8),
              lambda: under_ablations(circuit, other, task, ("corrupt", "mean")), lambda: graph.wires(other), lambda: evaluate(circuit, other, task)):
        with pytest.raises(InputError, match="this circuit belongs to 'embedded'"): f()


def test_circuits_of_two_models_have_no_union(circuit, other, task):
    theirs = discover(other, task, keep=.3, **QUICK)
    for f in (union, intersection):
        with pytest.raises(InputError, match="models with the fingerprints .*, .*: expected circuits of one model"): f(circuit, theirs)
    assert 0 < jaccard(circuit, theirs)["mlp_neuron"] <= 1  # which only compares
    bare = full_circuit(circuit.sites)
    assert union(circuit, bare) == bare and intersection(bare, circuit) == circuit


def test_ablations_are_known_before_any_is_measured(model, circuit, task):
    for wrong, says in ((("corrupt", "zro"), "ablation='zro': expected one of"), ((3,), "ablation=3"), ((), "expected at least one")):
        with pytest.raises(InputError, match=says): under_ablations(circuit, model, task, wrong)
    assert not under_ablations(circuit, model, task, ("corrupt",), draws=20).attrs["agree"]  # with nothing
    said = circuit.report(model, task, ablations=("corrupt",), draws=1, most=8, progress=False).verdicts.set_index("question")["verdict"]
    assert said["Whatever ablated nodes hold?"] == "not told: it was measured under 1 of them"


@pytest.mark.parametrize("loss, says", [
    (lambda logits, examples: 3., "loss returned 3.0: expected a tensor with one finite number for each"), (lambda logits, examples: logits.logsumexp(-1).mean(), "one finite number"),
    (lambda logits, examples: logits.sum(-1) * float("nan"), "one finite number"), (lambda logits, examples: logits.detach().sum(-1), "no slope to the logits")])
def test_a_loss_that_cannot_be_made_small_is_refused(model, circuit, task, loss, says):
    with pytest.raises(InputError, match=says): optimal(circuit, model, task, loss=loss, steps=1, most=4)


@pytest.mark.parametrize("change", [dict(arrays="AAAA"), dict(arrays="*"), dict(provenance=dict(metrics=3)), dict(provenance=dict(settings=3)), dict(provenance=3),
                                    dict(provenance=dict(trimmed=dict(over=3))), dict(provenance=dict(trimmed=dict(over=dict(edge=dict(a="b")))))])
def test_a_file_of_a_graph_that_says_nonsense_is_refused(graph, tmp_path, change):
    data = json.loads(graph.save(tmp_path / "graph.json").read_text())
    del data["digest"]
    data |= change
    (tmp_path / "graph.json").write_text(json.dumps(data | dict(digest=digest(as_text(data).encode()))))
    with pytest.raises(InputError, match="is not a graph, or was changed"): load_graph(tmp_path / "graph.json")


def test_nothing_of_an_origin_is_lost_in_a_file(circuit, graph, tmp_path):
    for of in (circuit, graph):
        with pytest.raises(InputError, match="has the keys"): replace(of, provenance={1: "a", "1": "b"}).save(tmp_path / "keys.json")
    odd = replace(circuit, provenance=replace(circuit.provenance, metrics=circuit.provenance.metrics | dict(faithfulness=float("nan"), kl=float("inf"))))
    text = odd.save(tmp_path / "odd.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = Circuit.load(tmp_path / "odd.json")
    assert again == circuit and again.provenance.metrics["faithfulness"] is None and "Circuit of embedded" in repr(again)


def test_a_report_is_json_where_an_interval_is_unknown(model, circuit, task, tmp_path):
    path = circuit.report(model, task.test[:1], ablations=("corrupt", "zero"), draws=1, progress=False).write(tmp_path / "one.json")
    assert json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["complement"]["low"] is None


def test_a_graph_finds_its_wires_on_a_model_that_nobody_has_seen(graph, task, tmp_path):
    fresh = load_model()
    assert len(Graph.load(graph.save(tmp_path / "graph.json")).wires(fresh).writers) > 1
    with pytest.raises(InputError, match="without edges has nothing to thin"): thinned(graph - graph, fresh, task, kl=20., recipe=QUICK["recipe"])


def test_a_model_whose_inputs_ask_for_gradients(model, task):
    tuned = load_model()
    tuned.enable_input_require_grads()
    found, plain = (by_prompt(m, task.test[:8], most=4, steps=1, kl="50%") for m in (tuned, model))
    assert found.prompts["kl"].tolist() == pytest.approx(plain.prompts["kl"].tolist(), rel=1e-4)
    examples = prepare(tuned, task, most=4)
    assert not examples.logits(full_circuit(examples.sites).masks()).requires_grad
    masks = full_circuit(examples.sites).masks()
    assert examples.logits(masks._replace(mlp=masks.mlp.requires_grad_())).requires_grad


def test_labels_that_are_missing_are_a_group(model, circuit, task):
    missing = float("nan")
    for none in (missing, None, pd.NA):
        table = worth(circuit, model, task.test[:8], by=dict(kind=["x", none, none, "y", "x", "y", none, "x"]), draws=20).table
        groups = table[(table["measure"] == "kl") & (table["by"] == "kind")]
        assert groups["pairs"].tolist() == [3, 3, 2] and pd.isna(groups["group"].iloc[1])


def test_autocast_is_refused(model, circuit, task):
    for f in (lambda: evaluate(circuit, model, task), lambda: discover(model, task, keep=.3, **QUICK)):
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(InputError, match="torch.autocast is on"): f()


@pytest.mark.skipif(os.name != "posix", reason="a limit of POSIX")
def test_a_full_disk_is_said_of_the_folder_that_was_asked_for(model, circuit, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match="cannot write '.*checkpoint'.*File too large"): circuit.export(model, tmp_path / "checkpoint")
        with pytest.raises(InputError, match="cannot write '.*shared': File too large"): to_folder(circuit, tmp_path / "shared")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [*tmp_path.iterdir()]


def test_the_folder_that_one_works_in_is_gone(model, circuit, task, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for f in (lambda: to_folder(circuit, "x"), lambda: circuit.export(model, "x"), lambda: circuit.save("x"), lambda: discover(model, task, keep=.3, save="run", **QUICK)):
        with pytest.raises(InputError, match="cannot write"): f()
    assert to_folder(circuit, tmp_path / "x").is_dir()


def test_tables_as_spreadsheets_and_frames_write_them(model, task, tmp_path):
    frame = pd.DataFrame([dict(clean=p.clean, corrupt=p.corrupt, answer=p.answer[0], wrong=p.wrong[0]) for p in task.test])
    frame.to_csv(tmp_path / "bar.csv", sep="|", index=False)
    (tmp_path / "excel.csv").write_text("sep=;\r\n" + frame.to_csv(sep=";", index=False))
    read = tasks.read_pairs(frame)
    for source in (tmp_path / "bar.csv", tmp_path / "excel.csv", frame.set_index("clean"), frame.set_index(["clean", "corrupt"]), frame.set_index("clean", drop=False)):
        assert tasks.read_pairs(source) == read
