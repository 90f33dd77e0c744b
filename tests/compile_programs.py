"""Compile the programs of `mgprune.compiled`: python tests/compile_programs.py OUT_DIR

Needs tracr-pypi, jax and safetensors, and nothing of mgprune: run it in an environment of its own, when a program
changes. It writes one file for each program: the weights in the coordinates of the program, what the coordinates
and tokens are called, and what the compiled program says to a few inputs.
"""
import json
import os
import random
import re
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from tracr.compiler import compiling
from tracr.rasp import rasp
from tracr.rasp.causal_eval import evaluate

BOS = "<bos>"
STEEP = 128  # slope of the steps of an MLP: more than one over the smallest half distance between the depths of eight brackets


def induction():
    "The token that followed the current token when it was read before"
    before = rasp.Select(rasp.indices, rasp.indices, lambda key, query: key == query - 1).named("before")
    previous = rasp.categorical(rasp.Aggregate(before, rasp.tokens)).named("previous")
    follows = rasp.Select(previous, rasp.tokens, lambda key, query: key == query).named("follows")
    return rasp.categorical(rasp.Aggregate(follows, rasp.tokens)).named("next")


def share_of(token, name):
    "The share of the tokens so far that are `token`"
    is_token = rasp.numerical(rasp.Map(lambda t: int(t == token), rasp.tokens)).named(f"is_{name}")
    so_far = rasp.Select(rasp.indices, rasp.indices, rasp.Comparison.LEQ)
    return rasp.numerical(rasp.Aggregate(so_far, is_token, default=0)).named(f"share_{name}")


def fraction():
    "The share of the tokens so far that are x"
    return share_of("x", "x")


def count():
    "How many tokens so far are equal to the current token"
    same = rasp.Select(rasp.tokens, rasp.tokens, rasp.Comparison.EQ).named("same")
    return rasp.categorical(rasp.SelectorWidth(same)).named("count")


def brackets():
    "Whether every closing bracket so far closes an open one"
    depth = rasp.numerical(rasp.LinearSequenceMap(share_of("(", "open"), share_of(")", "close"), 1, -1)).named("depth")
    below = rasp.numerical(rasp.Map(lambda d: int(d < -1e-6), depth)).named("below")
    so_far = rasp.Select(rasp.indices, rasp.indices, rasp.Comparison.LEQ)
    bad = rasp.numerical(rasp.Aggregate(so_far, below, default=0)).named("bad")
    return rasp.categorical(rasp.Map(lambda b: "no" if b > 1e-6 else "yes", bad)).named("closed")


# program, its tokens, the longest input, and how often a token may occur in the inputs that are kept: induction averages
# over what followed a token, which has no meaning for a token that was read more than once before
PROGRAMS = dict(induction=(induction, "abcdefgh", 9, 2), fraction=(fraction, "abx", 8, 8), count=(count, "abc", 8, 8),
                brackets=(brackets, "()", 8, 8))


def used(matrix):
    "Indices of the columns that are not all zero"
    return np.abs(matrix).sum(0).nonzero()[0]


def heads_of(params, layer, config):
    "Name -> array of each head of a layer that does something; a score is the product of query and key"
    parts = {part: np.asarray(params[f"transformer/layer_{layer}/attn/{part}"]["w"]) for part in ("query", "key", "value", "linear")}
    split = {part: np.split(w.T if part != "linear" else w, config.num_heads) for part, w in parts.items()}
    for query, key, value, write in zip(*split.values()):
        scored, carried = used((query * np.abs(key).sum(1, keepdims=True)).T), used((value * np.abs(write).sum(1, keepdims=True)).T)
        if len(carried): yield dict(query=query[scored] / config.key_size ** .5, key=key[scored], value=value[carried], write=write[carried])


def arrays_of(model):
    "Name -> array of everything that the compiled model computes with"
    params, config = model.params, model.model_config
    arrays = {}
    for layer in range(config.num_layers):
        for head, weights in enumerate(heads_of(params, layer, config)):
            arrays |= {f"layer {layer} head {head} {name}": w for name, w in weights.items()}
        read, write = (np.asarray(params[f"transformer/layer_{layer}/mlp/linear_{i}"]["w"]) for i in (1, 2))
        assert not any(np.asarray(params[f"transformer/layer_{layer}/mlp/linear_{i}"]["b"]).any() for i in (1, 2))
        fire = used((np.abs(read).sum(0)[:, None] * write).T)
        if len(fire): arrays |= {f"layer {layer} mlp read": read.T[fire], f"layer {layer} mlp write": write[fire]}
    return arrays


def examples_of(model, program, tokens, output, length, most, seed=0, count=12):
    "Random inputs, and what the compiled model writes into the coordinates of its output; checked against the program"
    rng, ids, written = random.Random(seed), [], []
    for _ in range(count):
        text = rng.sample(tokens[1:] * most, length)
        found = model.apply([BOS, *text])
        expected = evaluate(program, text)
        for said, wanted in zip(found.decoded[1:], expected):
            assert wanted is None or said == wanted or abs(said - wanted) < 1e-5, (text, found.decoded, expected)
        ids.append([tokens.index(t) for t in (BOS, *text)])
        written.append(np.asarray(found.transformer_output)[0][:, output])
    return np.array(ids, dtype=np.int64), np.stack(written).astype(np.float32)


def compiled(name):
    "The content of a program's file"
    make, vocabulary, length, most = PROGRAMS[name]
    program = make()
    model = compiling.compile_rasp_to_model(program, vocab=set(vocabulary), max_seq_len=length, causal=True, compiler_bos=BOS,
                                            mlp_exactness=STEEP)
    tokens, labels = [BOS, *sorted(vocabulary)], model.residual_labels
    embedding = np.asarray(model.params["token_embed"]["embeddings"])
    output = [i for i, label in enumerate(labels) if label == program.label or label.startswith(f"{program.label}:")]
    says = [label.partition(":")[2] for label in (labels[i] for i in output)]
    inputs, outputs = examples_of(model, program, tokens, output, length, most)
    rows = [model.input_encoder.encoding_map[token] for token in tokens]
    arrays = dict(token=embedding[rows], position=np.asarray(model.params["pos_embed"]["embeddings"]), **arrays_of(model),
                  inputs=inputs, outputs=outputs)
    names = [re.sub(r"_\d+(?=[:_]|$)", "", label) for label in labels]  # without serial numbers
    about = dict(program=make.__doc__, labels=names, tokens=tokens, output=output, says=says)
    plain = {key: np.ascontiguousarray(a if a.dtype == np.int64 else a.astype(np.float32)) for key, a in arrays.items()}
    return save(plain, {"about": json.dumps(about)})


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        path = folder / f"{name}.safetensors"
        partial = path.with_suffix(".partial")
        partial.write_bytes(compiled(name))
        os.replace(partial, path)
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__": main()
