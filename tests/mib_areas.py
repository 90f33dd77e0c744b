"""The areas of rankings by the Mechanistic Interpretability Benchmark's own code, and by mib_curve: they are to be the same.

    python tests/mib_areas.py                                    # clones the benchmark, in a temporary folder
    python tests/mib_areas.py --mib ~/MIB-circuit-track --eap ~/EAP-IG --folder ~/mib

The benchmark's code runs in an environment of its own, which a folder that is given keeps for the next time, on the embedded
model in TransformerLens. Both sides have the same tokens, all of one length, the same scores of heads and MLPs, by attribution and by chance, 64-bit weights
and the first wrong answer alone. The benchmark also counts a node for the input; it has no score here, as what is not scored
stays open there.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

SOURCES = {  # folder -> where it is published, and the commit that is compared with
    "mib": ("https://github.com/hannamw/MIB-circuit-track", "b759df34433c9e31043ba9e02908ce0bf20e894f"),
    "eap": ("https://github.com/hannamw/EAP-IG", "7af394a5662de8b23ad6154716a0cd3993d447a3"),
}
NEEDED = ["torch==2.13.0", "transformer-lens==2.16.1", "transformers<5", "pyarrow<22"]
SIGNS, PAIRS, WITHIN = ("signed", "absolute"), 48, 1e-6
SECONDS = 900  # for an installation


# --- in the benchmark's environment

def benchmark(folder, mib, eap):
    "The areas and the faithfulness at every size, by the benchmark's code, written beside what it was given"
    sys.path[:0] = [str(mib), str(eap / "src")]
    import torch
    import eap.evaluate
    from eap.graph import Graph
    from MIB_circuit_track.evaluation import evaluate_area_under_curve
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2LMHeadModel
    given = torch.load(folder / "given.pt")
    plain = GPT2LMHeadModel.from_pretrained(folder / "model", dtype=torch.float64).eval()
    c = plain.config
    model = HookedTransformer(HookedTransformerConfig(
        n_layers=c.n_layer, d_model=c.n_embd, n_heads=c.n_head, d_head=c.n_embd // c.n_head, d_mlp=c.n_inner or 4 * c.n_embd, n_ctx=c.n_positions,
        d_vocab=c.vocab_size, act_fn=c.activation_function, normalization_type="LN", eps=c.layer_norm_epsilon, dtype=torch.float64, device="cpu",
        use_attn_result=True, use_split_qkv_input=True, use_hook_mlp_in=True))
    model.load_state_dict(convert_gpt2_weights(plain, model.cfg), strict=False)
    with torch.no_grad(): apart = (model(given["clean"]) - plain(given["clean"]).logits).abs().max().item()
    assert apart < 1e-8, f"TransformerLens and transformers are {apart} apart"
    # prompts are tokens already
    eap.evaluate.tokenize_plus = lambda model, ids: (ids, torch.ones_like(ids), torch.full((len(ids),), ids.shape[1]), ids.shape[1])
    def difference(logits, corrupted, lengths, label):
        last, rows = logits[:, -1], torch.arange(len(logits))
        return last[rows, label[:, 0]] - last[rows, label[:, 1]]
    loader = list(zip(*(given[name].split(16) for name in ("clean", "corrupt", "label"))))
    found = {}
    for ranking, sign in ((name, sign) for name in given["scores"] for sign in SIGNS):
        graph = Graph.from_model(model, node_scores=True)
        graph.nodes_scores.fill_(torch.nan)
        for level, scores in given["scores"][ranking].items():
            for place in map(tuple, torch.cartesian_prod(*map(torch.arange, scores.shape)).reshape(-1, scores.dim()).tolist()):
                name = f"a{place[0]}.h{place[1]}" if level == "head" else f"m{place[0]}"
                graph.nodes_scores[graph.forward_index(graph.nodes[name], attn_slice=False)] = scores[place]
        _, cpr, cmd, _, faithfulness = evaluate_area_under_curve(model, graph, loader, difference, quiet=True, level="node", absolute=sign == "absolute")
        found[f"{ranking}, {sign}"] = dict(cpr=cpr, cmd=cmd, faithfulness=faithfulness)
    (folder / "benchmark.json").write_text(json.dumps(found))


# --- here

def prepared(folder):
    "Write the model, the pairs and the scores; returns the areas and the faithfulness at every size by mib_curve"
    import torch
    from mgprune import load_model, prepare, tasks
    from mgprune.attribution import attribute
    from mgprune.curves import mib_curve
    from mgprune.pairs import Batch
    model = load_model()
    whole = tasks.ioi(model, n=(64, 8, 512)).batch("test")
    lengths = whole.attention_mask.sum(1)
    rows = (lengths == lengths.mode().values).nonzero().flatten()[:PAIRS]
    width = int(lengths[rows[0]])
    batch = Batch(whole.clean[rows, -width:], whole.corrupt[rows, -width:], whole.attention_mask[rows, -width:], whole.answer[rows, :1], whole.wrong[rows, :1])
    assert batch.attention_mask.all() and torch.equal(batch.clean[:, -1], batch.corrupt[:, -1])
    examples = prepare(model, batch)
    ranked = attribute(model, examples, signed=True, levels=("head", "mlp"))
    noise = torch.Generator().manual_seed(0)
    rankings = dict(attribution=ranked, noise={level: torch.randn(s.shape, generator=noise) for level, s in ranked.items()})
    (folder / "model").mkdir()
    model.save_pretrained(folder / "model")
    torch.save(dict(clean=batch.clean, corrupt=batch.corrupt, label=torch.cat([batch.answer, batch.wrong], 1), scores=rankings), folder / "given.pt")
    exact = prepare(model.double(), batch)
    curves = {f"{name}, {sign}": mib_curve(scores, model, exact, "node", sign, draws=2) for name, scores in rankings.items() for sign in SIGNS}
    return {name: dict(cpr=c.cpr, cmd=c.cmd, faithfulness=[*c.table["faithfulness"]]) for name, c in curves.items()}


def cloned(name, folder):
    "The folder of a source at its commit"
    url, commit = SOURCES[name]
    place = folder / name
    if not place.exists(): subprocess.run(["git", "clone", "--quiet", url, place], check=True)
    subprocess.run(["git", "-C", place, "checkout", "--quiet", commit], check=True)
    return place


def installed(folder):
    "The Python of the benchmark's environment, made if it is not there"
    place = folder / "environment"
    python = place / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if (place / "done").exists(): return python
    venv.create(place, with_pip=True, clear=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDED], check=True, timeout=SECONDS)
    (place / "done").touch()
    return python


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=Path, help="the benchmark's code; else it is cloned")
    parser.add_argument("--eap", type=Path, help="the code of EAP-IG that it stands on; else it is cloned")
    parser.add_argument("--folder", type=Path, help="where the environment and the clones are made and kept; else a temporary folder")
    parser.add_argument("--python", type=Path, help="the Python of an environment that has what is needed; else one is made")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run: return benchmark(asked.run, asked.mib, asked.eap)
    with tempfile.TemporaryDirectory() as passing:
        own, kept = Path(passing), (asked.folder or Path(passing)).absolute()
        sources = {name: (getattr(asked, name) or cloned(name, kept)).absolute() for name in SOURCES}
        ours = prepared(own)
        command = [asked.python or installed(kept), __file__, "--run", own, "--mib", sources["mib"], "--eap", sources["eap"]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        theirs = json.loads((own / "benchmark.json").read_text())
    for name, a in ours.items():
        b = theirs[name]
        apart = max(abs(x - y) for x, y in zip([a["cpr"], a["cmd"], *a["faithfulness"]], [b["cpr"], b["cmd"], *b["faithfulness"]], strict=True))
        print(f"{name:<22} CPR {a['cpr']:.7f} and {b['cpr']:.7f}, CMD {a['cmd']:.7f} and {b['cmd']:.7f}; largest difference, faithfulness included, {apart:.1e}")
        assert apart < WITHIN, f"{name}: {a} and {b}"


if __name__ == "__main__": main()
