"""What a search costs, beside a plain Hugging Face forward and backward pass in the same process.

    python tests/benchmark.py                                                     # one step, in GPT-2 small's shape
    python tests/benchmark.py step circuit memory --size 8x16 --size 32x64 --out cost.json
    python tests/benchmark.py search --model smollm2
    python tests/benchmark.py --all --device cuda --out card.json                 # what one GPU should tell, in a few minutes
    python tests/benchmark.py --all --toy                                         # the same with tiny models, on a CPU

The plain passes have frozen weights and a gradient to the embeddings; one has the logits of all positions, the other those of
the last. All runs of a row are timed in turn, after a first round that does not count: on a CPU with one thread in CPU seconds,
on a GPU by its own clock. A ratio is the median over the rounds of what a run took to what the plain pass of its round took.
"""
import argparse
import json
import math
import platform
import statistics
import sys
import time
import traceback
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from measuring import against, peak_bytes, plain, saved_bytes, timed
from mgprune import discover, tasks
from mgprune.ablations import corrupt
from mgprune.arguments import InputError
from mgprune.checks import trusted
from mgprune.files import write_file
from mgprune.models import frozen, load_model
from mgprune.objective import kl_divergence
from mgprune.pairs import Batch
from mgprune.passes import circuit_logits, nbytes, open_at, projected, record, tensors
from mgprune.recipe import Goal, Recipe
from mgprune.search import Search, step
from mgprune.streams import bind
from mgprune.tree import DEFAULT_LEVELS, SiteMasks, level_shapes, site_masks

SHAPES = {
    "gpt2": GPT2Config(),
    "llama-1b": LlamaConfig(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
                            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True),
    "llama-8b": LlamaConfig(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                            num_attention_heads=32, num_key_value_heads=8),
    "toy": GPT2Config(vocab_size=211, n_positions=64, n_embd=64, n_layer=3, n_head=8, bos_token_id=0, eos_token_id=0),
    "toy-llama": LlamaConfig(vocab_size=211, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=8,
                             num_key_value_heads=2, bos_token_id=0, eos_token_id=0),
}
OPEN = {"everything open": (.98, 1.), "5 % of the neurons, 15 % of the heads": (.05, .15)}  # shares of neurons and of heads
KEPT = (1., .5, .25, .1, .05, .02)  # shares of the neurons that circuits keep
LAYERS, WIDTHS = (2, 4, 8, 16), (128, 256, 512, 1024)
PLAIN, LAST = "plain, all logits", "plain, last logits"
MOST = 1 << 40  # bytes for recorded values: all of them


# --- models and pairs

def made(config, dtype, device):
    "A model with random weights, made where it is to be"
    torch.manual_seed(0)
    with torch.device(device): return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def named(name, dtype, device):
    "A model of one of the shapes, or whatever `load_model` knows by that name"
    return made(SHAPES[name], dtype, device) if name in SHAPES else load_model(name, dtype=dtype, device=device)


def random_pairs(model, pairs, tokens):
    "Pairs of prompts without a meaning"
    vocabulary, draw = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)
    clean, other = torch.randint(0, vocabulary, (2, pairs, tokens), generator=draw).to(model.device)
    return Batch(clean, other, torch.ones_like(clean), clean[:, :1], clean[:, :0])


def drawn(shape, share, among=None):
    "A random share of all nodes of a level, drawn from some of them: a boolean tensor"
    chance = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if among is not None: chance = chance.where(among, -1.)
    kept = torch.zeros(math.prod(shape), dtype=torch.bool)
    kept[chance.flatten().topk(max(1, round(share * kept.numel()))).indices] = True
    return kept.view(shape)


def random_nodes(sites, share, heads):
    "A share of the neurons, those of attention within a share of the heads: level -> boolean tensor"
    shapes = level_shapes(sites, ("head", "attention_neuron", "mlp_neuron"))
    head = drawn(shapes["head"], heads)
    within = head[..., None].expand(shapes["attention_neuron"])
    return dict(head=head, attention_neuron=drawn(shapes["attention_neuron"], share, within),
                mlp_neuron=drawn(shapes["mlp_neuron"], share))


# --- what is measured

def standing(examples, share, heads, checkpointing=False):
    "A search whose steps all cost the same: it has these shares open, and neither its scores nor its sizes move"
    still = dict(first_size=share, largest=share, pace=1e-9, rate=1e-9, steps=10 ** 9, sharpness=(16., 16.), gradient_checkpointing=checkpointing)
    search = Search(examples, Goal(kl=.1), DEFAULT_LEVELS, Recipe(batch_size=len(examples), **still))
    if heads == 1: return search
    scores = search.ways.part(search.scores.detach().clone())
    for level, kept in random_nodes(examples.sites, share, heads).items():
        scores[level] = torch.where(kept, 1., -1.).to(search.scores)
    with torch.no_grad(): search.scores.copy_(search.ways.join(scores))
    return search


def searches(host, batch):
    "Name -> a search on these pairs: what ablated nodes hold is recorded beforehand, or in each step, or that with gradient checkpointing"
    once = bind(host, batch, corrupt, None, memory=MOST, closed=False, batch_size=len(batch))
    anew = replace(once, held=None)
    kinds = {"recorded": (once, False), "recorded anew": (anew, False), "recorded anew, checkpointed": (anew, True)}
    return {(opened, kind): standing(examples, *shares, again) for opened, shares in OPEN.items() for kind, (examples, again) in kinds.items()}


def by_python(host, batch):
    "On a GPU, the same with what is recorded beforehand, and steps that are not repeated without Python"
    if host.device.type != "cuda": return {}
    found = {(what, f"{kind}, by Python alone"): search for (what, kind), search in searches(host, batch).items() if kind == "recorded"}
    for search in found.values(): search.recorded = None
    return found


def computed(search):
    "The share of the neurons that a step computes, after a step"
    ways = search.ways
    widths = dict(attention=math.prod(ways.shapes["attention_neuron"][1:]), mlp=ways.shapes["mlp_neuron"][1])
    each = dict(attention=search.sites.head_width, mlp=1)  # neurons of a node
    left_out = sum(widths[site] - each[site] * len(nodes) for (site, _), nodes in search.only.items())
    return 1 - left_out / (search.sites.n_layers * sum(widths.values()))


# --- time

def step_costs(model, sizes, repeats):
    "A step of a search beside the plain passes, for each number of pairs and tokens"
    found, host = [], trusted(model)
    for pairs, tokens in sizes:
        batch = random_pairs(model, pairs, tokens)
        with frozen(model):
            under = searches(host, batch) | by_python(host, batch)
            runs = {name: plain(model, batch.clean, last=name == LAST) for name in (PLAIN, LAST)}
            runs |= {name: partial(step, search) for name, search in under.items()}
            rounds = timed(runs, repeats, host.device, next(iter(under.values())).period)
        for name in runs:
            what, kind = name if name in under else (name, "")
            found.append(dict(pairs=pairs, tokens=tokens, what=what, kind=kind, **ratios(rounds, name, PLAIN, LAST),
                              computed=computed(under[name]) if name in under else 1.))
    return pd.DataFrame(found)


def ratios(rounds, name, base, last):
    "Seconds of a run, its ratio to a plain pass with the smallest and largest, and the ratio to one with the last logits only"
    median, low, high = against(rounds, name, base)
    return dict(seconds=statistics.median(rounds[name]), ratio=median, low=low, high=high, to_last=against(rounds, name, last)[0])


def circuit_runs(host, batch, share):
    "Passes of a random circuit with a share of the neurons, masked and compacted; and how far their answers are apart"
    nodes = random_nodes(host.sites, share, min(1., 3 * share))
    masks = site_masks({level: kept.to(host.device, torch.float) for level, kept in nodes.items()}, host.sites)
    held = projected(host, record(host, batch.corrupt, batch.attention_mask))
    kinds = {"masked": {}, "compacted": open_at(host, masks)}
    def answers(only):
        with torch.no_grad(): return circuit_logits(host, batch, masks, held, only)
    masked, compacted = (answers(only) for only in kinds.values())
    full = masked.float().log_softmax(-1)
    def both(only):
        free = SiteMasks(*(m if m is None else m.clone().requires_grad_() for m in masks))
        kl_divergence(full, circuit_logits(host, batch, free, held, only)).mean().backward()
    passes = {"forward": answers, "forward and backward": both}
    runs = {(name, kind): partial(run, only) for name, run in passes.items() for kind, only in kinds.items()}
    return runs, ((compacted - masked).abs().max() / masked.abs().max()).item()


def circuit_costs(model, pairs, tokens, repeats, shares=KEPT):
    "Random circuits beside plain passes, over the share of the neurons that they keep"
    found, host, batch = [], trusted(model), random_pairs(model, pairs, tokens)
    base = {(passes, kind): plain(model, batch.clean, kind == LAST, passes != "forward")
            for passes in ("forward", "forward and backward") for kind in (PLAIN, LAST)}
    with frozen(model):
        for share in shares:
            runs, apart = circuit_runs(host, batch, share)
            rounds = timed(base | runs, repeats, host.device, 1 if host.device.type == "cpu" else 10)
            for passes, kind in runs:
                cost = ratios(rounds, (passes, kind), (passes, PLAIN), (passes, LAST))
                found.append(dict(share=share, heads=min(1., 3 * share), passes=passes, kind=kind, **cost, apart=apart))
    return pd.DataFrame(found)


def growth(dtype, device, pairs, tokens, repeats, layers=LAYERS, widths=WIDTHS):
    "A step with everything open beside the plain pass, over the number of layers and over the width"
    found = []
    shapes = [("layers", n, widths[1]) for n in layers] + [("width", layers[1], n) for n in widths]
    for over, n, width in shapes:
        config = GPT2Config(n_layer=n, n_embd=width, n_head=max(1, width // 64), vocab_size=1000, bos_token_id=0, eos_token_id=0)
        model = made(config, dtype, device)
        batch, host = random_pairs(model, pairs, tokens), trusted(model)
        with frozen(model):
            search = searches(host, batch)["everything open", "recorded"]
            runs = {"plain": plain(model, batch.clean), "step": partial(step, search)}
            rounds = timed(runs, repeats, host.device, search.period)
        median, low, high = against(rounds, "step", "plain")
        found.append(dict(over=over, layers=n, width=width, **{name: statistics.median(each) for name, each in rounds.items()},
                          ratio=median, low=low, high=high))
    return pd.DataFrame(found)


def exponents(table):
    "How a plain pass and a step grow: the slope of a line through the logarithms"
    return pd.DataFrame({over: {what: np.polyfit(np.log(rows[over]), np.log(rows[what]), 1)[0] for what in ("plain", "step")}
                         for over, rows in table.groupby("over")}).T.rename_axis("over")


# --- memory

def gate_tensors(search):
    "What a search holds for its gates and their optimiser"
    moments = [t for state in search.optimizer.state.values() for t in state.values()]
    return [t for t in (*vars(search).values(), *moments, search.ways.index, *search.ways.finest.values()) if torch.is_tensor(t)]


def memory_of(search, weights, run):
    "Bytes of a step by part; the search has taken one"
    held = search.examples.held.recording if search.examples.held else None
    recorded = tensors(held) if held else []
    there = [*weights, *recorded, *gate_tensors(search), search.examples.full]
    return dict(recorded=nbytes(held) if held else 0, answers=search.examples.full.nbytes,
                gates=sum(t.nbytes for t in gate_tensors(search)), saved=saved_bytes(run, there),
                peak=peak_bytes(run, search.examples.host.device))


def memory_costs(model, sizes):
    "Bytes by part: the plain passes and a step of a search, for each number of pairs and tokens"
    found, host = [], trusted(model)
    weights = [*model.parameters(), *model.buffers()]
    for pairs, tokens in sizes:
        batch = random_pairs(model, pairs, tokens)
        with frozen(model):
            for what in (PLAIN, LAST):
                run = plain(model, batch.clean, last=what == LAST)
                bytes_of = dict(saved=saved_bytes(run, weights), peak=peak_bytes(run, host.device))
                found.append(dict(pairs=pairs, tokens=tokens, what=what, kind="") | bytes_of)
            for (what, kind), search in searches(host, batch).items():
                run = partial(step, search)
                for _ in range(search.period): run()
                found.append(dict(pairs=pairs, tokens=tokens, what=what, kind=kind) | memory_of(search, weights, run))
    table = pd.DataFrame(found).fillna(0)
    table["weights"] = sum({t.data_ptr(): t.nbytes for t in weights}.values())
    table["beyond"] = table[["recorded", "answers", "gates", "peak"]].sum(axis=1)
    last = table[table["what"] == LAST].set_index(["pairs", "tokens"]).loc[[*zip(table["pairs"], table["tokens"])]]
    for name, weight in (("beyond_to_last", 0), ("to_last", table["weights"])):
        table[name] = (table["beyond"] + weight) / (last["beyond"].to_numpy() + weight)
    return table


# --- on a GPU alone, and with trained weights

def count_waits(run):
    "How often a run waits for the GPU, as torch warns"
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally: torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(w.message) for w in seen)


def waits(model, pairs, tokens):
    "Waits for the GPU within as many steps as one look at the open nodes serves, and within as many plain passes"
    host, batch = trusted(model), random_pairs(model, pairs, tokens)
    if host.device.type != "cuda": return pd.DataFrame([dict(what="a CPU is not waited for")])
    with frozen(model):
        search = searches(host, batch)["everything open", "recorded"]
        def several(run): return lambda: [run() for _ in range(search.period)]
        runs = {name: several(run) for name, run in (("plain", plain(model, batch.clean)), ("step", partial(step, search)))}
        for run in runs.values(): run()
        return pd.DataFrame([dict(what=name, times=search.period, waits=count_waits(run)) for name, run in runs.items()])


def search_cost(model, kl, steps):
    "Seconds on the clock from a model and a task to a circuit"
    recipe = Recipe(steps=steps) if steps else Recipe()
    task = tasks.ioi(model)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a search with few steps
        circuit = discover(model, task, kl=kl, recipe=recipe, progress=False)
    metrics = circuit.provenance["metrics"]
    took = time.perf_counter() - began
    return pd.DataFrame([dict(task="ioi", asked=kl, steps=recipe.steps, seconds=took, neurons=circuit.n_neurons(),
                              heads=len(circuit.heads()), kl=metrics["kl"])])


# --- the command line

PARTS = ("step", "circuit", "growth", "memory", "waits", "search")
CARD = [("gpt2", "float32"), ("llama-1b", "bfloat16"), ("llama-8b", "bfloat16")]
TOY = [("toy", "float32"), ("toy-llama", "bfloat16")]


def arguments(given=None):
    "What is asked for on the command line"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="*", help=f"of {', '.join(PARTS)}; step if none is named")
    add("--model", default="gpt2", help=f"random weights of a shape ({', '.join(SHAPES)}), or a name for load_model")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", default="float32", help="of the weights")
    add("--size", action="append", help="pairs x tokens, such as 8x16; may be given again")
    add("--repeats", type=int, help="rounds that count: 5, or 3 with --all")
    add("--kl", type=float, default=.3, help="divergence to search for")
    add("--steps", type=int, help="of a search, if not as many as usual")
    add("--all", action="store_true", help="steps, memory and waits for three shapes; circuits; a search in SmolLM2")
    add("--toy", action="store_true", help="with --all: tiny models, and a short search in the embedded one")
    add("--out", help="a file for the results, .csv or .json, written after each part")
    asked = parser.parse_args(given)
    unknown = [p for p in asked.parts if p not in PARTS]
    if unknown: parser.error(f"unknown part {unknown[0]}: expected some of {', '.join(PARTS)}")
    sizes = asked.size or (["8x16", "32x64"] if asked.all else ["8x16"])
    try: asked.sizes = [tuple(map(int, size.split("x", 1))) for size in sizes]
    except ValueError: parser.error(f"--size {asked.size}: expected pairs x tokens, such as 8x16")
    if asked.out and not asked.out.endswith((".csv", ".json")): parser.error(f"--out {asked.out}: expected a .csv or a .json")
    asked.repeats = asked.repeats or (3 if asked.all else 5)
    if asked.toy: asked.sizes = [(2, 6), (3, 8)]
    return asked


def part(name, model, asked):
    "One table of results"
    first = asked.sizes[0]
    if name == "step": return step_costs(model, asked.sizes, asked.repeats)
    if name == "circuit": return circuit_costs(model, *first, asked.repeats)
    if name == "growth": return growth(model.dtype, model.device, *first, asked.repeats)
    if name == "memory": return memory_costs(model, asked.sizes)
    if name == "waits": return waits(model, *first)
    return search_cost(model, asked.kl, asked.steps)


def plan(asked):
    "What to do: (model, type of its weights, parts)"
    if not asked.all: return [(asked.model, asked.dtype, asked.parts or ["step"])]
    shapes = [(*shape, ["step", "memory", "waits"]) for shape in (TOY if asked.toy else CARD)]
    shapes[0][2].insert(0, "circuit")
    return [*shapes, ("embedded" if asked.toy else "smollm2", "float32", ["search"])]


def about(asked):
    "On what the results were measured"
    name = torch.cuda.get_device_name() if asked.device.startswith("cuda") else f"{platform.machine()} CPU, one thread"
    return dict(device=name, torch=torch.__version__, transformers=transformers.__version__)


def write(path, results, facts):
    "Write all tables into one file"
    whole = pd.concat([table.assign(model=model, part=name, **facts) for model, name, table in results])
    text = whole.to_csv(index=False)
    if path.endswith(".json"): text = json.dumps([row.dropna().to_dict() for _, row in whole.iterrows()], indent=1)
    write_file(path, text.encode())


def main(given=None):
    "Measure what the command line asks for; returns (model, part, table)"
    asked = arguments(given)
    torch.set_num_threads(1)
    pd.set_option("display.width", 200, "display.max_columns", 30, "display.max_rows", 200)
    results, failed = [], []
    for name, dtype, parts in plan(asked):
        try: model = named(name, getattr(torch, dtype), asked.device)
        except InputError as e:
            print(f"\n{name}: not measured. {e}", flush=True)
            continue
        for each in parts:
            try: table = part(each, model, asked)
            except Exception:  # the other parts are worth having all the same
                print(f"\n{name}, {each}: not measured.\n{traceback.format_exc()}", flush=True)
                failed.append(f"{name}, {each}")
                continue
            results.append((name, each, table))
            text = table.to_string(index=False, float_format="{:.4g}".format)
            print(f"\n{name}, {dtype}, {asked.device}: {each}\n{text}", flush=True)
            if each == "growth": print(exponents(table).round(2))
            if asked.out: write(asked.out, results, about(asked))
        model = None  # before the next one is made
    if failed: sys.exit(f"not measured: {'; '.join(failed)}")
    return results


if __name__ == "__main__": main()
