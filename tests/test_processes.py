"""One search over several processes, and models that are spread over them or over devices. Processes talk by gloo, on the CPU."""
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
import processes
from families import short_search, tiny
from mgprune import Circuit, discover, load_model, tasks
from mgprune.compact import LAYOUTS
from mgprune.models import EMBEDDED
from mgprune.processes import share, together
from mgprune.recipe import Recipe

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def started(*arguments):
    "Start processes together; what they print"
    on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=on_cpu)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def work(name, folder):
    "The results of each of two processes"
    started(*TORCHRUN, processes.__file__, name, folder)
    return [torch.load(folder / f"{name}-{i}.pt") for i in range(2)]


def same(a, b):
    "Whether two results are equal to the bit"
    if torch.is_tensor(a): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


# --- one search

@pytest.fixture(scope="module")
def shared(tmp_path_factory): return work("data", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(): return processes.searches()


def test_all_processes_have_the_same_to_the_bit(shared): assert same(*shared)


@pytest.mark.parametrize("name", [name for name, settings in processes.SEARCHES.items() if settings[-1] == torch.float64])
def test_two_processes_are_one(name, shared, alone):
    "With batches that do not part evenly, and with one pair for two"
    found, wanted = shared[0]["searches"][name], alone[name]
    for values in ("scores", "average"):
        off = (found[values] - wanted[values]).abs()
        assert off.quantile(.999) < 1e-4 and off.max() < 1e-2  # Adam's step is as large where a slope is hardly more than rounding
    assert torch.equal(found["felt"], wanted["felt"]) and len(found["history"]["kl"]) == len(wanted["history"]["kl"])


def test_in_single_precision_two_are_one_but_for_rounding(shared, alone):
    "Adam makes equal steps of small and of large slopes, and so of rounding where it is all that a slope is: in few gates"
    off = (shared[0]["searches"]["eight"]["scores"] - alone["eight"]["scores"]).abs()
    assert off.quantile(.99) < 1e-4 and off.max() < 1e-2


def test_the_circuit_is_found_together(shared):
    model = load_model()
    circuit = discover(model, tasks.ioi(model, n=(48, 16, 16)), kl=.3, recipe=Recipe(steps=20, confidence=None), progress=False)
    found = shared[0]["discoveries"]["kept"]
    for name in ("found", "read_back", "gone_on"): assert same(found[name], circuit.kept), name


def test_what_one_process_cannot_do_none_does(shared):
    said = shared[0]["discoveries"]
    assert "differ in seed" in said["own_seeds"] and "no search" in said["full"]
    assert same(said["scores"]["found"], said["scores"]["gone_on"])


def test_rows_are_shared_out():
    for n in range(9):
        for processes in range(1, 5):
            parts = [range(n)[share(n, i, processes)] for i in range(processes)]
            assert [i for part in parts for i in part] == [*range(n)] and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_starts_nothing(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"): monkeypatch.delenv(name, raising=False)
    assert together() == (0, 1)
    for name in ("RANK", "LOCAL_RANK"): monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert together() == (0, 1) and not torch.distributed.is_initialized()


# --- the command line

def test_a_command_for_two_processes_is_answered_once(tmp_path):
    pytest.importorskip("accelerate")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0"]
    command = ["-m", "mgprune", "discover", "ioi", "--keep", "0.2", "--steps", "40", "--out", tmp_path / "two", "--json", tmp_path / "two.json"]
    said = started(*launch, *command)
    assert said.count("Circuit of embedded") == said.count("the full model is correct") == said.count("two.json") == 1
    one = discover(load_model(), "ioi", keep=.2, recipe=Recipe(steps=40), progress=False)
    assert one == Circuit.load(tmp_path / "two" / "circuit.json") and (tmp_path / "two.json").is_file()


# --- models that are spread over processes

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder of saved models, one with a number of neurons that two processes cannot share evenly"
    folder = tmp_path_factory.mktemp("tensor")
    for kind in ("llama", "mixtral"): tiny(kind).save_pretrained(folder / kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.TINY, "llama", families.WIDE | dict(intermediate_size=41))
        tiny("llama").save_pretrained(folder / "uneven")
    return folder


@pytest.fixture(scope="module")
def spread(folder):
    pytest.importorskip("transformers.distributed").DistributedConfig
    return work("tensor", folder)


@pytest.mark.parametrize("kind", ["llama", "uneven"])
def test_a_model_spread_over_processes_is_the_model(kind, folder, spread):
    whole = processes.of(AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float64))
    assert same(spread[0][kind], spread[1][kind])
    for name in ("fingerprint", "kept"): assert same(spread[0][kind][name], whole[name])
    for name in ("scores", "full"): torch.testing.assert_close(spread[0][kind][name], whole[name], atol=1e-4, rtol=1e-4)
    assert abs(spread[0][kind]["kl"] - whole["kl"]) < 1e-4
    for level, values in whole["attributed"].items(): torch.testing.assert_close(spread[0][kind]["attributed"][level], values, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_done_with_a_spread_model_is_refused(spread):
    exported, zero, experts, fsdp = spread[0]["refusals"]
    assert "export the circuit there" in exported and "mlp_output" in zero and "experts" in experts and "FSDP" in fsdp


# --- models that are spread over devices

def places(where):
    "A device map of the embedded model"
    return {name: "cpu" for name in ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head")} | {
        f"transformer.h.{i}": place for i, place in enumerate(where)}


@pytest.fixture(scope="module")
def whole():
    model = load_model()
    task = tasks.ioi(model, n=(48, 16, 32))
    return model, task, discover(model, task, keep=.2, recipe=Recipe(steps=20), progress=False)


@pytest.mark.parametrize("where, compacted", [(None, 8), (("cpu", "cpu", "cpu", "cpu"), 8), (("cpu", "disk", "disk", "cpu"), 4)])
def test_a_dispatched_model_has_the_same_circuit(where, compacted, whole, tmp_path):
    pytest.importorskip("accelerate")
    plain, task, wanted = whole
    spread = {"": "cpu"} if where is None else places(where)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, device_map=spread, offload_folder=tmp_path)
    model.tokenizer = plain.tokenizer
    circuit = discover(model, task, keep=.2, recipe=Recipe(steps=20), progress=False)
    assert circuit == wanted and circuit.provenance["fingerprint"] == wanted.provenance["fingerprint"]
    assert all(torch.equal(s, wanted.scores[level]) for level, s in circuit.scores.items())
    assert sum(map(bool, LAYOUTS[model].attention + LAYOUTS[model].mlp)) == compacted


def test_a_dispatched_model_is_computed_from_its_open_nodes(whole):
    "What accelerate puts around a projection whose weights stay where they are does no harm"
    accelerate = pytest.importorskip("accelerate")
    plain, task, wanted = whole
    model = accelerate.dispatch_model(load_model(), places(["cpu"] * 4), force_hooks=True)
    model.tokenizer = plain.tokenizer
    assert discover(model, task, keep=.2, recipe=Recipe(steps=20), progress=False) == wanted
    assert all(LAYOUTS[model].attention + LAYOUTS[model].mlp) and "forward" in vars(model.transformer.h[0].mlp.c_proj)
