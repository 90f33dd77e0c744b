"""Long runs lose nothing: a search that is interrupted, killed or broken off by an error goes on to the same bits."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kills
import resumed
from mgprune import Circuit, cli, discover, files, load_model, planning, plots, processes, recipe, resume, search, sweep, tasks, training
from mgprune.ablations import ablation_named
from mgprune.files import LOCK, STATE, read_state, working_in, write_state
from mgprune.gates import HardConcrete, StraightThrough
from mgprune.models import InputError
from mgprune.recipe import Recipe

ROOT = Path(__file__).parent.parent
QUICK = dict(recipe=Recipe(steps=24, pairs=32, confidence=None), progress=False)
PRICES = {"head": .01, "mlp": .01, "attention_neuron": 1e-4, "mlp_neuron": 1e-4}


@pytest.fixture(scope="module")
def task(model):
    return tasks.ioi(model, n=(40, 16, 16))


def same(a, b):
    "Whether two circuits are the same to the last bit, in all but what the search took"
    apart = ("seconds", "peak_mb")
    plain = [json.loads(json.dumps({k: v for k, v in c.provenance.items() if k not in apart})) for c in (a, b)]
    return a == b and plain[0] == plain[1] and a.scores.keys() == b.scores.keys() and all(torch.equal(s, b.scores[l]) for l, s in a.scores.items())


# --- the same bits

GOALS = {"kl": dict(kl=.2), "keep": dict(keep=.2), "noise": dict(penalties=PRICES, gate=HardConcrete()), "noise_kl": dict(kl=.2, gate=HardConcrete()),
         "straight": dict(keep=.2, gate=StraightThrough()), "mean": dict(keep=.2, ablation="mean"), "output": dict(keep=.2, levels=("block", "head", "mlp_neuron", "mlp_output"))}


@pytest.mark.parametrize("options", GOALS.values(), ids=GOALS)
def test_a_search_that_was_interrupted_ends_in_the_same_bits(model, task, tmp_path, monkeypatch, options):
    whole = discover(model, task, **QUICK, **options)
    for breaks in ((1,), (2, 13), (24,), (5, 6, 7, 1, 1)):
        folder = tmp_path / "-".join(map(str, breaks))
        for number, k in enumerate(breaks):
            with monkeypatch.context() as patch:
                original, taken = search.step, []
                def step(search):
                    if len(taken) == k - 1:
                        if number % 2: original(search)  # done, but not noted
                        raise (KeyboardInterrupt, RuntimeError)[number % 2]
                    taken.append(original(search))
                patch.setattr(search, "step", step)
                with pytest.raises((KeyboardInterrupt, RuntimeError)): discover(model, task, **QUICK, **options, save=folder)
        found = discover(model, task, **QUICK, **options, save=folder)
        assert same(found, whole) and same(Circuit.load(folder / "circuit.json", model), whole)
        assert {p.name for p in folder.iterdir()} == {STATE, LOCK, "circuit.json"}


def test_a_sweep_goes_on_too(model, task, tmp_path, monkeypatch):
    whole = sweep(model, task, [.3, .1], **QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(search, "noted", stopping(search.noted, 9))
        with pytest.raises(KeyboardInterrupt): sweep(model, task, [.3, .1], **QUICK, save=tmp_path)
    assert read_state(tmp_path)[1]["steps"] == 8
    with monkeypatch.context() as patch:  # the search is at its end, and one of its circuits is written
        patch.setattr(training, "ended", stopping(training.ended, 2))
        with pytest.raises(KeyboardInterrupt): sweep(model, task, [.3, .1], **QUICK, save=tmp_path)
    assert (tmp_path / "circuit-0.3.json").exists() and not (tmp_path / "circuit-0.1.json").exists()
    for _ in range(2):
        found = sweep(model, task, [.3, .1], **QUICK, save=tmp_path)
        assert all(map(same, found, whole))
    monkeypatch.setattr(training, "learn", stopping(training.learn, 1))
    assert all(map(same, sweep(model, task, (.3, .1), **QUICK, save=tmp_path), whole))


def stopping(f, k):
    "The function, interrupted when it is called for the k-th time"
    calls = []
    def stopped(*of):
        calls.append(1)
        if len(calls) == k: raise KeyboardInterrupt
        return f(*of)
    return stopped


def test_the_same_bits_where_it_is_looked_only_now_and_then(model, task, tmp_path, monkeypatch):
    class Accelerated(search.Search):
        def __init__(self, *of, **options):
            super().__init__(*of, **options)
            self.period = 5
    monkeypatch.setattr(training, "Search", Accelerated)
    whole = discover(model, task, keep=.2, **QUICK)
    for k in (3, 8, 14, 20):
        with monkeypatch.context() as patch:
            patch.setattr(search, "slopes", stopping(search.slopes, k + 1))
            with pytest.raises(KeyboardInterrupt): discover(model, task, keep=.2, **QUICK, save=tmp_path / str(k))
        state = read_state(tmp_path / str(k))
        assert state[1]["steps"] == k // 5 * 5 if k >= 5 else state is None
        assert same(discover(model, task, keep=.2, **QUICK, save=tmp_path / str(k)), whole)


def test_interrupted_at_any_line(model, task, tmp_path, monkeypatch):
    "An interruption as Ctrl-C makes it, between any two lines of the search, of what notes it and of what writes it"
    draw, whole = random.Random(0), discover(model, task, keep=.2, **QUICK)
    monkeypatch.setattr(resume, "BETWEEN", 0)
    watched = {Path(module.__file__) for module in (files, processes, recipe, search, resume, planning, training)}
    for number in range(12):
        left = draw.randrange(1, 6000)
        def trace(frame, event, arg):
            nonlocal left
            if Path(frame.f_code.co_filename) not in watched: return None
            left -= 1
            if left == 0: raise KeyboardInterrupt
            return trace
        folder = tmp_path / str(number)
        sys.settrace(trace)
        try: discover(model, task, keep=.2, **QUICK, save=folder)
        except KeyboardInterrupt: pass
        finally: sys.settrace(None)
        assert same(discover(model, task, keep=.2, **QUICK, save=folder), whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")
def test_killed_at_any_moment():
    counts = resumed.table(runs=5)
    assert counts["the same bits"] == 5 and counts["killed"], counts
    assert {*counts} <= {"the same bits", "killed", "killed with a state", "ended"}, counts


# --- what it took

def test_seconds_add_up_and_pieces_are_written_now_and_then(model, task, tmp_path, monkeypatch):
    writes = []
    monkeypatch.setattr(resume, "write_state", lambda *of: (writes.append(of[2]), write_state(*of)))
    with monkeypatch.context() as patch:
        patch.setattr(search, "noted", stopping(search.noted, 9))
        with pytest.raises(KeyboardInterrupt): discover(model, task, keep=.2, **QUICK, save=tmp_path)
    assert [w["steps"] for w in writes] == [1, 8]
    tensors, values = read_state(tmp_path)
    write_state(tmp_path, tensors, values | dict(seconds=1000 + values["seconds"]))
    circuit = discover(model, task, keep=.2, **QUICK, save=tmp_path)
    assert 1000 < circuit.provenance.seconds < 1100 and [w["steps"] for w in writes] == [1, 8, 9, 24]
    monkeypatch.setattr(resume, "BETWEEN", 0)
    discover(model, task, keep=.2, **QUICK, save=tmp_path / "other")
    assert len(writes) == 4 + 24


def test_a_finished_search_is_read_back_and_cut_again_where_its_circuit_is_gone(model, task, tmp_path, monkeypatch, capsys):
    whole = discover(model, task, kl=.2, **QUICK, save=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(training, "learn", stopping(training.learn, 1))
        again = discover(model, task, kl=.2, recipe=QUICK["recipe"], save=tmp_path)
    assert same(again, whole) and again.provenance.seconds == whole.provenance.seconds and "read back" in capsys.readouterr().out
    (tmp_path / "circuit.json").unlink()
    monkeypatch.setattr(search, "step", stopping(search.step, 1))
    assert same(discover(model, task, kl=.2, **QUICK, save=tmp_path), whole)


def test_a_full_disk_ends_no_search(model, task, tmp_path, monkeypatch):
    whole, replace_file = discover(model, task, keep=.2, **QUICK), os.replace
    def full(*of): raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.replace", full)
    with pytest.warns(UserWarning, match="No space left.*The circuit is handed back"), pytest.warns(UserWarning, match="No space left.*The search goes on"):
        assert same(discover(model, task, keep=.2, **QUICK, save=tmp_path), whole)
    monkeypatch.setattr("os.replace", replace_file)
    assert os.listdir(tmp_path) == [] and same(discover(model, task, keep=.2, **QUICK, save=tmp_path), whole)


def test_answers_in_other_bits_are_warned_about(model, task, tmp_path, monkeypatch):
    def half(host, pairs, reference, output): return ablation_named("corrupt")(host, pairs, reference, output)
    def zero(host, pairs, reference, output): return ablation_named("zero")(host, pairs, reference, output)
    zero.__name__ = "half"
    with monkeypatch.context() as patch:
        patch.setattr(search, "noted", stopping(search.noted, 9))
        with pytest.raises(KeyboardInterrupt): discover(model, task, keep=.2, ablation=half, **QUICK, save=tmp_path)
    with pytest.warns(UserWarning, match="not the same to the last bit"): discover(model, task, keep=.2, ablation=zero, **QUICK, save=tmp_path)


# --- refusals

@pytest.fixture(scope="module")
def broken_off(model, task, tmp_path_factory):
    "The folder of a search that was interrupted"
    folder = tmp_path_factory.mktemp("runs") / "broken_off"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "noted", stopping(search.noted, 9))
        with pytest.raises(KeyboardInterrupt): discover(model, task, keep=.2, **QUICK, save=folder)
    return folder


def content(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("options, says", [
    (dict(keep=.3), "keep was 0.2 and is 0.3"), (dict(keep=None, kl=.1), "kl was None and is 0.1; keep was 0.2 and is None"),
    (dict(keep=None, penalties=PRICES), "penalties"), (dict(seed=1), ": seed was 0 and is 1. Ask for what"), (dict(levels=("head", "mlp_neuron")), "levels was "),
    (dict(recipe=Recipe(steps=25, pairs=32, confidence=None)), "recipe.steps was 24 and is 25"), (dict(recipe=Recipe(steps=24, confidence=None)), "recipe.pairs was 32 and is 512"),
    (dict(gate=HardConcrete()), "gate.name was 'Sigmoid' and is 'HardConcrete'"), (dict(ablation="zero"), "ablation was 'corrupt' and is 'zero'")])
def test_other_settings_are_refused_by_name(model, task, broken_off, options, says):
    before = content(broken_off)
    with pytest.raises(InputError, match="holds another search") as refusal: discover(model, task, **dict(keep=.2) | QUICK | options, save=broken_off)
    assert says in str(refusal.value) and "choose another folder, or remove that one" in str(refusal.value) and content(broken_off) == before


def test_other_pairs_weights_and_versions_are_refused(model, task, broken_off, monkeypatch):
    before = content(broken_off)
    def refused(m, t):
        with pytest.raises(InputError, match="holds another search") as refusal: discover(m, t, keep=.2, **QUICK, save=broken_off)
        return str(refusal.value)
    assert ": digest of the pairs was " in refused(model, replace(task, train=task.train[1:]))
    assert ": digest of the pairs was " in refused(model, replace(task, test=task.test[::-1]))
    assert ": task was 'ioi' and is 'gifts'" in refused(model, replace(task, name="gifts"))
    other = load_model()
    with torch.no_grad(): other.transformer.h[0].mlp.c_proj.bias[0] += 1
    assert ": fingerprint of the model was " in refused(other, task)
    monkeypatch.setattr(resume, "versions", lambda: dict(mgprune="0.0.9"))
    assert "version of mgprune was " in refused(model, task) and content(broken_off) == before
    with pytest.raises(InputError, match="holds another search: keep was 0.2"): sweep(model, task, [.2], **QUICK, save=broken_off)


@pytest.mark.parametrize("how", ["cut", "changed", "empty", "another"])
def test_a_damaged_state_is_refused_with_what_to_delete(model, task, broken_off, tmp_path, how):
    folder = shutil.copytree(broken_off, tmp_path / "run")
    state = (folder / STATE).read_bytes()
    (folder / STATE).write_bytes({"cut": state[:-100], "changed": state[:500] + bytes([state[500] ^ 1]) + state[501:], "empty": b"", "another": b"notes"}[how])
    with pytest.raises(InputError, match="search.state.* Delete this file, and the search begins anew"): discover(model, task, keep=.2, **QUICK, save=folder)
    (folder / STATE).unlink()
    assert same(discover(model, task, keep=.2, **QUICK, save=folder), discover(model, task, keep=.2, **QUICK))


def test_a_damaged_or_foreign_circuit_beside_a_search_is_refused(model, task, broken_off, tmp_path):
    other = discover(model, task, keep=.2, seed=1, **QUICK).save(tmp_path / "other.json").read_bytes()
    folder = shutil.copytree(broken_off, tmp_path / "run")
    for content, says in ((other, "is no circuit of the search beside it"), (other[:-9], "or delete circuit.json: it is made again")):
        (folder / "circuit.json").write_bytes(content)
        with pytest.raises(InputError, match=says): discover(model, task, keep=.2, **QUICK, save=folder)
        assert (folder / "circuit.json").read_bytes() == content
    (folder / "circuit.json").unlink()
    assert same(discover(model, task, keep=.2, **QUICK, save=folder), discover(model, task, keep=.2, **QUICK))


def test_a_folder_that_holds_something_else_is_left_alone(model, task, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds 'notes.txt', but no search"): discover(model, task, keep=.2, **QUICK, save=tmp_path)
    with pytest.raises(InputError, match="is a file"): discover(model, task, keep=.2, **QUICK, save=tmp_path / "notes.txt")
    with pytest.raises(InputError, match="cannot write into"): discover(model, task, keep=.2, **QUICK, save=tmp_path / "notes.txt" / "below")
    assert content(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(InputError): discover(model, task, levels="mlp_output", **QUICK, save=tmp_path / "new" / "run")
    assert content(tmp_path) == {"notes.txt": b"mine"}


def test_one_program_at_a_time(model, task, broken_off, tmp_path):
    folder, said = shutil.copytree(broken_off, tmp_path / "run"), []
    def second():
        try: discover(model, task, keep=.2, **QUICK, save=folder)
        except InputError as e: said.append(str(e))
    with working_in(folder):
        thread = threading.Thread(target=second)
        thread.start(), thread.join()
        elsewhere = f"from mgprune.files import working_in\nwith working_in({str(folder)!r}): pass"
        process = subprocess.run([sys.executable, "-c", elsewhere], capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert process.returncode == 1 and all("another program is at the search" in s for s in (*said, process.stderr)) and len(said) == 1
    assert same(discover(model, task, keep=.2, **QUICK, save=folder), discover(model, task, keep=.2, **QUICK))


# --- the command line

@pytest.fixture
def pairs(task, tmp_path):
    "A file of the task's pairs"
    path = tmp_path / "gifts.jsonl"
    path.write_text("\n".join(json.dumps(dict(clean=p.clean, corrupt=p.corrupt, answer=p.answer, wrong=p.wrong)) for p in task.train + task.valid + task.test))
    return str(path)


def test_an_interrupted_command_says_how_to_go_on_and_does(pairs, tmp_path, monkeypatch, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    monkeypatch.setattr(plots, "save_figures", kills.spots)
    command = ["discover", pairs, "--keep", ".2", "--steps", "40", "--out"]
    assert cli.main([*command, str(other)]) == 0
    def interrupt(*options):
        with monkeypatch.context() as patch:
            patch.setattr(search, "noted", stopping(search.noted, 20))
            assert cli.main([*command, str(out), *options]) == 130
        return capsys.readouterr().err
    assert f"mgprune: interrupted. The same command goes on from '{out / 'search'}'" in interrupt().splitlines()
    assert [p.name for p in out.iterdir()] == ["search"] and read_state(out / "search")[1]["steps"] == 19
    assert cli.main([*command, str(out), "--seed", "1"]) == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err and [p.name for p in out.iterdir()] == ["search"]
    assert cli.main([*command, str(out)]) == 0 and "goes on after step 19 of 40" in capsys.readouterr().out
    def names(folder): return {p.name for p in folder.iterdir()}
    assert names(out) == names(other) and same(Circuit.load(out / "circuit.json"), Circuit.load(other / "circuit.json"))

    results = content(out)  # another search leaves them until it is at its end
    assert cli.main([*command, str(out), "--seed", "1"]) == 2 and "or replace them with --force" in capsys.readouterr().err and content(out) == results
    interrupt("--seed", "1", "--force")
    assert names(out) == {*results, "search"} and results.items() <= {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}.items()
    assert cli.main([*command, str(out), "--seed", "1", "--force"]) == 0
    assert names(out) == {*results} and Circuit.load(out / "circuit.json").provenance.seed == 1


def test_a_command_that_was_ended_after_its_search_writes_what_it_found(pairs, tmp_path, monkeypatch, capsys):
    command = ["sweep", pairs, "--keep", ".3", ".2", "--steps", "40", "--out", f"{tmp_path}/out"]
    monkeypatch.setattr(plots, "save_figures", kills.spots)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "write_results", stopping(cli.write_results, 1))
        assert cli.main(command) == 130
    monkeypatch.setattr(training, "learn", stopping(training.learn, 1))
    assert cli.main(command) == 0 and "read back" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"768", "512", "frontier.png"}
