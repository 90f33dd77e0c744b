"""How a public name is shown on its page: nbdev asks `Shown` for the text of each, as `renderer` in settings.ini says.

What it says stands in the source once: types and comments of the parameters, the comment behind `->`, and a
docstring of a sentence, then `Raises ...`, `See also ...` and an example that a test runs.
"""
import ast
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


def comments_by_line(source):
    "Line number -> the comment on it"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ").rstrip() for token in tokens if token.type == tokenize.COMMENT}


def said_between(comments, first, last):
    "The comments from one line up to the line before another, as one text"
    return " ".join(comments[line] for line in range(first, last) if line in comments)


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
    ends = [arg.lineno for arg, _ in found[1:]] + [node.returns.lineno if node.returns else node.body[0].lineno]
    stars = {id(a.vararg): "*", id(a.kwarg): "**"}
    rows = [(stars.get(id(arg), "") + arg.arg, default_of(default), said_between(comments, arg.lineno, max(end, arg.lineno + 1)))
            for (arg, default), end in zip(found, ends) if arg.arg not in ("self", "cls")]
    return rows, said_between(comments, node.returns.lineno, node.body[0].lineno) if node.returns else ""


def of_dataclass(node, comments):
    "(name, default, comment) of each field that a call may give"
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")]
    fields = [n for n in fields if not (n.value and "init=False" in ast.unparse(n.value))]
    follows = {id(n): after.lineno for n, after in zip(node.body, node.body[1:])}
    return [(n.target.id, default_of(n.value), said_between(comments, n.lineno, min(follows.get(id(n), n.end_lineno + 1), n.end_lineno + 3))) for n in fields]


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


def of_the_package(sym):
    "The object of the package that a notebook's cell defines again"
    path = NbdevLookup()[sym.__qualname__][1]
    found = importlib.import_module(".".join(Path(path).with_suffix("").parts))
    for name in sym.__qualname__.split("."): found = getattr(found, name)
    return found


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
        comments = comments_by_line(self.source)
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
        comments = comments_by_line(self.source)
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
        link = NbdevLookup().code(self.sym.__qualname__)
        source = f'[source]({link}){{target="_blank" style="float:right; font-size:smaller"}}\n\n' if link else ""
        title = f"{'#' * self.title_level} {self.name}"
        call = self.name if rows or not is_class else None  # a class that is never called, such as an error
        text = [f"---\n\n{source}{title}", first.rstrip(".") + ".", more, f"```python\n{signature(call, rows)}\n```" if call else ""]
        if rows:
            known = {n: in_words(hints[n.lstrip("*")]) for n, _, _ in rows if n.lstrip("*") in hints}
            kinds = {n: f" ({known[n]})" if n in known else "" for n, _, _ in rows}
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
