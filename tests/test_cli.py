"""The command line: what it writes, how it refuses, and that a circuit measures the same twice."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kills
from mgprune import cli, tasks
from mgprune.cli import main
from mgprune.models import load_model

ROOT = Path(__file__).parent.parent
LEVELS = {"block", "head", "mlp", "attention_neuron", "mlp_neuron"}
FAST = ["--keep", "0.2", "--steps", "120"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "A short search: the folder with its files and the JSON beside it"
    folder = tmp_path_factory.mktemp("found")
    assert main(["discover", "ioi", *FAST, "--seed", "3", "--out", f"{folder}/out", "--json", f"{folder}/deep/ioi.json"]) == 0
    return folder


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
    assert data["model"] == "embedded" and data["task"] == "ioi" and data["seed"] == 3
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
    for word in ("# Circuit of embedded for ioi", "mlp neuron", "faithfulness", "keep 0.2", "Circuit.load('circuit.json', model)"): assert word in text


def test_evaluate_gives_the_same_measures(found, tmp_path, capsys):
    assert main(["evaluate", f"{found}/out", "--json", f"{tmp_path}/again.json"]) == 0
    first, again = read(found / "deep/ioi.json"), read(tmp_path / "again.json")
    for name in ("kl", "accuracy", "full_accuracy", "faithfulness", "closed_kl"): assert again[name] == pytest.approx(first[name], abs=1e-4)
    assert again["counts"] == first["counts"] and again["task"] == "ioi" and again["model"] == "embedded"
    assert "512 held-out pairs" in capsys.readouterr().out


def test_evaluate_on_another_task(found, tmp_path):
    assert main(["evaluate", f"{found}/out/circuit.json", "--task", "greater-than", "--json", f"{tmp_path}/years.json"]) == 0
    assert read(tmp_path / "years.json")["task"] == "greater_than"


def test_a_failure_leaves_the_old_json(tmp_path, monkeypatch):
    path = tmp_path / "old.json"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(cli.InputError, match="No space left"): cli.write_json(path, {})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["old.json"]


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
    (["discover", "ioi", "--kl", "much"], "invalid float value: 'much'"),
    (["discover", "ioi", "--keep", "2"], "keep=2.0: expected a share"),
    (["discover", "ioi", "--kl", "1", "--keep", ".1"], "exactly one of"),
    (["discover", "ioi", "--levels", "head,neuron"], "neuron"),
    (["discover", "ioi", "--steps", "3"], "--steps 3: expected at least"),
    (["discover", "ioi", "--seed", "x"], "invalid int value"),
    (["discover", "ioi", "--corruption", "noise"], "noise"),
    (["discover", "ioi", "--device", "abacus"], "--device abacus"),
    (["discover", "ioi", "--model", "no/such/model/at/all"], "no causal language model"),
    (["discover", "ioi", "--colour", "red"], "--colour"),
    (["discover"], "TASK"),
    ([], "COMMAND"),
    (["prune"], "prune"),
    (["evaluate", "missing.json"], "cannot read the circuit 'missing.json'"),
])
def test_refuses(argv, says, capsys):
    assert says in refused(capsys, *argv)


def test_refuses_places_that_cannot_be_written(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert "cannot write into" in refused(capsys, "discover", "ioi", "--out", file / "below")
    assert "cannot write into" in refused(capsys, "discover", "ioi", "--json", file / "below" / "a.json")
    assert "is a folder" in refused(capsys, "discover", "ioi", "--json", tmp_path)


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
