"""What other tools take for one look at the same job, beside a plain Hugging Face pass in the same environment.

    python tests/peers.py                                 # all of them, in a temporary folder
    python tests/peers.py nnsight pyvene --folder ~/peers --out peers.json

The job is that of the benchmark: GPT-2 small's shape with random weights, 8 pairs of 16 tokens, one thread, CPU seconds. Each
tool is installed from PyPI into an environment of its own, which a folder that is given keeps for the next time; one that is
not there within ten minutes is left out. The jobs differ in what they find out, so the ratios say what a look costs, not what
it is worth.
"""
import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

PAIRS, TOKENS = 8, 16
REPEATS, SHORT = 3, 20  # rounds that count of jobs that take fewer seconds than this; the others have one
PEERS = {  # name -> what pip installs
    "nnsight": ["nnsight==0.8.1"],
    "pyvene": ["pyvene==0.1.8"],
    "auto-circuit": ["auto-circuit==1.0.1", "transformer-lens<3", "pyarrow<22"],  # it imports what later ones have not
    "transformer-lens": ["transformer-lens==4.3.0"],
}
TORCH = "torch==2.13.0"
SECONDS = 600  # for an installation


# --- in the tool's environment: each job is a dictionary of name -> run

def nnsight(model, clean, corrupt):
    "Gradient times difference at the neurons of attention and MLP: a pass on the corrupted prompts, and one with a gradient"
    import torch
    from nnsight import NNsight
    traced, layers = NNsight(model), range(model.config.n_layer)
    def sites():
        return {(kind, i): getattr(traced.transformer.h[i], kind).c_proj.input for i in layers for kind in ("attn", "mlp")}
    def attribution():
        with torch.no_grad():
            with traced.trace(corrupt):
                held = sites().save()
        embeds = model.transformer.wte(clean).detach().requires_grad_()
        with traced.trace(inputs_embeds=embeds):
            seen, scores = sites(), {}.save()
            loss = traced.lm_head.output[:, -1].logsumexp(-1).sum()
            with loss.backward():
                for place in reversed(seen):
                    scores[place] = (seen[place].grad * (held[place] - seen[place])).sum((0, 1)).detach()
        assert len(scores) == 2 * len(layers)
    return {"attribution of neurons": attribution}


def pyvene(model, clean, corrupt):
    "A step of sigmoid masks at the neurons of attention and MLP"
    import pyvene
    import torch
    model.set_attn_implementation("eager")  # the other one reads what the masks change in place
    kinds = ("attention_value_output", "mlp_activation")
    sites = [dict(layer=i, component=kind, intervention_type=pyvene.SigmoidMaskIntervention)
             for i in range(model.config.n_layer) for kind in kinds]
    masked = pyvene.IntervenableModel(pyvene.IntervenableConfig(sites), model)
    masked.set_device("cpu")
    gates = [p for x in masked.interventions.values() for name, p in x.named_parameters() if name == "mask"]
    optimizer = torch.optim.Adam(gates)
    with torch.no_grad(): full = model(clean).logits[:, -1].log_softmax(-1)
    def step():
        optimizer.zero_grad()
        _, found = masked(dict(input_ids=clean), [dict(input_ids=corrupt)] * len(sites))
        (full.exp() * (full - found.logits[:, -1].log_softmax(-1))).sum(-1).mean().backward()
        assert all(g.grad is not None for g in gates)
        optimizer.step()
    return {"a step of masks on neurons": step}


def auto_circuit(model, clean, corrupt):
    "The gradient of a mask on every edge, which is edge attribution"
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
    from auto_circuit.utils.graph_utils import patchable_model
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    c = model.config
    shape = dict(n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.n_positions, d_head=c.n_embd // c.n_head, n_heads=c.n_head,
                 d_mlp=4 * c.n_embd, d_vocab=c.vocab_size, act_fn="gelu_new", normalization_type="LN", device="cpu")
    each = dict(use_attn_result=True, use_split_qkv_input=True, use_hook_mlp_in=True)  # what an edge ends in and begins with
    hooked = HookedTransformer(HookedTransformerConfig(**shape, **each))
    for p in hooked.parameters(): p.requires_grad_(False)
    patchable = patchable_model(hooked, factorized=True, slice_output="last_seq", separate_qkv=True)
    pairs = PromptDataset([*clean], [*corrupt], [*clean[:, :1]], [*corrupt[:, :1]])
    loader = PromptDataLoader(pairs, seq_len=clean.shape[1], diverge_idx=0, batch_size=len(clean))
    def attribution(): mask_gradient_prune_scores(patchable, loader, None, "logit", "avg_diff", mask_val=0.)
    return {"attribution of edges": attribution}


def transformer_lens(model, clean, corrupt):
    "Attribution of nodes, and of edges"
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({str(i): i for i in range(model.config.vocab_size)}, unk_token="0"))
    with tempfile.TemporaryDirectory() as folder:  # it asks for a tokenizer that it can read again
        PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", eos_token="0", pad_token="0").save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model.config.name_or_path = "gpt2"
        for p in model.parameters(): p.requires_grad_(True)  # nothing else makes its passes keep a graph
        bridge = TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=tokenizer).eval()
    def last(logits): return logits[:, -1].logsumexp(-1).sum()
    def attribution(level): attribution_patch(bridge, clean, corrupt, last, EdgeAttributionConfig(granularity=level))
    return {"attribution of nodes": lambda: attribution("node"), "attribution of edges": lambda: attribution("edge")}


def measure(name):
    "Print what the tool takes, a line of JSON for each of its jobs"
    import torch
    import transformers
    from measuring import against, peak_bytes, plain, timed
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().requires_grad_(False)
    clean, corrupt = torch.randint(0, model.config.vocab_size, (2, PAIRS, TOKENS))
    plains = {"plain": plain(model, clean), "plain, last logits": plain(model, clean, last=True)}
    own = globals()[name.replace("-", "_")](copy.deepcopy(model), clean, corrupt)
    for job, run in {"plain": plains["plain"], "plain, last logits": plains["plain, last logits"], **own}.items():
        began = time.process_time()
        peak = peak_bytes(run, device)
        peak_seconds = time.process_time() - began
        rounds = timed(plains | {job: run}, REPEATS if peak_seconds < SHORT else 1, device, first=0)  # all have run once
        ratio, low, high = against(rounds, job, "plain")
        cost = dict(seconds=statistics.median(rounds[job]), ratio=ratio, low=low, high=high, peak=peak)
        versions = dict(torch=torch.__version__, transformers=transformers.__version__)
        print(json.dumps(dict(tool=name, what=job) | cost | versions), flush=True)


# --- here

def environment(place, packages):
    "The Python of an environment with these packages, made if it is not there"
    python = place / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if (place / "done").exists(): return python
    venv.create(place, with_pip=True, clear=True)
    command = [python, "-m", "pip", "install", "--quiet", *packages]
    subprocess.run(command, check=True, timeout=SECONDS, capture_output=True)
    (place / "done").touch()
    return python


def results(names, folder):
    "What each tool takes, one job after another; why it was not run, if it was not"
    for name in names:
        try: python = environment(Path(folder).absolute() / name, [TORCH, *PEERS[name]])
        except subprocess.SubprocessError as e:
            yield dict(tool=name, what=f"not run: its installation failed, {type(e).__name__}")
            continue
        ended = subprocess.run([python, "-W", "ignore", __file__, "--measure", name], capture_output=True, text=True, env=os.environ | dict(MPLBACKEND="agg"))  # not a notebook's
        yield from (json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"tool"'))
        said = ended.stderr.strip().splitlines() or ["no message"]
        if ended.returncode: yield dict(tool=name, what=f"ended early: {said[-1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PEERS)}; all if none is named")
    parser.add_argument("--folder", type=Path, help="where the environments are made and kept; else a temporary folder")
    parser.add_argument("--out", type=Path, help="a file for the results, as JSON")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    unknown = [n for n in [*asked.names, *filter(None, [asked.measure])] if n not in PEERS]
    if unknown: parser.error(f"unknown tool {unknown[0]}: expected some of {', '.join(PEERS)}")
    if asked.measure: return measure(asked.measure)
    with tempfile.TemporaryDirectory() as passing:
        found = []
        for row in results(asked.names or [*PEERS], asked.folder or passing):
            found.append(row)
            cost = "{seconds:8.2f} s {ratio:7.2f} x plain, {peak:>14,} bytes".format(**row) if "seconds" in row else ""
            print(f"{row['tool']:<17} {row['what']:<27} {cost}", flush=True)
    if asked.out: asked.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__": main()
