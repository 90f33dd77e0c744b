"""The command line: what it writes, how it refuses, and that a circuit measures the same twice."""
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kills
import mgprune
from mgprune import cli, evaluate, tasks
from mgprune.ablations import ABLATIONS, what_it_holds
from mgprune.checks import trusted
from mgprune.circuit import Circuit, as_text, from_scores
from mgprune.cli import main
from mgprune.evaluation import cut_by_size
from mgprune.export import WRITERS
from mgprune.files import digest
from mgprune.models import load_model
from mgprune.sites import FAMILIES, find_sites

ROOT = Path(__file__).parent.parent
LEVELS = {"block", "head", "mlp", "attention_neuron", "mlp_neuron"}
FAST = ["--keep", "0.2", "--steps", "40"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "A short search: the folder with its files and the JSON beside it"
    folder = tmp_path_factory.mktemp("found")
    assert main(["discover", "ioi", *FAST, "--seed", "3", "--out", f"{folder}/out", "--json", f"{folder}/deep/ioi.json"]) == 0
    return folder


@functools.cache
def load_report():
    "A short report"
    model = load_model()
    scores = {"head": torch.rand(4, 4), "mlp": torch.rand(4)}
    return from_scores(scores, find_sites(model), .5).report(model, tasks.ioi(model, n=(16, 16, 16)), draws=1, most=8, ablations=("corrupt",), progress=False)


@pytest.fixture
def pairs(tmp_path):
    "A file of pairs that the embedded model can do"
    path = tmp_path / "gifts.jsonl"
    task = tasks.ioi(load_model(), n=(32, 8, 8))
    rows = [dict(clean=p.clean, corrupt=p.corrupt, answer=p.answer, wrong=p.wrong) for p in task.train + task.valid + task.test]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def read(path): return json.loads(Path(path).read_text())


def refused(capsys, *argv):
    "The message of a command that must be refused"
    capsys.readouterr()
    assert main([*map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("mgprune: error: ") and len(err.splitlines()) <= 2 and "Traceback" not in err
    assert "full model" not in out, "the search had begun"
    return err


# --- what is written

def test_json_says_what_was_found(found):
    data = read(found / "deep/ioi.json")
    assert data["model"] == "embedded" and data["task"] == "ioi" and data["seed"] == 3 and data["ablation"] == "corrupt"
    for name in ("kl", "accuracy", "full_accuracy", "seconds", "peak_mb"): assert isinstance(data[name], float)
    assert set(data["counts"]) == LEVELS and data["counts"]["mlp_neuron"][1] == 2048 and data["counts"]["head"][1] == 16
    kept = [data["counts"][level][0] for level in ("attention_neuron", "mlp_neuron")]
    assert abs(sum(kept) - 0.2 * 2560) <= 2
    assert os.listdir(found / "deep") == ["ioi.json"]  # no half-written file stays


def test_out_holds_circuit_figures_and_summary(found):
    names = {path.name for path in (found / "out").iterdir()}
    assert names - {"circuit.safetensors"} == {"circuit.json", "circuit.png", "heads.png", "neurons.png", "training.png", "summary.md"}
    for path in (found / "out").glob("*.png"): assert path.read_bytes().startswith(b"\x89PNG")
    text = (found / "out/summary.md").read_text()
    for word in ("# Circuit of embedded for ioi", "mlp neuron", "faithfulness", "keep 0.2", "Circuit.load('circuit.json', model)",
                 "| ablation | corrupt |", "the ablation corrupt (ablated nodes hold what they hold on the pair's own corrupt prompt)"): assert word in text


def test_evaluate_gives_the_same_measures(found, tmp_path, capsys):
    assert main(["evaluate", f"{found}/out", "--json", f"{tmp_path}/again.json"]) == 0
    first, again = read(found / "deep/ioi.json"), read(tmp_path / "again.json")
    for name in ("kl", "accuracy", "full_accuracy", "faithfulness", "closed_kl"): assert again[name] == pytest.approx(first[name], abs=1e-4)
    assert again["counts"] == first["counts"] and again["task"] == "ioi" and again["model"] == "embedded"
    assert "512 held-out pairs, ablation corrupt\n" in capsys.readouterr().out and again["ablation"] == "corrupt" and "found_with" not in again


def test_evaluate_on_another_task(found, tmp_path):
    assert main(["evaluate", f"{found}/out/circuit.json", "--task", "greater-than", "--json", f"{tmp_path}/years.json"]) == 0
    assert read(tmp_path / "years.json")["task"] == "greater_than"


# --- ablations

@pytest.mark.parametrize("ablation", ["mean", "zero", "resample", "mean_by_position"])
def test_evaluate_with_another_ablation(found, tmp_path, capsys, ablation):
    assert main(["evaluate", f"{found}/out", "--ablation", ablation, "--json", f"{tmp_path}/again.json"]) == 0
    assert f"512 held-out pairs, found with corrupt, measured with {ablation}\n" in capsys.readouterr().out
    again, circuit, model = read(tmp_path / "again.json"), Circuit.load(found / "out/circuit.json"), load_model()
    assert again["ablation"] == ablation and again["found_with"] == "corrupt"
    in_python = evaluate(circuit, model, tasks.ioi(model, n=tuple(circuit.provenance.pairs), seed=circuit.provenance.task_seed), ablation)
    for name in ("kl", "accuracy", "closed_kl", "faithfulness"): assert again[name] == pytest.approx(in_python[name], abs=1e-4)
    assert abs(again["closed_kl"] - read(found / "deep/ioi.json")["closed_kl"]) > 1e-3


def test_discover_with_another_ablation(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["discover", "ioi", *FAST, "--ablation", "mean", "--out", str(out), "--json", f"{tmp_path}/a.json"]) == 0
    assert "ablation mean (ablated nodes hold their mean over the corrupt prompts of reference pairs)\n" in capsys.readouterr().out
    assert "the ablation mean (ablated nodes hold their mean" in (out / "summary.md").read_text() and read(tmp_path / "a.json")["ablation"] == "mean"
    assert main(["evaluate", str(out), "--json", f"{tmp_path}/b.json"]) == 0  # with the circuit's own
    assert "ablation mean\n" in capsys.readouterr().out and read(tmp_path / "b.json")["ablation"] == "mean"
    for name in ("kl", "closed_kl"): assert read(tmp_path / "a.json")[name] == pytest.approx(read(tmp_path / "b.json")[name], abs=1e-4)
    assert main(["evaluate", str(out), "--ablation", "corrupt", "--json", f"{tmp_path}/c.json"]) == 0
    assert "found with mean, measured with corrupt\n" in capsys.readouterr().out and read(tmp_path / "c.json")["found_with"] == "mean"


def test_sweep_says_its_ablation(tmp_path, capsys):
    assert main(["sweep", "ioi", "--keep", ".3", ".1", "--steps", "40", "--ablation", "zero", "--json", f"{tmp_path}/a.json"]) == 0
    assert "\nablation zero (ablated nodes hold zero)\n" in capsys.readouterr().out
    assert [row["ablation"] for row in read(tmp_path / "a.json")] == ["zero", "zero"]


def test_a_circuit_of_an_ablation_of_somebodys_own_is_refused_unless_another_is_named(found, tmp_path, capsys):
    circuit = Circuit.load(found / "out/circuit.json")
    replace(circuit, provenance=replace(circuit.provenance, ablation="half")).save(tmp_path / "half.json")
    assert "found with the ablation 'half', which does not come with this package: name one of corrupt" in refused(capsys, "evaluate", tmp_path / "half.json")
    assert main(["evaluate", str(tmp_path / "half.json"), "--ablation", "zero", "--task", "greater-than"]) == 0
    assert "found with half, measured with zero\n" in capsys.readouterr().out
    replace(circuit, provenance=replace(circuit.provenance, ablation=None)).save(tmp_path / "unknown.json")  # of an earlier version
    assert main(["evaluate", str(tmp_path / "unknown.json"), "--json", f"{tmp_path}/unknown_measures.json"]) == 0
    assert "pairs, ablation corrupt\n" in capsys.readouterr().out and read(tmp_path / "unknown_measures.json")["ablation"] == "corrupt"


@pytest.mark.parametrize("command", ["discover", "sweep", "evaluate"])
def test_help_says_what_ablations_there_are(command, capsys):
    with pytest.raises(SystemExit): main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, ablation in ABLATIONS.items(): assert f"{name}: {what_it_holds(ablation)}" in said
    assert f"what ablated nodes hold (default: {'as the circuit was found' if command == 'evaluate' else 'corrupt'})" in said


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([command, "--help"] for command in cli.EXAMPLES)])
def test_help_has_examples_that_can_be_typed(argv, capsys):
    with pytest.raises(SystemExit) as end: main(argv)
    said = capsys.readouterr().out
    assert end.value.code == 0
    if argv == ["--version"]: assert said == f"mgprune {mgprune.__version__}\n"
    else:
        examples = [line.split()[1:] for line in said.splitlines() if line.startswith("  mgprune ")]
        assert examples and all(cli.parser().parse_args(words).command in cli.EXAMPLES for words in examples)


def test_tasks_and_models_are_listed(capsys):
    assert main(["tasks"]) == main(["models"]) == 0
    said = capsys.readouterr().out
    for name in (*tasks.BUILT_IN, *FAMILIES, "embedded", "smollm2"): assert name in said


def test_export_writes_each_format_once(found, tmp_path, capsys):
    names = [str(tmp_path / f"ioi{ending}") for ending in WRITERS]
    assert main(["export", f"{found}/out", *names]) == 0 and capsys.readouterr().out.count("wrote") == len(names)
    circuit, nodes = Circuit.load(found / "out/circuit.json"), read(tmp_path / "ioi.mib.json")["nodes"]
    assert {name for name, node in nodes.items() if node["in_graph"] and ".h" in name} == {f"a{l}.h{h}" for l, h in circuit.heads()}
    assert "exists already: nothing was written" in refused(capsys, "export", found / "out", tmp_path / "new.csv", names[0])
    assert not (tmp_path / "new.csv").exists()


@pytest.mark.parametrize("steps, keep, kl, said", [(40, .6, .1, True), (40, .1, 3., True), (40, .1, .1, False), (None, .6, 3., False), (600, .6, 3., False)])
def test_few_steps_are_named_where_the_circuit_is_large_or_far(found, steps, keep, kl, said):
    circuit = Circuit.load(found / "out/circuit.json")
    circuit = from_scores(circuit.scores, circuit.sites, cut_by_size(circuit.scores, circuit.sites, keep), dict(metrics=dict(kl=kl, closed_kl=10.)))
    assert bool(cli.on_few_steps(circuit, steps)) == said


def test_drawing_is_loaded_where_something_is_drawn():
    says = "import sys, mgprune.cli; print(*({'pandas', 'matplotlib', 'seaborn', 'ipywidgets'} & {*sys.modules}), end='')"
    run = subprocess.run([sys.executable, "-c", says], text=True, capture_output=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert run.returncode == 0 and run.stdout == ""


def test_a_failure_leaves_the_old_json(tmp_path, monkeypatch):
    path = tmp_path / "old.json"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(cli.InputError, match="No space left"): cli.write_json(path, {})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["old.json"]


def test_a_page_that_is_there_stays(found, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("mine")
    assert "--report" in refused(capsys, "evaluate", found / "out", "--report", page) and page.read_text() == "mine"
    assert "no report" in refused(capsys, "evaluate", found / "out", "--report", page, "--force") and page.read_text() == "mine"


def test_a_report_takes_the_place_of_a_report_alone(found, tmp_path, capsys):
    circuit = shutil.copy(found / "out" / "circuit.json", tmp_path / "circuit.json")
    before = Path(circuit).read_bytes()
    assert "no report" in refused(capsys, "evaluate", circuit, "--report", circuit, "--force") and Path(circuit).read_bytes() == before
    assert "two files" in refused(capsys, "evaluate", circuit, "--report", tmp_path / "x.json", "--json", tmp_path / "x.json")
    for name in ("page.md", "page.html", "page.json", "page.png"):
        page = load_report().write(tmp_path / name)
        assert "--force" in refused(capsys, "evaluate", circuit, "--report", page) and cli.is_page(page)


# --- dtype, memory, and what comes first

def test_a_circuit_of_another_dtype_is_measured_in_it(tmp_path, capsys, monkeypatch):
    dtype, out = "bfloat16", tmp_path / "half"
    monkeypatch.setattr("mgprune.plots.save_figures", kills.spots)
    assert main(["discover", "ioi", "--keep", ".3", "--steps", "40", "--dtype", dtype, "--out", str(out), "--json", f"{tmp_path}/a.json"]) == 0
    assert Circuit.load(out).provenance.dtype == read(tmp_path / "a.json")["dtype"] == dtype
    text = (out / "summary.md").read_text()
    assert f"load_model('embedded', dtype='{dtype}')" in text and f"| dtype | {dtype} |" in text and "Python and its libraries come on top" in text
    assert main(["evaluate", str(out), "--json", f"{tmp_path}/b.json"]) == 0
    assert f"in {dtype}, as the circuit says" in capsys.readouterr().out
    assert read(tmp_path / "a.json")["kl"] == pytest.approx(read(tmp_path / "b.json")["kl"], abs=1e-3)
    assert f"It was found in {dtype} and this model is in float32" in refused(capsys, "evaluate", out, "--dtype", "float32")
    assert Circuit.load(out, load_model(dtype=dtype)) == Circuit.load(out / "circuit.json")


def test_plan_prints_its_table(capsys):
    assert main(["plan", "ioi", "--batch-size", "4", "--pairs", "32", "--keep", ".2"]) == 0
    assert "a step, 4 pairs at once" in (said := capsys.readouterr().out) and "time in sum" in said
    assert main(["plan", "--levels", "head,mlp", "ioi", "--device", "meta", "--dtype", "bfloat16"]) == 0
    assert "weights" in (said := capsys.readouterr().out) and "time in sum" not in said


@pytest.mark.parametrize("words, task", [(["discover", "--levels", "head,mlp", "a.csv"], "a.csv"), (["sweep", "--keep", ".2", ".1", "a.csv", "--seed", "1"], "a.csv"),
                                         (["sweep", "--kl", "10%", ".1", "a.csv"], "a.csv"), (["plan", "--over", "answers", "--levels", "head", "mlp", "ioi"], "ioi")])
def test_a_task_after_an_option_of_several_values_is_the_task(words, task):
    args = cli.read(words)
    assert args.task == task and task not in str({k: v for k, v in vars(args).items() if k != "task"})


@pytest.mark.parametrize("error, where", [(MemoryError(), "answer_logits"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "circuit_logits"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "answer_logits")], ids=lambda of: type(of).__name__)
def test_where_memory_runs_out_it_is_said_what_takes_less(error, where, model, found, monkeypatch, capsys):
    trusted(model)
    def fails(*of, **more): raise error
    monkeypatch.setattr(f"mgprune.streams.{where}", fails)
    monkeypatch.setattr(cli, "load_model", lambda *of, **more: model)
    for command in (["discover", "ioi", "--steps", "40"], ["evaluate", f"{found}/out"]):
        assert main(command) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("mgprune: error: out of memory (")
        for option in ("--batch-size N", "--pairs N", "--gradient-checkpointing", "--dtype bfloat16", "--device auto", "mgprune plan"): assert option in err
        assert "Recipe(" not in err and "load_model" not in err
    with pytest.raises(cli.InputError, match=r"Recipe\(gradient_checkpointing=True\)") as said: evaluate(Circuit.load(found / "out"), model, "ioi")
    assert said.value.__cause__ is error and not any(m._forward_pre_hooks for m in model.modules())


def test_too_few_pairs_are_answered_with_an_option_that_there_is(tmp_path, pairs, model, monkeypatch, capsys):
    monkeypatch.setattr(cli, "load_model", lambda *of, **more: model)
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(pairs.read_text().splitlines()[:24]))
    err = refused(capsys, "discover", few, "--kl", ".5")
    assert "with --keep" in err and "--confidence none" in err and "Recipe(" not in err
    assert main(["discover", str(few), "--kl", ".5", "--confidence", "none", "--steps", "40"]) == 0


def test_every_setting_that_a_message_names_has_an_option(capsys):
    with pytest.raises(SystemExit): main(["discover", "--help"])
    options = capsys.readouterr().out
    for path in (ROOT / "mgprune").glob("*.py"):
        for name, value in re.findall(r"Recipe\((batch_size|pairs|steps|confidence|gradient_checkpointing)=([\w.]+)\)", path.read_text()):
            said = cli.in_shell(f"a smaller Recipe({name}={value})")
            assert "Recipe" not in said and said.split()[2] in options


# --- pairs from a file

def test_pairs_from_a_file_are_found_again(pairs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["discover", str(pairs), *FAST, "--levels", "head", "mlp,mlp_neuron", "--out", str(out), "--json", f"{tmp_path}/a.json"]) == 0
    assert main(["evaluate", str(out), "--json", f"{tmp_path}/b.json"]) == 0
    assert read(tmp_path / "a.json")["kl"] == pytest.approx(read(tmp_path / "b.json")["kl"], abs=1e-4)

    moved = pairs.rename(tmp_path / "elsewhere.jsonl")
    assert "which is not there: name their new place with --task FILE" in refused(capsys, "evaluate", out)
    assert main(["evaluate", str(out), "--task", str(moved), "--json", f"{tmp_path}/c.json"]) == 0
    assert read(tmp_path / "c.json")["kl"] == pytest.approx(read(tmp_path / "a.json")["kl"], abs=1e-4)
    assert "other pairs" not in capsys.readouterr().err

    moved.write_text(moved.read_text().replace("Mary", "Emma"))
    assert main(["evaluate", str(out), "--task", str(moved)]) == 0
    assert "mgprune: warning: " in (err := capsys.readouterr().err) and "holds other pairs" in err


# --- refusals

@pytest.mark.parametrize("argv, says", [
    (["discover", "ioy"], "unknown task 'ioy': expected ioi, greater_than, gendered_pronoun"),
    (["discover", "ioi", "--kl", "-1"], "kl=-1.0: expected a divergence above 0"),
    (["discover", "ioi", "--kl", "nan"], "expected a divergence above 0"),
    (["discover", "ioi", "--kl", "much"], "invalid budget value: 'much'"),
    (["discover", "ioi", "--keep", "2"], "keep=2.0: expected a share"),
    (["discover", "ioi", "--kl", "1", "--keep", ".1"], "exactly one of"),
    (["discover", "ioi", "--levels", "head,neuron"], "neuron"),
    (["discover", "ioi", "--steps", "3"], "--steps 3: expected at least"),
    (["discover", "ioi", "--steps", "0"], "--steps 0: expected at least"),
    (["discover", "ioi", "--keep", "nan"], "keep=nan: expected a share"),
    (["sweep", "ioi", "--keep", ".1", "inf"], "expected a share"),
    (["discover", "ioi", "--seed", "x"], "invalid int value"),
    (["discover", "ioi", "--seed", "-1"], "--seed=-1: expected a whole number from 0"),
    (["discover", "ioi", "--seed", "99999999999999999999"], "expected a whole number from 0"),
    (["discover", "ioi", "--device", "meta"], "--device meta"),
    (["discover", "ioi", "--device", ""], "--device "),
    (["discover", "ioi", "--out", "a\0b"], "without the character NUL"),
    (["discover", "ioi", "--json", "a\0b"], "without the character NUL"),
    (["discover", "ioi", "--out", "a" * 300], "File name too long"),
    (["discover", "ioi", "--out", "."], "is the folder you work in, or holds it"),
    (["discover", "ioi", "--out", ""], "is the folder you work in, or holds it"),
    (["discover", "ioi", "--out", "/"], "is the folder you work in, or holds it"),
    (["discover", "ioi", "--out", "~no such user/x"], "Write the home folder out"),
    (["discover", "ioi", "--out", "x", "--json", "x"], "in the way of what --out writes"),
    (["discover", "ioi", "--out", "x/y", "--json", "x"], "in the way of what --out writes"),
    (["discover", "ioi", "--out", "x", "--json", "x/circuit.json"], "in the way of what --out writes"),
    (["evaluate", "a\0b"], "without the character NUL"),
    (["discover", "ioi", "--corruption", "noise"], "noise"),
    (["discover", "pairs.csv", "--corruption", "unrelated_names"], "a file of pairs has corrupt prompts of its own"),
    (["discover", "ioi", "--ablation", "noise"], "argument --ablation: invalid choice: 'noise' (choose from 'corrupt', 'resample'"),
    (["sweep", "ioi", "--ablation", "Mean"], "argument --ablation: invalid choice: 'Mean'"),
    (["evaluate", "missing.json", "--ablation", "noise"], "argument --ablation: invalid choice: 'noise'"),
    (["discover", "ioi", "--device", "abacus"], "--device abacus"),
    (["discover", "ioi", "--model", "no/such/model/at/all"], "no causal language model"),
    (["discover", "ioi", "--colour", "red"], "--colour"),
    (["discover", "ioi", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["discover", "ioi", "--batch-size", "0"], "batch_size=0: expected a whole number of at least 1"),
    (["plan", "ioi", "--kl", "-1"], "kl=-1.0: expected a divergence above 0"),
    (["plan", "ioy", "--device", "meta"], "unknown task 'ioy'"),
    (["evaluate", "missing.json", "--dtype", "half"], "argument --dtype: invalid choice: 'half'"),
    (["discover", "--levels", "head,mlp"], "the following arguments are required: TASK"),
    (["discover", "--levels", "head", "ioy"], "unknown task 'ioy'"),
    (["discover"], "TASK"),
    ([], "COMMAND"),
    (["prune"], "prune"),
    (["evaluate", "missing.json"], "cannot read the circuit 'missing.json'"),
    (["evaluate", "greater-than"], "'greater-than' is a task, and there is no circuit of that name here"),
    (["export", "greater-than", "a.csv"], "Find one first (mgprune discover greater-than --out greater-than)"),
    (["export", "missing.json", "a.csv"], "cannot read the circuit 'missing.json'"),
    (["export", "missing.json", "a.pdf"], "'a.pdf': expected a file that ends in one of .csv, .dot, .svg, .png, .html, .mib.json"),
    (["export", "missing.json"], "FILE"),
])
def test_refuses(argv, says, capsys):
    assert says in refused(capsys, *argv)


def test_refuses_places_that_cannot_be_written(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert "cannot write into" in refused(capsys, "discover", "ioi", "--out", file / "below")
    assert "cannot write into" in refused(capsys, "discover", "ioi", "--json", file / "below" / "a.json")
    assert "is a folder" in refused(capsys, "discover", "ioi", "--json", tmp_path)


def test_nothing_of_the_users_is_replaced(found, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(found / "out", run)
    for name in ("notes.txt", "2024", "circuit.png.txt"):
        (run / name).mkdir() if name.isdigit() else (run / name).touch()
        if name.isdigit(): (run / name / "photo.jpg").touch()
        assert f"holds '{name}'" in refused(capsys, "discover", "ioi", "--out", run)
        assert {path.name for path in run.iterdir()} >= {name, "circuit.json", "summary.md"}
        shutil.rmtree(run / name) if name.isdigit() else (run / name).unlink()
    (run / "circuit.json").write_text('{"mine": 1}')
    assert "holds 'circuit.json'" in refused(capsys, "discover", "ioi", "--out", run)
    for content in ("mine", '{"mine": 1}', "[]"):
        (tmp_path / "mine.json").write_text(content)
        assert "no report of an earlier run" in refused(capsys, "discover", "ioi", "--json", tmp_path / "mine.json")
        assert (tmp_path / "mine.json").read_text() == content
    os.mkfifo(tmp_path / "pipe")
    assert "no report of an earlier run" in refused(capsys, "discover", "ioi", "--json", tmp_path / "pipe")
    assert "is a file" in refused(capsys, "discover", "ioi", "--out", tmp_path / "mine.json")
    assert "no report of an earlier run" in refused(capsys, "evaluate", found / "out", "--json", found / "out/circuit.json")


def test_what_an_earlier_run_wrote_is_replaced_by_the_next_with_force_alone(found, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(found / "out", run)
    shutil.copy(found / "deep/ioi.json", run / "ioi.json")
    assert cli.foreign(run) == []
    monkeypatch.setattr(cli, "discover", lambda *of, **options: Circuit.load(found / "out/circuit.json"))
    monkeypatch.setenv("HOME", str(tmp_path))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for more in ([], ["--keep", ".3"]): assert "holds the results of an earlier run: nothing was written" in refused(capsys, "discover", "ioi", "--out", "~/run", *more)
    assert "--json '~/run/ioi.json' holds the results" in refused(capsys, "sweep", "ioi", "--json", "~/run/ioi.json")
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    assert main(["discover", "ioi", "--out", "~/run", "--json", "~/run/again.json", "--force"]) == 0
    names = {path.name for path in run.iterdir()}
    assert names - {"circuit.safetensors"} == {"circuit.json", "circuit.png", "heads.png", "neurons.png", "training.png", "summary.md", "again.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_names_from_a_file_are_shown_as_they_are(found, tmp_path, capsys):
    circuit = Circuit.load(found / "out/circuit.json")
    odd = "x|y`\n# Heading\x1b[2J\u202e<script>[a](http://b)"
    text = cli.summary(replace(circuit, provenance=dict(circuit.provenance) | dict(model=odd, task=odd, corruption=odd, ablation=odd)), "circuit.json")
    words = text.partition("```python")[0]
    assert not any(sign in words for sign in ("<script>", "\x1b", "\u202e", "](", "http:")) and "\n# Heading" not in text
    assert all(line.count("|") == 3 for line in words.partition("## Settings")[2].splitlines() if line.startswith("|"))
    code = text.partition("```python\n")[2]
    assert code.count("```") == 1 and eval(code.splitlines()[1].partition("load_model")[2]) == odd

    replace(circuit, provenance=replace(circuit.provenance, model=odd)).save(tmp_path / "odd.json")
    assert main(["evaluate", str(tmp_path / "odd.json")]) == 2
    out, err = capsys.readouterr()
    assert "as the circuit says" in out and r"\x1b[2J" in out and not {"\x1b", "\u202e"} & {*(out + err)} and len(err.splitlines()) == 1


@pytest.mark.parametrize("name, place", [("https://somewhere/model", "an address on the web"), ("/etc/hostname", "on this machine"),
                                         ("../secret", "on this machine"), ("somebody/model", "on the hub"), ("embedded", "comes with this package")])
def test_the_model_that_a_file_names_is_said_before_it_is_opened(found, tmp_path, capsys, monkeypatch, name, place):
    circuit = Circuit.load(found / "out/circuit.json")
    replace(circuit, provenance=replace(circuit.provenance, model=name)).save(tmp_path / "a.json")
    def refuse(*of, **options): raise cli.InputError(f"opened after {capsys.readouterr().out!r}")
    monkeypatch.setattr(cli, "load_model", refuse)
    assert main(["evaluate", str(tmp_path / "a.json")]) == 2
    said = capsys.readouterr().err
    assert name in said.partition("opened after")[2] and place in said and "as the circuit says" in said


@pytest.mark.parametrize("part", (dict(model=5), dict(task=["ioi"]), dict(pairs_file="x"), dict(pairs=[0, 1]), dict(task_seed="1"), dict(corruption=1.5)))
def test_a_file_that_says_something_else_than_it_should_is_refused(found, tmp_path, capsys, part):
    data = json.loads((found / "out/circuit.json").read_text())
    data["provenance"] |= part
    data.pop("digest")
    (tmp_path / "odd.json").write_text(json.dumps(data | dict(digest=digest(as_text(data).encode()))))
    assert main(["evaluate", str(tmp_path / "odd.json")]) == 2
    err = capsys.readouterr().err
    assert next(iter(part)) in err and len(err.splitlines()) == 1


def test_refuses_files_that_cannot_be_read(tmp_path, capsys):
    assert "no file" in refused(capsys, "discover", tmp_path / "missing.jsonl")
    bad = tmp_path / "bad.csv"
    bad.write_text("clean,corrupt\na,b\n")
    assert "answer is missing" in refused(capsys, "discover", bad)
    bad.write_bytes(b"clean,corrupt,answer\n\xff\xfe,b,c\n")
    assert "not UTF-8" in refused(capsys, "discover", bad)
    circuit = tmp_path / "circuit.json"
    circuit.write_text("{")
    circuit.with_suffix(".safetensors").touch()
    assert "not whole JSON" in refused(capsys, "evaluate", tmp_path)


def test_refuses_another_model(found, tmp_path, capsys):
    model = load_model()
    model.transformer.h[0].mlp.c_proj.bias.data[0] += 1
    model.save_pretrained(tmp_path / "other")
    model.tokenizer.save_pretrained(tmp_path / "other")
    assert "fingerprint" in refused(capsys, "evaluate", found / "out", "--model", tmp_path / "other")


# --- as a process

def process(*argv, **more):
    "The command line as a process of its own"
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", PYTHONPATH=str(ROOT))
    return subprocess.Popen([sys.executable, "-m", "mgprune.cli", *argv], text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def test_a_reader_that_ends_ends_the_command_in_one_line(tmp_path):
    running = process("discover", "ioi", "--steps", "40", "--out", f"{tmp_path}/out")
    running.stdout.close()
    err, code = running.stderr.read(), running.wait(timeout=120)
    assert code == 2 and err.strip() == "mgprune: error: cannot write the output: Broken pipe" and not [*tmp_path.iterdir()]


def test_a_terminal_without_umlauts_gets_escapes():
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with cli.redirect_stdout(narrow), cli.terminal(): print("wrote Müller\x07.json")
    narrow.flush()
    assert narrow.buffer.getvalue() == rb"wrote M\xfcller\x07.json" + os.linesep.encode()


def test_exit_codes_of_a_process():
    wrong, help_ = process("discover", "ioi", "--keep", "0"), process("discover", "--help")
    out, err = wrong.communicate(timeout=120)
    assert wrong.returncode == 2 and out == "" and len(err.splitlines()) == 1 and "keep=0.0" in err
    out, err = help_.communicate(timeout=120)
    assert help_.returncode == 0 and "--levels" in out and err == ""


def test_interruption_ends_in_one_line():
    running = process("discover", "ioi", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert "full model" in running.stdout.readline()
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 130 and err.rstrip().endswith("mgprune: interrupted") and "Traceback" not in err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")
def test_a_command_that_is_ended_while_it_writes_leaves_the_old_results_or_the_new_ones():
    for title, counts in kills.table(saves=10, kills=10, interrupts=3, light=True).items():
        for what in ("broken", "another circuit", "left behind after the next save", "folder of two runs, or half-written", "report broken",
                     "exit code neither 130 nor 0", "left behind after the next run"): assert counts[what] == 0, (title, what, counts)
