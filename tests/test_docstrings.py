"""The examples in docstrings run, and each public name says what it is, what it gives and what to read beside it."""
import doctest
import importlib
import inspect
import random
import re
from pathlib import Path

import pytest
import torch

from mgprune import discover, load_model, tasks
from mgprune.recipe import Recipe

ROOT = Path(__file__).parents[1]
MODULES = [p.stem for p in sorted((ROOT / "mgprune").glob("[a-z]*.py"))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def documented(module):
    "The public functions and classes of a module, by name"
    return {name: found for name in module.__all__ if inspect.isfunction(found := getattr(module, name)) or inspect.isclass(found)}


@pytest.fixture(scope="module")
def given():
    "What the examples on every page begin with, smaller; public names are imported where they are used"
    model = load_model()
    task = tasks.ioi(model, n=(96, 64, 48))
    circuit = discover(model, task, kl=.5, recipe=Recipe(steps=20), progress=False)
    public = [importlib.import_module(f"mgprune.{m}") for m in MODULES]
    names = {name: getattr(module, name) for module in public for name in getattr(module, "__all__", ())}
    return names | dict(tasks=tasks, model=model, task=task, circuit=circuit, torch=torch, random=random)


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, failed = importlib.import_module(f"mgprune.{module}"), []
    for name, found in documented(module).items():
        test = doctest.DocTestParser().get_doctest(found.__doc__, {**given, name: found}, name, None, None)
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=failed.append)
    assert not failed, "".join(failed)


@pytest.mark.parametrize("module", MODULES)
def test_what_is_said_to_be_seen_also_is_there(module):
    module = importlib.import_module(f"mgprune.{module}")
    everywhere = {name for m in MODULES for name in getattr(importlib.import_module(f"mgprune.{m}"), "__all__", ())} | {"tasks"}
    for name, found in documented(module).items():
        also = re.search(r"(?ms)^ *See also (.*?)\.$", found.__doc__)
        named = [n for n in re.findall(r"`([\w.]+)[^`]*`", also[1])] if also else []
        for n in named: assert n.split(".")[0] in everywhere, f"{name}: see also {n}"
