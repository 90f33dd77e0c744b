"""What each of several processes does: `torchrun --nproc_per_node 2 processes.py WORK FOLDER`. The results go into the folder."""
import sys
import warnings
from pathlib import Path

import torch

from families import Pairs, pairs, short_search, tiny
from mgprune import discover, evaluate, load_model, search, tasks
from mgprune.arguments import InputError
from mgprune.attribution import attribute
from mgprune.gates import HardConcrete, Sigmoid
from mgprune.models import fingerprint
from mgprune.processes import together
from mgprune.recipe import Goal, Recipe
from mgprune.search import Search, run
from mgprune.streams import prepare
from mgprune.tree import DEFAULT_LEVELS

PRICES = Goal(penalties=dict(head=1e-3, mlp=1e-3, attention_neuron=1e-5, mlp_neuron=1e-5))
SEARCHES = {  # name -> goal, gates, pairs per step, steps, precision of the model
    "eight": (Goal(kl=.1), Sigmoid(), 8, 50, torch.float32),
    "exact": (Goal(kl=.1), Sigmoid(), 8, 50, torch.float64),
    "three": (Goal(kl=.1), Sigmoid(), 3, 20, torch.float64),
    "one": (Goal(keep=.1), Sigmoid(), 1, 20, torch.float64),
    "noise": (PRICES, HardConcrete(), 3, 20, torch.float64),
}


def searches():
    "The state of each search at its end, by name"
    found = {}
    for name, (goal, gate, size, steps, dtype) in SEARCHES.items():
        model = load_model(dtype=dtype)
        examples = prepare(model, tasks.ioi(model, n=(48, 8, 8)), "train")
        search = Search(examples, goal, DEFAULT_LEVELS, Recipe(steps=steps, batch_size=size), gate)
        run(search, progress=False)
        found[name] = dict(scores=search.scores.detach(), average=search.average, felt=search.felt, counted=search.counted, history=search.history)
    return found


def refused(act):
    "What is said of something that is refused; None if it is not"
    try: act()
    except InputError as e: return str(e)


def broken_off(act, after):
    "Break it off after so many steps"
    step, done = search.step, []
    def once(search):
        if len(done) == after: raise KeyboardInterrupt
        done.append(step(search))
    search.step = once
    try: act()
    except KeyboardInterrupt: return
    finally: search.step = step


def discoveries(folder):
    "Circuits that all find together, also after an interruption, and what they hear whose calls are not the same or are refused"
    model = load_model()
    task = tasks.ioi(model, n=(48, 16, 16))
    def search(save, **options): return discover(model, task, kl=.3, recipe=Recipe(steps=20, confidence=None), save=save, **options)
    circuit = search(folder / "run")
    broken_off(lambda: search(folder / "broken"), 8)
    (folder / "full").mkdir(exist_ok=True)
    (folder / "full" / "notes.txt").touch()
    circuits = dict(found=circuit, read_back=search(folder / "run"), gone_on=search(folder / "broken"))
    return dict(kept={name: c.kept for name, c in circuits.items()}, scores={name: c.scores for name, c in circuits.items()},
                own_seeds=refused(lambda: search(None, seed=together()[0])), full=refused(lambda: search(folder / "full")))


def data(folder):
    "Searches that are shared"
    return dict(searches=searches(), discoveries=discoveries(folder))


def of(model):
    "What a tiny model says of itself, its circuit and its nodes"
    examples = prepare(model, pairs(), ablation="mean", reference=pairs(), output=True)
    search = Search(examples, Goal(keep=.3), (*DEFAULT_LEVELS, "mlp_output"), Recipe(steps=10, batch_size=2))
    run(search, progress=False)
    circuit = short_search(model)
    return dict(fingerprint=fingerprint(model), scores=search.scores.detach(), kept=circuit.kept, kl=evaluate(circuit, model, Pairs())["kl"],
                attributed=attribute(model, pairs(), "gradient", signed=True), full=examples.full)


def refusals(model, folder):
    "What is refused of a model that is spread over processes"
    said = []
    circuit = short_search(model)
    for use in (lambda: circuit.export(model, folder / "exported"), lambda: prepare(model, pairs(), ablation="zero", output=True)):
        said.append(refused(use))
    return said


def tensor(folder):
    "Models that transformers spreads over the processes"
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    def opened(kind): return AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float64, distributed_config=DistributedConfig(tp_size=2))
    found = {kind: of(opened(kind)) for kind in ("llama", "uneven")}
    found["refusals"] = refusals(opened("llama"), folder)
    from torch.distributed.fsdp import fully_shard
    found["refusals"] += [refused(lambda: prepare(model, pairs())) for model in (opened("mixtral"), fully_shard(tiny("llama")))]
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # random models are right on few pairs, and short searches end early
    work, folder = sys.argv[1], Path(sys.argv[2])
    results = dict(data=data, tensor=tensor)[work](folder)
    torch.save(results, folder / f"{work}-{together()[0]}.pt")
