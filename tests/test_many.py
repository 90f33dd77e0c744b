"""Many searches in one call: the same circuits in turn and side by side, files that are never mistaken, failures and interrupts that lose nothing."""
import functools
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch

from mgprune import Circuit, discover, discover_all, load_model, many, tasks
from mgprune.ablations import zero
from mgprune.many import arguments_of, content, named
from mgprune.models import InputError, fingerprint
from mgprune.recipe import Recipe

QUICK = Recipe(steps=8, confidence=None, trim=False)


@pytest.fixture(scope="module")
def task(model):
    return tasks.ioi(model, n=(48, 16, 16))


@pytest.fixture
def ray():
    return pytest.importorskip("ray")


def name(job):
    return named([arguments_of(job, 0)])[0].name


def scaled(factor):
    def ablation(host, pairs, reference, output): return zero(host, pairs, reference, output).map(lambda t: factor * t)
    return ablation


def fails(host, pairs, reference, output):
    raise RuntimeError("out of luck")


def dies(host, pairs, reference, output):
    os._exit(1)


def same_bits(a, b):
    return (a == b and all(torch.equal(s, b.scores[l]) for l, s in a.scores.items())
            and all(a.provenance[k] == b.provenance[k] for k in a.provenance if k not in ("seconds", "peak_mb")))


# --- on Ray

def test_side_by_side_as_in_turn(ray, model, task, tmp_path):
    jobs = [dict(model=model, task=task, seed=seed, recipe=QUICK, **asked) for seed in (0, 1)
            for asked in (dict(kl=.3), dict(keep=.1), dict(kl=.3, ablation=scaled(.5)))]
    jobs += [dict(model="embedded", task=task, seed=seed, recipe=QUICK, kl=.3, levels=("head", "mlp")) for seed in (0, 1)]
    assert len(jobs) == 8
    surroundings = dict(os.environ), signal.getsignal(signal.SIGTERM), torch.get_num_threads(), fingerprint(model)
    in_turn, one = discover_all(jobs, tmp_path / "in turn", workers=1, progress=False)
    together, two = discover_all(jobs, tmp_path / "together", workers=2, progress=False)
    assert not ray.is_initialized() and not psutil.Process().children(recursive=True)
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM), torch.get_num_threads(), fingerprint(model)) == surroundings
    assert all(map(same_bits, in_turn, together)) and not two.error.any()
    unlike = ["seconds", "file"]
    assert one.drop(columns=unlike).equals(two.drop(columns=unlike))
    alone = discover(**jobs[0], progress=False)
    assert alone == together[0] and alone.provenance["history"] == together[0].provenance["history"]
    assert sorted(p.name for p in (tmp_path / "together").iterdir()) == sorted(p.name for p in (tmp_path / "in turn").iterdir())


def test_a_search_that_fails_or_dies_leaves_the_others(ray, model, task, tmp_path):
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        jobs = [dict(model=model, task=task, recipe=QUICK, **more) for more in (dict(ablation=fails), dict(ablation=dies), dict(seed=1), dict(seed=2))]
        with pytest.warns(UserWarning, match="2 of 4 searches failed"): circuits, table = discover_all(jobs, tmp_path, progress=False)
        assert circuits[:2] == [None, None] and all(circuits[2:]) and len([*tmp_path.iterdir()]) == 2
        assert table.error[0] == "RuntimeError: out of luck" and "died" in table.error[1] and not table.error[2:].any()
        assert ray.is_initialized()  # it was there before
        with pytest.raises(InputError, match="no machine of Ray's has"): discover_all(jobs, tmp_path, threads=3, progress=False)
    finally: ray.shutdown()


SCRIPT = """
import sys
from mgprune import discover_all, load_model, tasks
from mgprune.recipe import Recipe
model = load_model()
task = tasks.ioi(model, n=(48, 16, 16))
jobs = [dict(model=model, task=task, seed=seed, recipe=Recipe(steps=steps, confidence=None)) for seed, steps in enumerate((5, 5, 100_000, 100_000))]
try: discover_all(jobs, sys.argv[1], workers=int(sys.argv[2]), progress=False)
except KeyboardInterrupt: print("interrupted", flush=True)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_keeps_what_is_finished(workers, request, model, task, tmp_path):
    if workers > 1: request.getfixturevalue("ray")
    # a shell that starts the tests in the background has them ignore what Ctrl-C sends
    with subprocess.Popen([sys.executable, "-c", SCRIPT, tmp_path / "runs", str(workers)], stdout=subprocess.PIPE, text=True, start_new_session=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as run:
        try:
            until = time.monotonic() + 120
            while time.monotonic() < until and len([*(tmp_path / "runs").glob("*.json")]) < 2: time.sleep(.2)
            time.sleep(1)
            started = psutil.Process(run.pid).children(recursive=True)
            os.killpg(run.pid, signal.SIGINT)  # as a terminal does it
            assert run.communicate(timeout=60)[0] == "interrupted\n"
        finally:
            if run.poll() is None: os.killpg(run.pid, signal.SIGKILL)
    assert not psutil.wait_procs(started, timeout=10)[1]
    jobs = [dict(model=model, task=task, seed=seed, recipe=Recipe(steps=5, confidence=None)) for seed in (0, 1)]
    assert {p.stem for p in (tmp_path / "runs").iterdir()} == {*map(name, jobs)}
    before = [p.stat().st_mtime_ns for p in sorted((tmp_path / "runs").iterdir())]
    circuits, _ = discover_all(jobs, tmp_path / "runs", workers=1, progress=False)
    assert all(circuits) and [p.stat().st_mtime_ns for p in sorted((tmp_path / "runs").iterdir())] == before


def test_without_ray_in_turn(model, task, tmp_path, monkeypatch):
    find = many.importlib.util.find_spec
    monkeypatch.setattr(many.importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    monkeypatch.setattr(many, "with_ray", None)
    jobs = [dict(model=model, task=task, seed=seed, recipe=QUICK) for seed in (0, 1)]
    with pytest.warns(UserWarning, match="Ray is not installed"): circuits, _ = discover_all(jobs[:1], tmp_path, workers=2, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert discover_all(jobs, tmp_path, progress=False)[0][0] == circuits[0]


# --- names of files

def test_a_name_is_the_same_in_another_process(model, task, tmp_path):
    script = tmp_path / "own.py"
    script.write_text("""
import torch
from mgprune import load_model, tasks
from mgprune.many import arguments_of, named
weights = torch.arange(5.)
def helper(x): return x * weights.sum() if x else helper(1)
def ablation(host, pairs, reference, output, factor={"a": 2}, names={"b", "c", "d"}): return [helper(factor["a"]) for _ in pairs]
model = load_model()
job = dict(model=model, task=tasks.ioi(model, n=(48, 16, 16)), penalties={"mlp": 1, "head": .1}, ablation=ablation)
print(named([arguments_of(job, 0)])[0].name)
""")
    def run(hashes): return subprocess.run([sys.executable, script], env=os.environ | dict(PYTHONHASHSEED=hashes), capture_output=True, text=True, check=True).stdout
    first = run("1")
    assert len(first) == 17 and run("2") == first
    script.write_text(script.read_text().replace("arange(5.)", "arange(6.)"))
    assert run("1") != first


def by_pair(f, host, pairs, reference, output): return f(host)
class Own:
    def __init__(self, n): self.n = n
    def __call__(self, host, pairs, reference, output): return self.n
    def method(self, host, pairs, reference, output): return -self.n


def test_code_is_told_apart():
    def one(host): return 1
    def two(host): return 2
    values = [scaled(1.), scaled(2.), functools.partial(by_pair, one), functools.partial(by_pair, two), Own(1), Own(2), Own(1).method, Own(2).method, Own]
    assert len({content(v) for v in values}) == len(values)
    assert content(Own(1)) == content(Own(1)) and content(functools.partial(by_pair, one)) == content(functools.partial(by_pair, one))


def test_pairs_are_told_apart(model, task, tmp_path):
    rows = [dict(clean=p.clean, corrupt=p.corrupt, answer=p.answer, wrong=p.wrong) for p in task.train]
    file = tmp_path / "pairs.jsonl"
    def write(rows): file.write_text("\n".join(map(many.json.dumps, rows)))
    write(rows)
    names = [name(dict(model=model, task=t)) for t in (task, rows, rows[:-1], file, "ioi", "induction", tasks.ioi(model, n=(48, 16, 16), seed=1))]
    assert len({*names}) == len(names) and name(dict(model=model, task=str(file))) == names[3]
    write(rows[:-1])
    assert name(dict(model=model, task=file)) != names[3]


def test_pairs_that_change_meanwhile_are_not_written(model, task, tmp_path, monkeypatch):
    file, search = tmp_path / "pairs.csv", many.discover
    def lines(pairs): return "\n".join(["clean,corrupt,answer", *(f"{p.clean},{p.corrupt},{p.answer[0]}" for p in pairs)])
    file.write_text(lines([p for p in task.train if "," not in p.clean + p.corrupt]))
    def edits(**arguments):
        file.write_text(file.read_text() + "\n")
        return search(**arguments)
    monkeypatch.setattr(many, "discover", edits)
    with pytest.warns(UserWarning, match="1 of 1"): circuits, table = discover_all([dict(model=model, task=file, recipe=QUICK)], tmp_path / "runs", progress=False)
    assert circuits == [None] and "was changed" in table.error[0] and not (tmp_path / "runs").exists()


def test_other_weights_are_searched_again(task, tmp_path):
    model = load_model()
    job = dict(model=model, task=task, recipe=QUICK)
    first, _ = discover_all([job], tmp_path, progress=False)
    with torch.no_grad(): model.transformer.wte.weight[0, 0] += 1
    second, _ = discover_all([job], tmp_path, progress=False)
    assert len([*tmp_path.iterdir()]) == 2 and first[0].provenance["fingerprint"] != second[0].provenance["fingerprint"]


@pytest.mark.parametrize("spoil", ["cut", "text", "folder", "other", "link"])
def test_what_is_no_circuit_of_the_job_is_kept_aside(model, task, tmp_path, spoil):
    job = dict(model=model, task=task, recipe=QUICK)
    circuits, table = discover_all([job, job | dict(seed=1)], tmp_path, workers=1, progress=False)
    path, other = map(Path, table.file)
    content = path.read_bytes()
    path.unlink()
    if spoil == "cut": path.write_bytes(content[:-100])
    elif spoil == "text": path.write_text("notes of mine")
    elif spoil == "folder": path.mkdir()
    elif spoil == "other": path.write_bytes(other.read_bytes())
    else: path.symlink_to("nowhere")
    with pytest.warns(UserWarning, match="is kept as"): again, _ = discover_all([job], tmp_path, progress=False)
    assert again == circuits[:1] and Circuit.load(path, model) == circuits[0] and os.path.lexists(tmp_path / f"{path.stem}.aside-1")


@pytest.mark.parametrize("wrong, says", [
    (dict(jobs=None), "expected a list of dictionaries"), (dict(jobs="ioi"), "expected a list of dictionaries"), (dict(jobs={"task": "ioi"}), "expected a list of dictionaries"),
    (dict(jobs=["ioi"]), "job 0: 'ioi': expected a dictionary"), (dict(jobs=[{1: 2}]), "job 0: 1 is no argument"), (dict(jobs=[{}]), "job 0: model is missing"),
    (dict(workers=0), "workers=0"), (dict(threads=0), "threads=0"), (dict(save=3), "save=3")])
def test_wrong_arguments(wrong, says, tmp_path):
    with pytest.raises(InputError, match=says): discover_all(**dict(jobs=[], save=tmp_path / "new") | wrong)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", [dict(model=3), dict(task=3), dict(task="none.csv"), dict(kl=-1), dict(keep=(.1, .2)), dict(penalties={"heads": 1}), dict(levels="neuron"),
                                   dict(seed=.5), dict(recipe=dict(steps=3)), dict(gate=3), dict(ablation="means"), dict(save="runs"), dict(task=(p for p in ()))])
def test_a_wrong_job_is_refused_before_any_runs(wrong, model, task, tmp_path):
    good = dict(model=model, task=task, recipe=QUICK)
    with pytest.raises(InputError, match="job 1: "): discover_all([good, good | wrong], tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()
