"""How many edges other tools' attributions need at the divergence that our search holds, on the embedded model.

    python tests/edge_peers.py                                             # both tools, in a temporary folder
    python tests/edge_peers.py eap --eap ~/EAP-IG --folder ~/peers --out edge_peers.json

Each tool ranks all edges of the model in an environment of its own, by the same 128 training pairs of each task; a folder that
is given keeps the environments for the next time. EAP-IG is not on PyPI: pip takes it from GitHub, or from a copy that --eap
names. Every ranking, ours too, is then cut here at the same divergence on the same pairs, and edges that the budget does not
need are closed one by one. Seconds are those of a CPU thread, for the ranking alone.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from peers import SECONDS, TORCH, environment

TASKS, PAIRS, KL = ("ioi", "greater_than", "gendered_pronoun"), 128, .1
BATCH, POINTS = 8, 5  # pairs at a time, and points on the path
LENS = ["transformer-lens<3", "pyarrow<22"]  # auto-circuit imports what later ones have not
PEERS = {  # name -> what pip installs
    "auto-circuit": ["auto-circuit==1.0.1", *LENS],
    "eap": ["eap @ git+https://github.com/hannamw/EAP-IG@795f560", *LENS],
}


# --- in the tool's environment: each gives the scores of all edges by a way of its own

def hooked(config, state):
    "The model as TransformerLens has it, with every edge's end and beginning in reach"
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    model.load_state_dict(state)
    shape = dict(n_layers=config["n_layer"], d_model=config["n_embd"], n_ctx=config["n_positions"], n_heads=config["n_head"],
                 d_head=config["n_embd"] // config["n_head"], d_mlp=config["n_inner"], d_vocab=config["vocab_size"],
                 act_fn="gelu_new", normalization_type="LN", eps=config["layer_norm_epsilon"], device="cpu")
    each = dict(use_attn_result=True, use_split_qkv_input=True, use_hook_mlp_in=True)
    found = HookedTransformer(HookedTransformerConfig(**shape, **each))
    found.load_state_dict(convert_gpt2_weights(model, found.cfg), strict=False)
    return model, found


def auto_circuit(model, batches):
    "The gradient of a mask on every edge, in the open model and on the way from closed to open"
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
    from auto_circuit.utils.graph_utils import patchable_model
    for p in model.parameters(): p.requires_grad_(False)
    patchable = patchable_model(model, factorized=True, slice_output="last_seq", separate_qkv=True)
    def loader(clean, corrupt, answer, wrong):
        named = [[ids[ids >= 0] for ids in rows] for rows in (answer, wrong)]
        return PromptDataLoader(PromptDataset([*clean], [*corrupt], *named), clean.shape[1], 0, batch_size=len(clean))
    loaded = [batch for parts in batches for batch in loader(*parts)]
    def name(node):
        if node.name == "Resid Start": return "input"
        if node.name == "Resid End": return "logits"
        if node.name.startswith("MLP"): return f"m{node.name.split()[1]}"
        layer, head, *part = node.name[1:].split(".")
        return f"a{layer}.h{head}" + "".join(f"<{p.lower()}>" for p in part)
    def scores(**how):
        found = mask_gradient_prune_scores(patchable, loaded, None, "logit", "avg_diff", **how)
        return {f"{name(e.src)}->{name(e.dest)}": e.prune_score(found).item() for e in patchable.edges}
    return {"gradient, logit difference": lambda: scores(mask_val=0.),
            "five points, logit difference": lambda: scores(integrated_grad_samples=POINTS - 1)}


def eap(model, batches):
    "Edge attribution patching, with one gradient and with those on the way of the embedding"
    import torch
    from eap import attribute as tool
    from eap.graph import Graph
    zeros = torch.zeros
    def kept(values, ids): return values.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf).logsumexp(-1)
    def difference(logits, full, lengths, label):
        return (kept(logits[:, -1], label[1]) - kept(logits[:, -1], label[0])).sum()
    def kl(logits, full, lengths, label):
        p, q = (x[:, -1].log_softmax(-1) for x in (full, logits))
        return (p.exp() * (p - q)).sum()
    def tokens(model, ids, *_): return ids, torch.ones_like(ids), torch.full((len(ids),), ids.shape[1]), ids.shape[1]
    def scores(method, metric, **how):
        graph, loader = Graph.from_model(model), [(clean, corrupt, rest) for clean, corrupt, *rest in batches]
        here = lambda *size, device=None, **named: zeros(*size, **named)  # it names a GPU
        with mock.patch.object(tool, "tokenize_plus", tokens), mock.patch.object(torch, "zeros", here):
            tool.attribute(model, graph, loader, metric, method, quiet=True, **how)
        return {name: edge.score.item() for name, edge in graph.edges.items()}
    return {"EAP, logit difference": lambda: scores("EAP", difference),
            "EAP-IG, logit difference": lambda: scores("EAP-IG-inputs", difference, ig_steps=POINTS),
            "EAP-IG, KL": lambda: scores("EAP-IG-inputs", kl, ig_steps=POINTS)}


def measure(name, job):
    "Print the scores by each of the tool's ways and what they take, a line of JSON for each"
    import torch
    torch.set_num_threads(1)
    given = torch.load(job, weights_only=True)
    for task, batches in given["batches"].items():
        plain, model = hooked(given["config"], given["state"])
        clean = batches[0][0]
        with torch.no_grad(): assert torch.allclose(model(clean)[:, -1], plain(clean).logits[:, -1], atol=1e-3)
        for how, run in globals()[name.replace("-", "_")](model, batches).items():
            run()  # the first time is not counted
            model.zero_grad()
            began = time.process_time()
            scores = run()
            print(json.dumps(dict(tool=name, how=how, task=task, seconds=time.process_time() - began, scores=scores)), flush=True)


# --- here

def tasks_of(model):
    "The three tasks, with pairs to train, to choose and to test with"
    from mgprune import tasks
    return {name: tasks.load(model, name, n=(384, 128, 128)) for name in TASKS}


def job_of(model, tasks):
    "What a tool is given: the weights, and pairs of one length together, a batch at a time"
    import torch
    batches = {}
    for name, task in tasks.items():
        pairs = task.batch("train")[:PAIRS]
        lengths = pairs.attention_mask.sum(1)
        batches[name] = [
            [pairs.clean[rows, -length:], pairs.corrupt[rows, -length:], pairs.answer[rows], pairs.wrong[rows]]
            for length in lengths.unique().tolist() for rows in (lengths == length).nonzero().flatten().split(BATCH)]
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon")
    return dict(config={name: getattr(model.config, name) for name in names}, batches=batches,
                state={name: t.detach().clone() for name, t in model.state_dict().items()})


def own_rankings(model, tasks):
    "The same of ours: slopes at the open model and on the way, and the learned order"
    import torch
    from mgprune.circuit import full_circuit
    from mgprune.edge_pass import FRAMES, path_slopes, prepare_edges, wires_of
    from mgprune.edge_search import learned_order, over_edges, spread_ranks
    from mgprune.recipe import Recipe
    from mgprune.sites import find_sites
    from mgprune.wiring import writers_of
    circuit = full_circuit(find_sites(model))
    for name, task in tasks.items():
        train = prepare_edges(circuit, model, task, "train", None, BATCH)
        wires, wiring = wires_of(train.host, circuit.masks(), writers_of(circuit)), FRAMES[model][1].wiring
        readers, writers = wiring.exists.nonzero().T
        def slopes(points, worth): return path_slopes(wires, train[:PAIRS], points, worth)[readers, writers]
        def learned():
            start = spread_ranks(slopes(POINTS, "kl").abs())
            return learned_order(over_edges(wires, (readers, writers)), train, start, KL, Recipe(steps=100), 0)[0].exp()
        ways = {"gradient, logit difference": lambda: slopes(0, "logit_difference"),
                "five points, KL": lambda: slopes(POINTS, "kl"), "learned, KL": learned}
        for how, run in ways.items():
            began = time.process_time()
            found = run()
            names = [f"{wiring.writers[w]}->{wiring.readers[r]}" for r, w in zip(readers.tolist(), writers.tolist())]
            yield dict(tool="mgprune", how=how, task=name, seconds=time.process_time() - began, scores=dict(zip(names, found.tolist())))


def cut(model, task, scores):
    "How many edges are left at the divergence, before and after single ones are closed"
    import torch
    from mgprune.circuit import full_circuit
    from mgprune.edge_pass import prepare_edges
    from mgprune.edge_search import best_cut, budget_of, closing_slopes, irreducible, marks_of
    from mgprune.graph import Graph
    from mgprune.sites import find_sites
    from mgprune.wiring import Wiring, closed_edges
    circuit = full_circuit(find_sites(model))
    wiring, budget = Wiring(circuit.sites), budget_of(circuit, model, task, KL, None, .95)
    places = [edge.split("->") for edge in sorted(scores, key=lambda edge: -abs(scores[edge]))]
    rows, columns = ([names.index(name) for name in own] for names, own in zip((wiring.writers, wiring.readers), zip(*places)))
    assert len(places) == int(wiring.exists.sum()), "every edge has a score"
    def first(n):
        kept = torch.zeros_like(wiring.exists)
        kept[columns[:n], rows[:n]] = True
        return closed_edges(wiring, kept)
    kept = first(best_cut(len(places), lambda n: budget.over(first(n), circuit), 9 * KL))
    slopes = closing_slopes(kept, circuit, prepare_edges(circuit, model, task, "train", PAIRS, BATCH))
    fewer, _ = irreducible(kept, circuit, budget, slopes)
    graph = Graph(fewer, circuit)
    return dict(cut=int(kept.sum()), edges=len(graph), kl=marks_of(graph, model, task, budget)["kl"])


def rankings(names, folder, job):
    "What each tool says, one after another; why it was not run, if it was not"
    for name in names:
        try: python = environment(folder / name, [TORCH, *PEERS[name]])
        except subprocess.SubprocessError as e:
            yield dict(tool=name, how=f"not run: its installation failed within {SECONDS} s, {type(e).__name__}")
            continue
        command = [python, "-W", "ignore", __file__, "--measure", name, "--job", job]
        ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(MPLBACKEND="agg"))  # not a notebook's
        yield from (json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"tool"'))
        said = ended.stderr.strip().splitlines() or ["no message"]
        if ended.returncode: yield dict(tool=name, how=f"ended early: {said[-1]}")


def results(model, names, folder):
    "A row for each ranking of each task, ours first"
    import torch
    tasks = tasks_of(model)
    with tempfile.TemporaryDirectory() as passing:
        job = Path(passing) / "job.pt"
        torch.save(job_of(model, tasks), job)
        for row in (row for some in (own_rankings(model, tasks), rankings(names, folder, job)) for row in some):
            yield row | cut(model, tasks[row["task"]], row.pop("scores")) if "scores" in row else row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PEERS)}; all if none is named")
    parser.add_argument("--eap", help="a copy of EAP-IG to install, rather than the one on GitHub")
    parser.add_argument("--folder", type=Path, help="where the environments are made and kept; else a temporary folder")
    parser.add_argument("--out", type=Path, help="a file for the results, as JSON")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    unknown = [n for n in [*asked.names, *filter(None, [asked.measure])] if n not in PEERS]
    if unknown: parser.error(f"unknown tool {unknown[0]}: expected some of {', '.join(PEERS)}")
    if asked.measure: return measure(asked.measure, asked.job)
    if asked.eap: PEERS["eap"][0] = asked.eap
    import torch
    from mgprune import load_model
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as passing:
        for row in results(load_model(), asked.names or [*PEERS], (asked.folder or Path(passing)).absolute()):
            found.append(row)
            said = "{task:<17} {cut:>4} edges, then {edges:>4}, KL {kl:.3f} {seconds:7.2f} s".format(**row) if "cut" in row else ""
            print(f"{row['tool']:<13} {row['how']:<30} {said}", flush=True)
    if asked.out: asked.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__": main()
