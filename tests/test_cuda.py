"""The same on a GPU: every family, half precision, one model over two devices, and a circuit that means the same on both. Skipped without one."""
import pytest
import torch

from families import TINY, holds, pairs, short_search, tiny
from mgprune import discover, load_model, search, tasks
from mgprune.checks import trusted
from mgprune.circuit import Circuit, jaccard
from mgprune.files import read_state
from mgprune.passes import fitting_size, free_bytes
from mgprune.hooks import host_of
from mgprune.recipe import Recipe
from mgprune.streams import prepare

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
kinds = pytest.mark.parametrize("kind", TINY)
CLOSE = dict(rtol=1e-4, atol=1e-4)  # the GPU adds up in another order


@kinds
def test_every_family(kind, tmp_path):
    model = tiny(kind).to("cuda")
    trusted(model)
    holds(model)
    circuit = short_search(model)
    assert all(s.device.type == "cpu" for s in circuit.scores.values())
    here = tiny(kind)
    moved = Circuit.load(circuit.save(tmp_path / "circuit.json"), here)
    examples = [prepare(m, pairs()) for m in (model, here)]
    there, answers = (e.logits(circuit.masks().to(e.host.device)).cpu() for e in examples)
    assert moved == circuit
    torch.testing.assert_close(there, answers, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@kinds
def test_half_precision(kind, dtype):
    holds(tiny(kind, dtype).to("cuda"))


def test_one_model_on_two_devices():
    accelerate = pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cuda", "model.rotary_emb": "cuda", "model.layers.0": "cuda", "model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    model, here = accelerate.dispatch_model(tiny("llama"), places, main_device="cuda"), tiny("llama")
    holds(model)
    circuit = short_search(model)
    examples = [prepare(m, pairs()) for m in (model, here)]
    there, answers = (e.logits(circuit.masks().to(e.host.device)).cpu() for e in examples)
    torch.testing.assert_close(there, answers, **CLOSE)


def test_the_circuit_of_the_embedded_model():
    circuits = {}
    for device in ("cpu", "cuda"):
        model = load_model(device=device)
        circuits[device] = discover(model, tasks.greater_than(model), kl=.1, progress=False)
        assert circuits[device].provenance["metrics"]["kl"] < .1
    agreement = jaccard(circuits["cpu"], circuits["cuda"])
    assert agreement["head"] >= .8 and agreement["mlp_neuron"] >= .7, agreement


def test_memory_that_is_free_is_known():
    model = load_model(device="cuda")
    before = free_bytes("cuda")
    taken = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    assert before - free_bytes("cuda") >= 1 << 28
    assert fitting_size(host_of(model), tasks.ioi(model).batch("test")) == 32
    del taken


def test_a_search_goes_on(tmp_path, monkeypatch):
    model, recipe, taken = load_model().to("cuda"), Recipe(steps=40), []
    task, original = tasks.ioi(model, n=(48, 16, 32)), search.step
    def step(search):
        if len(taken) == 25: raise KeyboardInterrupt
        taken.append(original(search))
    with monkeypatch.context() as patch:
        patch.setattr(search, "step", step)
        with pytest.raises(KeyboardInterrupt): discover(model, task, keep=.2, recipe=recipe, progress=False, save=tmp_path)
    history = read_state(tmp_path)[1]["history"]
    assert len(history["kl"]) == 20  # where it is looked for what is shut
    circuit = discover(model, task, keep=.2, recipe=recipe, progress=False, save=tmp_path)
    assert circuit.n_neurons() == 512 and len(circuit.provenance.history["kl"]) == 40
    assert all(circuit.provenance.history[name][:20] == numbers for name, numbers in history.items())
