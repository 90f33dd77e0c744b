"""Build the documentation site into _docs/: python .ci/docs.py [--plain]

nbdev processes the notebooks into _proc/ (it runs the exported cells and adds each function's signature),
next to a copy of _quarto.yml; a figure gets its caption as alternative text. Where Quarto is installed it
renders that folder. Elsewhere, or with --plain, smalldocs does, which needs no other program and fails on a
broken link: cross-references become words, widgets their text, and pages get here the names that nbdev tells
Quarto.
"""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

CAPTION = re.compile(r"(?m)^#\|\s*fig-cap:(.*\n?)")
NUMBERED = re.compile(r"\b\d+[a-zA-Z0-9]*_([\w-]+\.)(ipynb|html)\b")  # nbdev's rule: 02_gates.ipynb is page gates.html
CROSS_REFERENCES = [
    (re.compile(r"\s*\{#(eq|fig|tbl|sec)-[\w-]+\}"), ""),
    (re.compile(r"@fig-[\w-]+"), "the figure below"),
    (re.compile(r"@(eq|tbl|sec)-[\w-]+"), "above"),
]


def joined(text):
    "A cell's source or output as one string: notebooks also store lists of lines"
    return "".join(text) if isinstance(text, list) else text


def relinked(text, site):
    "`text` with page names free of numbers, and with links to the published site relative to its root"
    return NUMBERED.sub(r"\1\2", text.replace(site + "/", "/"))


def alternative_texts(processed):
    "Give each figure in the `processed` folder its caption as alternative text, where it has none of its own"
    for path in processed.rglob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in (c for c in notebook["cells"] if c["cell_type"] == "code"):
            source = joined(cell["source"])
            if "fig-alt" in source: continue
            cell["source"] = CAPTION.sub(lambda found: f"{found[0].rstrip()}\n#| fig-alt:{found[1]}", source)
        path.write_text(json.dumps(notebook), encoding="utf-8")


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
    sys.path.insert(0, str(cfg.config_path))
    refresh_quarto_yml()
    project = Path(proc_nbs(force=True))
    alternative_texts(project)
    if shutil.which("quarto") and "--plain" not in sys.argv:
        command = ["quarto", "render", str(project), "--no-cache"]
    else:
        project = plain_project(project, cfg.doc_host + cfg.doc_baseurl.rstrip("/"))
        command = [sys.executable, "-m", "smalldocs.cli", "render", "--strict", str(project)]
    if subprocess.run(command).returncode: sys.exit("docs: the problems are listed above")
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(project / cfg.doc_path.name, cfg.doc_path)
    print(f"wrote {cfg.doc_path}")


if __name__ == "__main__": main()
