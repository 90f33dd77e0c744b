"""Circuit files as a stranger may write them, with a digest that fits: python tests/strangers.py [how many] [seed]

Each file is a saved circuit in which something was changed, in one of the two formats. Loading it must give a circuit
that says what the file says, or an InputError, within a second and 200 MB. Prints how many did what.
"""
import base64
import collections
import copy
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save

from mgprune import Circuit, load_model
from mgprune.circuit import as_text, from_scores, readable
from mgprune.files import digest
from mgprune.models import InputError
from mgprune.sites import find_sites
from mgprune.tree import level_shapes

VALUES = [None, True, -1, 0, 1, 2 ** 31, 10 ** 30, 1.5, float("nan"), "", "x" * 1000, "\x1b[2J", "kept", [], [1], [[0, 0]], {}, {"head": [1, 1]}, [[[]]] * 50]


def example():
    "A circuit of the embedded model's shape, with scores and an origin"
    sites, draw = find_sites(load_model()), torch.Generator().manual_seed(0)
    scores = {l: torch.randn(s, generator=draw) + 1 for l, s in level_shapes(sites).items()}
    origin = dict(model="embedded", fingerprint="0" * 16, task="ioi", corruption="unrelated_names", seed=0, task_seed=0, pairs=[4, 2, 2],
                  metrics=dict(kl=.1, accuracy=1.), history=dict(kl=[1., .5]), settings=dict(kl=.1, threshold=0., levels=["head"]), versions=dict(torch="2"))
    return from_scores(scores, sites, provenance=origin)


def places(data, at=()):
    "The way to every value in nested lists and dictionaries"
    yield at
    steps = data.items() if isinstance(data, dict) else enumerate(data[:6]) if isinstance(data, list) else ()
    for key, value in steps: yield from places(value, (*at, key))


def with_value(data, at, value):
    "The data with another value at a place; without it where the value is Ellipsis"
    data = copy.deepcopy(data)
    inner = data
    for key in at[:-1]: inner = inner[key]
    if value is ...: del inner[at[-1]]
    else: inner[at[-1]] = value
    return data


def changed_tensors(tensors, draw):
    "The tensors with one of them changed in name, shape, type or values"
    name = draw.choice([*tensors])
    t = tensors[name]
    change = draw.choice(["name", "drop", "shape", "dtype", "invert", "nan", "one", "more"])
    others = {k: v for k, v in tensors.items() if k != name}
    if change == "drop": return others
    if change == "name": return others | {draw.choice(["evil", "kept", "kept.x", name + ".y", "../" + name]): t}
    if change == "more": return tensors | {draw.choice(["kept.expert", "kept.mlp_output", "scores.attention", "kept.attention"]): torch.ones(4, 4, dtype=torch.bool)}
    if change == "shape": return others | {name: draw.choice([t.flatten(), t[:1], t[None], torch.cat([t, t]), t[..., :0]])}
    if change == "dtype": return others | {name: t.to(draw.choice([torch.float32, torch.int64, torch.uint8, torch.bfloat16, torch.bool]))}
    if t.dtype == torch.bool:
        t = ~t if change == "invert" else t.clone()
        if change != "invert": t.view(-1)[draw.randrange(t.numel())] ^= True
    else: t = t.masked_fill(torch.rand(t.shape) < .1, float("nan") if change == "nan" else float("inf"))
    return others | {name: t.contiguous()}


def stranger(circuit, folder, draw):
    "Write one changed file and return its path"
    tensors = {f"{part}.{l}": t.contiguous() for part in ("kept", "scores") for l, t in getattr(circuit, part).items()}
    data, old = readable(circuit), draw.random() < .3
    if draw.random() < .4: tensors = changed_tensors(tensors, draw)
    else:
        for _ in range(draw.choice([1, 1, 2])):
            at = draw.choice([p for p in places(data) if p])
            data = with_value(data, at, draw.choice([*VALUES, ...]))
    arrays = save({k: v.contiguous() for k, v in tensors.items()})
    if draw.random() < .05: arrays = arrays[:draw.randrange(len(arrays))]
    data |= dict(format=f"mgprune circuit {1 if old else 2}", arrays=digest(arrays) if old else base64.b64encode(arrays).decode())
    path = folder / "stranger.json"
    path.write_text(json.dumps(data | dict(digest=digest(as_text(data).encode()))))
    if old: path.with_suffix(".safetensors").write_bytes(arrays)
    return path, data, tensors


def verdict(path, data, tensors):
    "'refused', 'the circuit that the file says', or what went wrong"
    began = time.process_time()
    try: found = Circuit.load(path)
    except InputError: said = "refused"
    except Exception as e: return f"{type(e).__name__}: {e}"[:120]
    else:
        try: repr(found), found.counts(), found.masks(), found.neurons()
        except Exception as e: return f"unusable, {type(e).__name__}: {e}"[:120]
        same = all(torch.equal(k, tensors[f"kept.{l}"]) for l, k in found.kept.items()) and readable(found)["heads"] == data["heads"]
        said = "the circuit that the file says" if same else "another circuit"
    return said if time.process_time() - began < 1 else "over a second"


def tally(n, seed=0):
    "What became of so many files: what -> how many, and the most memory that loading one added, in megabytes"
    circuit, draw, found = example(), random.Random(seed), collections.Counter()
    torch.manual_seed(seed)
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as folder:
        Circuit.load(circuit.save(f"{folder}/own.json"))
        before = peak()
        for _ in range(n): found[verdict(*stranger(circuit, Path(folder), draw))] += 1
    return dict(found), peak() - before


if __name__ == "__main__":
    found, memory = tally(*map(int, sys.argv[1:] or ["1500"]))
    for what, count in sorted(found.items(), key=lambda pair: -pair[1]): print(f"{count:6}  {what}")
    print(f"{memory:6.0f}  MB more than before at most")
