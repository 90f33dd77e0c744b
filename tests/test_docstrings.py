"""The examples in docstrings run, each public name says what to read beside it, and its page says what its source does."""
import ast
import doctest
import functools
import importlib
import importlib.util
import inspect
import io
import random
import re
import textwrap
import tokenize
from collections import Counter
from pathlib import Path
from typing import Any

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


# --- the reference on the pages

@functools.cache
def shown():
    "What writes the reference of a page"
    pytest.importorskip("nbdev")
    spec = importlib.util.spec_from_file_location("shown", ROOT / ".ci" / "shown.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public_names():
    "Every public function and class, by module and name"
    for m in MODULES: yield from ((m, name, found) for name, found in documented(importlib.import_module(f"mgprune.{m}")).items())


def said_in(source):
    "Name -> comment of each parameter, and what is returned"
    rows, returned = shown().of_function(ast.parse(source).body[0], shown().comments_of(source))
    return {name: said for name, _, said in rows}, returned


LAYOUTS = {
    "behind": ("def f(\n    a: int,  # first\n    b: int = 2,  # second\n) -> int:  # third\n    return a", dict(a="first", b="second"), "third"),
    "above": ("def f(\n    # first\n    a: int,\n    # second\n    b: int = 2,\n) -> int:\n    return a", dict(a="first", b="second"), ""),
    "above and behind": ("def f(\n    # one of two\n    a: int,  # first\n    b: int,  # second\n    # more\n    c: int,  # third\n):\n    pass",
                         dict(a="one of two first", b="second", c="more third"), ""),
    "going on below": ("def f(\n    a: int,      # first\n                 # of all\n    b: int,      # second\n                 # and last\n) -> int:\n    return a",
                       dict(a="first of all", b="second and last"), ""),
    "several on a line": ("def f(\n    a: int, b: int,  # both\n    c: int,  # third\n) -> None:\n    pass", dict(a="both", b="both", c="third"), ""),
    "a default of several lines": ("def f(\n    a: tuple = (1,  # first\n        2),  # of all\n    *more: int,  # others\n    **named: int,  # by name\n):\n    pass",
                                   {"a": "first of all", "*more": "others", "**named": "by name"}, ""),
    "none but self": ("def f(self) -> int:  # the number\n    return 1", {}, "the number"),
    "in the body": ("def f(\n    a: int,  # first\n) -> int:  # the same\n    # why\n    return a  # so", dict(a="first"), "the same"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_comments_stand_where_they_belong(layout):
    source, wanted, returned = LAYOUTS[layout]
    assert said_in(source) == (wanted, returned)


def test_fields_of_a_dataclass_have_their_comments():
    source = "class A:\n    # above\n    a: int = 0  # first\n    b: int = 0  # second\n                # of two\n    def f(self): pass  # none"
    assert shown().of_dataclass(ast.parse(source).body[0], shown().comments_of(source)) == [("a", "0", "above first"), ("b", "0", "second of two")]


def signatures():
    "Every public function, and every method of a public class: where, and its syntax with its comments"
    for module, name, found in public_names():
        node = ast.parse(source := textwrap.dedent(inspect.getsource(inspect.unwrap(found)))).body[0]
        for f in [node] if isinstance(node, ast.FunctionDef) else [n for n in node.body if isinstance(n, ast.FunctionDef)]:
            yield f"{module}.{name}" + (f".{f.name}" if f is not node else ""), f, source


def test_no_comment_of_a_public_signature_is_lost_or_said_twice():
    for where, f, source in signatures():
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline)
                  if t.type == tokenize.COMMENT and f.lineno <= t.start[0] < f.body[0].lineno]
        rows, returned = shown().of_function(f, shown().comments_of(source))
        words = Counter(" ".join(t.string.lstrip("# ").rstrip() for t in tokens).split())
        assert Counter(" ".join([*(said for *_, said in rows), returned]).split()) == words, where
        assert not (where.count(".") == 1 and any(not said for *_, said in rows)), where
        lines = source.splitlines()
        for arg in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]:  # the comment on a parameter's own line is its own
            _, mark, own = lines[arg.lineno - 1].partition("  # ")
            said = {name: text for name, _, text in rows}.get(arg.arg)
            if mark and said is not None: assert own.strip() in said, f"{where}: {arg.arg}"


def test_a_name_is_that_of_its_own_page():
    # of names that several modules have, and of methods that are called like a function elsewhere
    of_the_package, public = shown().of_the_package, [*public_names()]
    everywhere = Counter(name for m in MODULES for name in vars(importlib.import_module(f"mgprune.{m}")))
    assert {"report", "load"} <= {name for _, name, _ in public if everywhere[name] > 1}
    for module, name, found in public:
        assert of_the_package(found) is found
        again = type("Again", (), {})()  # as a notebook's cell defines it
        again.__module__, again.__qualname__, again.__doc__, again.__wrapped__ = "__main__", name, found.__doc__, inspect.unwrap(found)
        assert of_the_package(again) is found, (module, name)


def test_a_name_of_no_page_is_refused():
    def nowhere(): pass
    nowhere.__module__ = "__main__"
    with pytest.raises(LookupError, match="run nbdev_export"): shown().of_the_package(nowhere)


def test_no_page_says_that_anything_will_do():
    for module, name, found in public_names(): assert "anything)" not in shown().Shown(found)._repr_markdown_(), (module, name)
    kinds = {Any: "", dict[str, Any]: "a dictionary", tuple[Any, ...]: "a tuple", int | None: "a whole number or None"}
    for hint, words in kinds.items(): assert shown().kind_of(hint) == words
