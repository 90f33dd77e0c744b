"""What every commit keeps true: notebooks clean and small, code documented, and every file in step with the others."""
import ast
import importlib.util
import io
import json
import re
import sys
import tokenize
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT / "mgprune").glob("*.py") if not p.name.startswith("_"))
MACHINE_PATH = re.compile(r"(?<![\w.~:/-])/(work|root|home|tmp|mnt|opt|Users|private|var/folders)/[\w.-]")
PROGRESS_BAR = re.compile(r"\d+/\d+ \[\d\d:\d\d")

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
modules = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def cells(path, kind=None):
    "The cells of a notebook, with their sources as one string"
    found = [dict(cell, source="".join(cell["source"])) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    return [cell for cell in found if kind in (None, cell["cell_type"])]


def directive(cell, name):
    "The arguments of a cell's `#| name` line; None where it has none"
    found = re.search(rf"(?m)^#\|\s*{name}(?![\w-]):?(.*)$", cell["source"])
    return found and found[1].strip()


def exported(path):
    return [cell for cell in cells(path, "code") if re.search(r"(?m)^#\|\s*exports?i?\b", cell["source"])]


def module_of(path):
    "The module a notebook exports to; None where it exports none"
    names = [directive(cell, "default_exp") for cell in cells(path, "code")]
    return next((name for name in names if name), None)


# --- the text of the notebooks

@notebooks
def test_opens_with_a_title_and_one_sentence(path):
    first = cells(path, "markdown")[0]["source"]
    assert re.match(r"# \S", first), "the first Markdown cell starts with a title"
    assert re.search(r"(?m)^> \S", first), "the first Markdown cell says in a blockquote what the page is about"


@notebooks
def test_exported_cells_are_short(path):
    for cell in exported(path):
        if re.search(r"\nclass (Circuit|Graph):", cell["source"]): continue  # whose methods lead to all that is done with them
        assert len(cell["source"].splitlines()) <= 40, f"cell {cell['id']} has over 40 lines"


@notebooks
def test_imports_have_cells_of_their_own(path):
    # nbdev runs every cell that imports when it builds the docs
    for cell in exported(path):
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(cell["source"]).body}
        assert kinds != {True, False}, f"cell {cell['id']} mixes imports with other code"


@notebooks
def test_file_name_is_the_module(path):
    name = module_of(path)
    if name: assert re.fullmatch(rf"\d\d_{name}", path.stem)
    else: assert not exported(path), "a notebook with exported cells names its module with `#| default_exp`"


@notebooks
def test_links_lead_to_notebooks(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)#:\s]+\.ipynb)", cell["source"]):
            assert (path.parent / target).is_file(), f"cell {cell['id']} links to {target}"


READ_FIRST = [ROOT / "nbs" / "index.ipynb", ROOT / "nbs" / "questions.ipynb",
              *(p for p in NOTEBOOKS if p.parent.name == "tutorials")]


def sentences(text):
    "The sentences of Markdown prose: a link is its words, code is one word, and blocks of code and lists of links are none"
    text = re.sub(r"(?ms)^```.*?^```$", "", text)
    blocks = re.split(r"\n\s*\n|\n(?=[ \t]*(?:[-*|#>]|\d+\.)[ \t]?)", text)
    for block in [cell for block in blocks for cell in (block.split("|") if block.lstrip().startswith("|") else [block])]:
        if re.fullmatch(r"\s*(\[[^\]]*\]\([^)]*\)[\s,]*)+", block): continue
        block = re.sub(r"`[^`]*`", "code", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", block))
        yield from re.split(r"(?<=[.!?])[*_)\"']*\s+", " ".join(block.split()))


def n_words(sentence): return len(re.findall(r"[^\W_][\w'’.,%-]*", sentence))


def test_a_sentence_is_counted_as_a_reader_does():
    text = "One two `three four`. *Five six!* [Seven eight](nine.ipynb)\n\n- ten: eleven\n- 12 %\n\n```sh\nno prose\n```\n| [a b](c), [d](e) | f g |"
    assert [n_words(s) for s in sentences(text) if n_words(s)] == [3, 2, 2, 2, 1, 2]


@pytest.mark.parametrize("path", READ_FIRST, ids=lambda p: p.stem)
def test_sentences_that_newcomers_read_are_short(path):
    found = [(cell["id"], s) for cell in cells(path, "markdown") for s in sentences(cell["source"]) if n_words(s) > 30]
    assert not found, "\n".join(f"cell {name}, {n_words(s)} words: {s}" for name, s in found)


# --- the saved outputs

@notebooks
def test_outputs_are_small_and_free_of_errors(path):
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", f"cell {cell['id']} failed"
            assert len(json.dumps(output)) < 120_000, f"cell {cell['id']} has an output over 120 kB"
            assert not PROGRESS_BAR.search(json.dumps(output)), f"cell {cell['id']} saved a progress bar: run .ci/execute.py"
    assert path.stat().st_size < 1_000_000


@notebooks
def test_figures_are_saved(path):
    for cell in cells(path, "code"):
        if directive(cell, "fig-cap") is not None:
            assert any("image/png" in output.get("data", {}) for output in cell["outputs"]), \
                f"cell {cell['id']} shows no figure: run .ci/execute.py {path.relative_to(ROOT)}"


@notebooks
def test_names_no_path_of_a_machine(path):
    # a picture is base64 text, in which any short path may turn up
    for cell in cells(path):
        for output in cell.get("outputs", []):
            output["data"] = {kind: data for kind, data in output.get("data", {}).items() if not kind.startswith("image/")}
        found = MACHINE_PATH.search(json.dumps(cell).replace("\\n", "\n"))
        assert not found, f"cell {cell['id']} names {found[0]}"


# --- the code of the library

def typed_modules():
    "The modules whose types are checked: the list in pyrefly.toml"
    patterns = tomllib.loads((ROOT / "pyrefly.toml").read_text(encoding="utf-8"))["project-includes"]
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern) if path in MODULES)


def test_types_of_every_module_are_checked():
    assert typed_modules() == MODULES


def test_modules_are_what_the_notebooks_export():
    assert {path.stem for path in MODULES} == set(filter(None, map(module_of, NOTEBOOKS)))


@modules
def test_imports_only_what_settings_require(path):
    allowed = {Requirement(text).name for text in settings()["requirements"].split()} | {"mgprune"} | sys.stdlib_module_names
    assert {name.split(".")[0] for name in imported(path)} <= allowed


@modules
def test_imports_only_modules_before_it(path):
    order = [module_of(p) for p in NOTEBOOKS if module_of(p)]
    # a circuit's methods lead to modules after it, which they import when they are called
    found = imported(path, anywhere=path.stem != "circuit")
    used = {name.split(".")[1] for name in found if name.startswith("mgprune.")} - {"__version__"}
    assert used <= set(order[: order.index(path.stem)])


def imported(path, anywhere=True):
    "Full names of the modules that the code at `path` imports, anywhere in it, or when it is imported itself"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "mgprune" if node.level else node.module
            parts = [node.module] if node.level and node.module else []
            name = ".".join([base, *parts])
            yield from (f"mgprune.{alias.name}" for alias in node.names) if name == "mgprune" else [name]


@modules
def test_public_names_are_documented(path):
    text = path.read_text(encoding="utf-8")
    comments = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT}
    problems = [f"line {line}: {problem}" for node in public(ast.parse(text)) for line, problem in undocumented(node, comments)]
    assert not problems, "\n".join([path.name, *problems])


def listed(module):
    "The names in a module's `__all__`"
    lists = [node.value for node in module.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    return ast.literal_eval(lists[0])


def public(module):
    "The functions and classes that a module lists in `__all__`, and their public methods"
    for node in module.body:
        if getattr(node, "name", None) in listed(module):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_"))


def undocumented(node, comments):
    "Where the function or class `node` lacks a docstring or the comment of a parameter; `comments` are line numbers"
    if not ast.get_docstring(node): yield node.lineno, f"{node.name} has no docstring"
    if isinstance(node, ast.ClassDef):
        named = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name in ("__init__", "__call__")]
        for method in named: yield from uncommented(parameters(method), f"{node.name}.{method.name}", comments)
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            yield from uncommented([(f.target.id, f.end_lineno) for f in node.body if isinstance(f, ast.AnnAssign)],
                                   node.name, comments)
    else: yield from uncommented(parameters(node), node.name, comments)


def parameters(function):
    "Name and last line of each parameter, without self and cls"
    a = function.args
    positional, defaults = a.posonlyargs + a.args, [None] * (len(a.posonlyargs + a.args) - len(a.defaults)) + a.defaults
    found = [*zip(positional, defaults), *zip(a.kwonlyargs, a.kw_defaults), (a.vararg, None), (a.kwarg, None)]
    return [(arg.arg, (default or arg).end_lineno) for arg, default in found if arg and arg.arg not in ("self", "cls")]


def uncommented(named_lines, owner, comments):
    lines = [line for _, line in named_lines]
    for name, line in named_lines:
        if line not in comments: yield line, f"{owner}: {name} has no comment"
        elif lines.count(line) > 1: yield line, f"{owner}: {name} shares its line, and so its comment"


@pytest.mark.parametrize("path", typed_modules(), ids=lambda p: p.stem)
def test_every_function_says_its_types(path):
    # the type checker takes a function that says nothing about itself as it comes; those within functions may say nothing
    module = ast.parse(path.read_text(encoding="utf-8"))
    scopes = [module, *(node for node in ast.walk(module) if isinstance(node, ast.ClassDef))]
    functions = [node for scope in scopes for node in scope.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    problems = [f"line {f.lineno}: {f.name}: {name}" for f in functions for name in unannotated(f)]
    assert not problems, "\n".join([path.name, *problems])


def unannotated(function):
    "The parameters that have no annotation, without self and cls; and `return`, if that has none"
    a = function.args
    given = [arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg and arg.arg not in ("self", "cls")]
    return [arg.arg for arg in given if not arg.annotation] + ["return"] * (function.returns is None)


@modules
def test_imports_only_what_it_uses(path):
    "A name that is imported as itself (`import x as x`) is handed on to the users of the module"
    nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    aliases = [alias for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    names = {(a.asname or a.name).split(".")[0] for a in aliases if a.asname != a.name}
    hints = [hint for node in nodes for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)) if hint]
    texts = [c.value for hint in hints for c in ast.walk(hint) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
    used = {node.id for node in nodes if isinstance(node, ast.Name)} | {*re.findall(r"\w+", " ".join(texts))}
    assert names <= used, f"{path.name} does not use {', '.join(sorted(names - used))}"


@modules
def test_lines_of_code_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()[1:]  # the first is the sentence that opens the notebook
    long = [number for number, line in enumerate(lines, 2) if len(line) > 130]
    assert not long, f"{path.name} has lines of over 130 characters: {long}"


def test_public_side_is_small():
    named = [node for path in MODULES for node in public(ast.parse(path.read_text(encoding="utf-8")))]
    functions = [node for node in named if isinstance(node, ast.FunctionDef)]
    lacking = [f.name for f in functions if not ast.get_docstring(f) or unannotated(f)]
    assert not lacking, f"without docstring or types: {', '.join(lacking)}"
    assert sum(len(listed(ast.parse(path.read_text(encoding="utf-8")))) for path in MODULES) < 182


@modules
def test_what_only_unix_has_is_imported_where_it_is_used(path):
    "So that the package can be imported on Windows"
    at_the_top = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in at_the_top if isinstance(node, ast.Import) for alias in node.names} | {getattr(node, "module", None) for node in at_the_top}
    assert not names & {"resource", "fcntl", "termios", "pwd", "grp", "pty", "syslog"}


# --- files that say the same thing

def test_version_agrees():
    text = (ROOT / "mgprune" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{settings()["version"]}"' in text


def test_citation_and_changelog_name_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == settings()["version"] and citation["repository-code"] == settings()["git_url"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    latest = re.search(r"(?m)^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert latest[1] == settings()["version"]


def test_constraints_meet_the_requirements():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "only plain name==version lines"
    pins = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    for key in (key for key in settings() if key.endswith("requirements")):
        for requirement in map(Requirement, settings()[key].split()):
            assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), f"{requirement} in settings.ini"


def test_readme_is_what_index_says():
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    index = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    text, figures = writer.readme(index, settings()["doc_host"] + settings()["doc_baseurl"])
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "run .ci/readme.py"
    for number, picture in enumerate(figures, 1):
        assert (ROOT / "index_files" / f"figure-{number}.png").read_bytes() == picture, "run .ci/readme.py"


def test_the_first_page_calls_tutorials_and_benchmarks_by_their_titles():
    # which the sidebar shows too
    lines = [line for cell in cells(ROOT / "nbs" / "index.ipynb", "markdown") for line in cell["source"].splitlines() if line.startswith("|")]
    named = re.findall(r"\[([^\]]+)\]\(((?:tutorials|benchmarks)/\w+\.ipynb)\)", "\n".join(lines))
    for name, page in named: assert cells(ROOT / "nbs" / page, "markdown")[0]["source"].splitlines()[0] == f"# {name}"
    there = {p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS if p.parent.name in ("tutorials", "benchmarks")}
    assert {page for _, page in named} == there


def test_sidebar_lists_every_notebook_once():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    listed = list(pages(config["website"]["sidebar"]["contents"]))
    assert sorted(listed) == [p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS]
    numbered = [page for page in listed if re.match(r"\d", page)]
    assert numbered == sorted(numbered), "the library is listed in the order of its modules"


def pages(contents):
    for entry in contents:
        if isinstance(entry, str): yield entry
        elif "section" in entry: yield from pages(entry["contents"])
        else: yield entry["href"]


def test_notebooks_share_the_one_quarto_config():
    assert (ROOT / "nbs" / "_quarto.yml").is_symlink()
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"
