"""How a public name is shown on its page: nbdev asks `Shown` for the text of each, as `renderer` in settings.ini says.

What it says stands in the source once: types and comments of the parameters, the comment behind `->`, and a
docstring of a sentence, then `Raises ...`, `See also ...` and an example that a test runs.
"""
import ast
import functools
import importlib
import inspect
import io
import re
import textwrap
import tokenize
import typing
from dataclasses import is_dataclass
from functools import cached_property
from pathlib import Path

from nbdev.doclinks import NbdevLookup

import mgprune
from mgprune.arguments import in_words

WIDTH = 88  # of a signature that stands on one line


def comments_of(source):
    "Line number -> column, whether it is alone there, and text of the comment on it"
    tokens, lines = tokenize.generate_tokens(io.StringIO(source).readline), source.splitlines()
    found = [(*token.start, token.string) for token in tokens if token.type == tokenize.COMMENT]
    return {row: (column, not lines[row - 1][:column].strip(), text.lstrip("# ").rstrip()) for row, column, text in found}


def said_of(comments, places):
    """For each (line, column) where something begins, the comments on it: those behind it, those alone that go
    on below them further to the right, and those alone above it that begin where it does"""
    said = [[] for _ in places]
    for line, (column, alone, text) in sorted(comments.items()):
        before, after = [i for i, (start, _) in enumerate(places) if start <= line], [i for i, (start, _) in enumerate(places) if start > line]
        shared = [i for i in before if places[i][0] == line] or before[-1:]
        if alone and after and column <= places[after[0]][1]: shared = [i for i in after if places[i][0] == places[after[0]][0]]
        for i in shared: said[i].append(text)
    return [" ".join(texts) for texts in said]


def default_of(node):
    "The text of a default value; that of a dataclass's field without the field"
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "field":
        given = {k.arg: k.value for k in node.keywords}
        if "default" in given: return ast.unparse(given["default"])
        made = ast.unparse(given["default_factory"]) if "default_factory" in given else None
        return made and {"dict": "{}", "list": "[]"}.get(made, f"{made}()")
    return node and ast.unparse(node)


def of_function(node, comments):
    "(name, default, comment) of each parameter, and the comment behind `->`"
    a = node.args
    plain = a.posonlyargs + a.args
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    found = [*zip(plain, defaults), *([(a.vararg, None)] if a.vararg else []), *zip(a.kwonlyargs, a.kw_defaults), *([(a.kwarg, None)] if a.kwarg else [])]
    places = [(arg.lineno, arg.col_offset) for arg, _ in found]
    last = max([n.end_lineno for pair in found for n in pair if n and getattr(n, "arg", "") not in ("self", "cls")], default=0)
    behind = node.returns.lineno if node.returns else node.body[0].lineno
    inside = {line: c for line, c in comments.items() if node.lineno <= line < max(behind, last + 1) and (line <= last or c[1])}
    stars = {id(a.vararg): "*", id(a.kwarg): "**"}
    rows = [(stars.get(id(arg), "") + arg.arg, default_of(default), said) for (arg, default), said
            in zip(found, said_of(inside, places)) if arg.arg not in ("self", "cls")]
    below = node.body[0]  # whose own comments are further to the left than those that go on
    returned = [text for line, (column, alone, text) in sorted(comments.items())
                if behind <= line < below.lineno and line not in inside and not (alone and column <= below.col_offset)]
    return rows, " ".join(returned) if node.returns else ""


def of_dataclass(node, comments):
    "(name, default, comment) of each field that a call may give"
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    if not fields: return []
    end = min([n.lineno for n in node.body if n.lineno > fields[-1].end_lineno], default=fields[-1].end_lineno + 3)
    inside = {line: c for line, c in comments.items() if node.lineno < line < end}
    said = said_of(inside, [(n.lineno, n.col_offset) for n in fields])
    return [(n.target.id, default_of(n.value), text) for n, text in zip(fields, said)
            if not n.target.id.startswith("_") and not (n.value and "init=False" in ast.unparse(n.value))]


def parts_of(doc):
    "The sentence, the lines that say more by their first words, and the example of a docstring"
    text, *example = re.split(r"(?m)^(?=>>> )", doc, maxsplit=1)
    first, _, rest = text.strip().partition("\n")
    raises = re.findall(r"(?ms)^Raises (.*?)(?=^See also |\Z)", rest)
    also = re.findall(r"(?ms)^See also (.*)\Z", rest)
    more = re.sub(r"(?ms)^(Raises |See also ).*", "", rest).strip()
    return first, more, *(" ".join(found[0].split()) if found else "" for found in (raises, also)), example[0].rstrip() if example else ""


def signature(name, rows, width=WIDTH):
    "The call on one line, or on several of at most so many characters"
    shown = [n if default is None else f"{n}={default}" for n, default, _ in rows]
    line = f"{name}({', '.join(shown)})"
    if len(line) <= width: return line
    filled, now = [], "    "
    for part in shown:
        if len(now) > 4 and len(now) + len(part) > width: filled, now = [*filled, now.rstrip()], "    "
        now += part + ", "
    return "\n".join([f"{name}(", *filled, now.rstrip(), ")"])


def looks(found):
    "What tells a function or class from another of its name: its sentence, and its parameters"
    plain = inspect.unwrap(found)
    code = getattr(plain, "__code__", None)
    return inspect.getdoc(plain), code and code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]


def of_the_package(sym):
    "The object of the package that a notebook's cell defines again; of several of that name the one that looks like it"
    module = getattr(sym, "__module__", "")
    if module.startswith("mgprune."): return sym
    found = []
    for path in sorted(Path(mgprune.__file__).parent.glob("[a-z]*.py")):
        there = importlib.import_module(f"mgprune.{path.stem}")
        try: there = functools.reduce(getattr, sym.__qualname__.split("."), there)
        except AttributeError: continue
        if there.__module__ == f"mgprune.{path.stem}": found.append(there)
    same = [there for there in found if looks(there) == looks(sym)]
    if len(same) != 1: raise LookupError(f"{sym.__qualname__} is {len(same)} times in the package: run nbdev_export")
    return same[0]


def source_of(sym):
    "Where its source is on the web"
    found = NbdevLookup()[f"{sym.__module__}.{sym.__qualname__}"]
    return f"{found[2]}#L{inspect.getsourcelines(inspect.unwrap(sym))[1]}" if isinstance(found, tuple) else None


def kind_of(hint):
    "What an annotation asks for, in words; nothing where only the comment says it"
    words = re.sub(r" of anything( by a text)?", "", in_words(hint))
    return "" if "anything" in words else words


def imports_of(example):
    "The lines that import what an example uses, beside what `from mgprune import *` does"
    used = {node.id for node in ast.walk(ast.parse("\n".join(line[4:] for line in example.splitlines() if line.startswith((">>>", "..."))))) if isinstance(node, ast.Name)}
    lines = [f">>> import {name}" for name in ("random", "torch") if name in used]
    for path in sorted(Path(mgprune.__file__).parent.glob("[a-z]*.py")):
        names = sorted(used & {*importlib.import_module(f"mgprune.{path.stem}").__all__} - {*mgprune.__all__}) if path.stem != "tasks" else ()
        if names: lines.append(f">>> from mgprune.{path.stem} import {', '.join(names)}")
    return lines


class Shown:
    "The page's text on one function, class or method"

    def __init__(self, sym, name=None, title_level=3):
        self.sym, self.name, self.title_level = of_the_package(sym), name or sym.__qualname__, title_level

    @cached_property
    def node(self):
        return ast.parse(self.source).body[0]

    @cached_property
    def source(self):
        return textwrap.dedent(inspect.getsource(inspect.unwrap(self.sym)))

    def parameters(self):
        comments = comments_of(self.source)
        if not inspect.isclass(self.sym): return of_function(self.node, comments)
        if is_dataclass(self.sym): return of_dataclass(self.node, comments), ""
        made = next((n for n in self.node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        return of_function(made, comments) if made else ([], "")

    def hints(self):
        asked = self.sym.__init__ if inspect.isclass(self.sym) and not is_dataclass(self.sym) else inspect.unwrap(self.sym)
        try: return typing.get_type_hints(asked, include_extras=True)
        except Exception: return {}  # what is imported for the type checker alone

    def members(self):
        "A line for each public method and property of a class, and one for each parameter"
        comments = comments_of(self.source)
        for n in self.node.body:
            if not isinstance(n, ast.FunctionDef) or n.name.startswith("_") or not ast.get_docstring(n): continue
            rows, _ = of_function(n, comments)
            call = f".{n.name}" if any("property" in ast.unparse(d) for d in n.decorator_list) else signature(f".{n.name}", rows, 999)
            yield f'- <a id="{self.name.lower()}.{n.name}"></a>`{call}`: ' + f"{ast.get_docstring(n).splitlines()[0]}"
            yield from (f"    - **{name}**: {said}" for name, _, said in rows)

    def _repr_markdown_(self):
        rows, returned = self.parameters()
        first, more, raises, also, example = parts_of(inspect.getdoc(self.sym) or "")
        hints, is_class = self.hints(), inspect.isclass(self.sym)
        link = source_of(self.sym)
        source = f'[source]({link}){{target="_blank" style="float:right; font-size:smaller"}}\n\n' if link else ""
        title = f"{'#' * self.title_level} {self.name}"
        call = self.name if rows or not is_class else None  # a class that is never called, such as an error
        text = [f"---\n\n{source}{title}", first.rstrip(".") + ".", more, f"```python\n{signature(call, rows)}\n```" if call else ""]
        if rows:
            known = {n: kind_of(hints[n.lstrip("*")]) for n, _, _ in rows if n.lstrip("*") in hints}
            kinds = {n: f" ({known[n]})" if known.get(n) else "" for n, _, _ in rows}
            text.append(f"**{'Fields' if is_dataclass(self.sym) else 'Arguments'}**\n\n" + "\n".join(f"- **{n}**{kinds[n]}: {said}" for n, _, said in rows))
        if not is_class and self.node.returns is not None and ast.unparse(self.node.returns) != "None":
            text.append(f"**Returns** `{ast.unparse(self.node.returns).strip(chr(39))}`" + (f": {returned}" if returned else ""))
        checks = hasattr(self.sym, "checks_arguments") or is_dataclass(self.sym) and "check_fields" in self.source
        usual = "`InputError` if an argument is not what is said above" if checks else ""
        if raises or usual: text.append("**Raises** " + "; ".join(filter(None, [usual, raises.rstrip(".")])) + ".")
        if is_class and (members := [*self.members()]): text.append("**What it offers**\n\n" + "\n".join(members))
        if example:
            lines = [*imports_of(example), *(re.sub(r"  # doctest:.*", "", line) for line in example.splitlines())]
            text.append("**Example**\n\n```python\n" + "\n".join(lines) + "\n```")
        if also: text.append(f"**See also** {also.rstrip('.')}.")
        return "\n\n".join(part for part in text if part)
