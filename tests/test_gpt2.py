"""The page on GPT-2 small: its code, slow cells too, on a model of as many layers and heads with random weights."""
import json
import re
from pathlib import Path

import mgprune
import pytest
import torch
from mgprune.models import load_model
from transformers import GPT2Config, GPT2LMHeadModel

PAGE = Path(__file__).parent.parent / "nbs/benchmarks/gpt2.ipynb"
CELLS = ["".join(cell["source"]) for cell in json.loads(PAGE.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def random_model(name):
    "In place of GPT-2 small: 12 layers of 12 heads, narrow, for the words of the embedded model"
    assert name == "gpt2"
    torch.manual_seed(0)
    tokenizer = load_model().tokenizer
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=48, n_inner=48, n_positions=64, initializer_range=.2)
    return load_model(GPT2LMHeadModel(config).eval(), tokenizer)


@pytest.mark.filterwarnings("ignore")  # it can do none of the tasks, which a search says
def test_its_code_runs(monkeypatch, capsys):
    monkeypatch.setattr(mgprune, "load_model", random_model)
    names = {}
    for code in CELLS:
        if re.search(r"(?m)^PAIRS, RECIPE = ", code): code = "PAIRS, RECIPE = (16, 64, 8), Recipe(steps=6, batch_size=4, trim=False)"
        exec(compile(code, PAGE.name, "exec"), names)
    beside, classes, three = names["beside"], names["by_class"], names["three"]
    assert [*beside.loc["Edge Pruning"]["edges"]] == [1246, 1040, 848, 614, 481] and len(beside.loc["mgprune"]) == 5
    assert (beside.loc["mgprune"]["edges"] <= 32_491).all() and (beside.loc["mgprune"]["kl"] >= 0).all()
    assert classes["heads"].sum() == 144 and classes.loc["name mover", "heads"] == 3 and (classes["kept"] <= classes["heads"]).all()
    assert [*three.index] == ["ioi", "greater_than", "gendered_pronoun"] and "published" in capsys.readouterr().out
