"""Build the documentation site into _docs/: python .ci/docs.py [--plain]

nbdev processes the notebooks into _proc/ (it runs the exported cells and adds the text on each public name,
which shown.py writes), next to a copy of _quarto.yml. A module's page begins with these texts; the code follows
in the order of the notebook, folded. A figure gets its caption as alternative text. Where Quarto is installed it
renders that folder. Elsewhere, or with --plain, smalldocs does, which needs no other program and fails on a
broken link: cross-references become words, widgets their text, and pages get here the names that nbdev tells
Quarto.
"""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from finish import NUMBERED, finish
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

CAPTION = re.compile(r"(?m)^#\|\s*fig-cap:(.*\n?)")
CROSS_REFERENCES = [
    (re.compile(r"\s*\{#(eq|fig|tbl|sec)-[\w-]+\}"), ""),
    (re.compile(r"@fig-[\w-]+"), "the figure below"),
    (re.compile(r"@(eq|tbl|sec)-[\w-]+"), "above"),
]

LISTED = re.compile(r"(?s)__all__ = (\[.*?\])")
EXPORTED = re.compile(r"(?m)^#\|\s*exports?i?\b")
HIDDEN = re.compile(r"(?m)^#\|\s*(hide|default_exp)\b")
SHOWN = re.compile(r"(?m)^show_doc\(")
REFERENCE = """## Reference

The examples begin with

```python
from mgprune import *
model = load_model(); task = tasks.ioi(model)
```

and `circuit` is what `discover(model, task, kl=.1)` finds."""
NOTEBOOK = """---

*From here on the page is the notebook that the module is made from: reasons, checks, and the code itself, internal helpers included.*"""


def joined(text):
    "A cell's source or output as one string: notebooks also store lists of lines"
    return "".join(text) if isinstance(text, list) else text


def relinked(text, site):
    "`text` with page names free of numbers, and with links to the published site relative to its root"
    return NUMBERED.sub(r"\1\2", text.replace(site + "/", "/"))


def public_links(processed, modules, site):
    "Leave the links that nbdev made to public names; a name that is internal where they lead is linked where it is public, or not at all"
    listed = {path.stem: set(ast.literal_eval(LISTED.search(path.read_text(encoding="utf-8"))[1])) for path in modules}
    where = {name: module for module, names in listed.items() for name in names}
    def link(found):
        name, module, place = found.groups()
        if place.split(".")[0] in {public.lower() for public in listed.get(module, ())}: return found[0]
        return f"[`{name}`]({site}/{where[name]}.html#{name.lower()})" if name in where else f"`{name}`"
    made = re.compile(rf"\[`([^`\]]+)`\]\({re.escape(site)}/(\w+)\.html#([\w.]+)\)")
    for path in processed.rglob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown": cell["source"] = made.sub(link, joined(cell["source"]))
            for data in (output.get("data", {}) for output in cell.get("outputs", [])):
                if "text/markdown" in data: data["text/markdown"] = made.sub(link, joined(data["text/markdown"]))
        path.write_text(json.dumps(notebook), encoding="utf-8")


def alternative_texts(processed):
    "Give each figure in the `processed` folder its caption as alternative text, where it has none of its own"
    for path in processed.rglob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in (c for c in notebook["cells"] if c["cell_type"] == "code"):
            source = joined(cell["source"])
            if "fig-alt" in source: continue
            cell["source"] = CAPTION.sub(lambda found: f"{found[0].rstrip()}\n#| fig-alt:{found[1]}", source)
        path.write_text(json.dumps(notebook), encoding="utf-8")


def public_first(processed, notebooks):
    "Put what a module's page says of public names at its top in the `processed` folder, and fold the module's code"
    for path in processed.rglob("*.ipynb"):
        notebook, written = (json.loads(p.read_text(encoding="utf-8")) for p in (path, notebooks / path.relative_to(processed)))
        marked = {plain_source(cell): joined(cell["source"]) for cell in written["cells"] if cell["cell_type"] == "code"}
        rest, shown = [], []
        for cell in notebook["cells"]:
            source = marked.get(plain_source(cell), "") if cell["cell_type"] == "code" else ""
            if HIDDEN.search(source): continue
            if EXPORTED.search(source): rest.append(folded(plain_source(cell)))
            else: (shown if cell["cell_type"] == "code" and SHOWN.search(joined(cell["source"])) else rest).append(cell)
        if shown:
            at = next((n for n, cell in enumerate(rest) if plain_source(cell).startswith(("## ", "<details"))), 2)
            rest[at:at] = [markdown(REFERENCE), *shown, markdown(NOTEBOOK)]
        notebook["cells"] = rest
        path.write_text(json.dumps(notebook), encoding="utf-8")


def plain_source(cell):
    "A cell's source without directives, which nbdev leaves out"
    return re.sub(r"(?m)^#\|.*\n?", "", joined(cell["source"])).strip()


def markdown(source):
    return dict(cell_type="markdown", metadata={}, source=source)


def folded(code):
    "Code of the module as text that opens on a click"
    names = [node.name for node in ast.parse(code).body if hasattr(node, "name")]
    title = "Code of " + ", ".join(f"<code>{name}</code>" for name in names) if names else "Code"
    return markdown(f"<details class=\"code-of\"><summary>{title}</summary>\n\n````python\n{code}\n````\n\n</details>")


def plain_signature(markdown, site):
    "The text of nbdev's `show_doc`, whose code blocks cannot hold links"
    parts = re.split(r"(?ms)(^```.*?^```)", markdown)
    return "".join(re.sub(r"\[(`[^`\]]+`)\]\([^)]*\)", r"\1", part) if part.startswith("```") else relinked(part, site)
                   for part in parts)


def plain_cell(cell, site):
    "Rewrite one processed cell for smalldocs, in place"
    source = joined(cell["source"])
    if cell["cell_type"] == "markdown":
        for pattern, words in CROSS_REFERENCES: source = pattern.sub(words, source)
        source = relinked(source, site)
    elif cell["cell_type"] == "raw": source = re.sub(r"(?m)^output-file: .*\n", "", source)
    cell["source"] = source
    for data in (output.get("data", {}) for output in cell.get("outputs", [])):
        if "text/markdown" in data: data["text/markdown"] = plain_signature(joined(data["text/markdown"]), site)


def plain_project(processed, site):
    "A copy of the `processed` folder that smalldocs can read"
    copy = processed / ".plain"
    shutil.rmtree(copy, ignore_errors=True)
    for path in [p for p in processed.rglob("*") if p.is_file() and copy not in p.parents]:
        target = copy / relinked(path.relative_to(processed).as_posix(), site)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ipynb":
            notebook = json.loads(path.read_text(encoding="utf-8"))
            for cell in notebook["cells"]: plain_cell(cell, site)
            target.write_text(json.dumps(notebook), encoding="utf-8")
        elif path.name == "_quarto.yml": target.write_text(relinked(path.read_text(encoding="utf-8"), site), encoding="utf-8")
        else: shutil.copy(path, target)
    return copy


def main():
    cfg = get_config()
    # the exported cells import this checkout, whether or not it is installed: nbdev's workers start with this path
    sys.path[:0] = [str(cfg.config_path), str(cfg.config_path / ".ci")]
    refresh_quarto_yml()
    project = Path(proc_nbs(force=True))
    site = cfg.doc_host + cfg.doc_baseurl.rstrip("/")
    public_links(project, sorted(cfg.lib_path.glob("[a-z]*.py")), site)
    public_first(project, cfg.nbs_path)
    alternative_texts(project)
    if shutil.which("quarto") and "--plain" not in sys.argv:
        command = ["quarto", "render", str(project), "--no-cache"]
    else:
        project = plain_project(project, site)
        command = [sys.executable, "-m", "smalldocs.cli", "render", "--strict", str(project)]
    if subprocess.run(command).returncode: sys.exit("docs: the problems are listed above")
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(project / cfg.doc_path.name, cfg.doc_path)
    finish(cfg.doc_path, cfg.nbs_path)
    print(f"wrote {cfg.doc_path}")


if __name__ == "__main__": main()
