"""Write README.md, and its figures into index_files/, from nbs/index.ipynb: python .ci/readme.py

`nbdev_readme` does this through Quarto, whose output changes with its version. This writes the same
text everywhere, so that CI can check that README.md and the notebook agree.
"""
import base64
import json
import re
import shutil

from nbdev.config import get_config

NOTEBOOK = re.compile(r"\]\(((?:[\w-]+/)*)(?:\d+[a-z]*_)?([\w-]+)\.ipynb(#[^)]*)?\)")  # 02_gates.ipynb is page gates.html


def joined(text):
    "A cell's source or output as one string: notebooks also store lists of lines"
    return "".join(text) if isinstance(text, list) else text


def directive(name, source):
    "The value of the Quarto or nbdev directive `name` in a cell; None where the cell has none"
    found = re.search(rf"(?m)^#\|\s*{name}\b:?[ ]*(.*)$", source)
    return found and found[1].strip().strip("\"'")


def shown_outputs(cell, figures):
    "Markdown of a code cell's outputs; each picture is kept in the list `figures`"
    caption = directive("fig-cap", joined(cell["source"])) or "Figure"
    for output in cell["outputs"]:
        data = output.get("data", {})
        text = joined(output.get("text") or data.get("text/plain", ""))
        if "image/png" in data:
            figures.append(base64.b64decode(data["image/png"]))
            yield f"![{caption}](index_files/figure-{len(figures)}.png)"
        elif text.strip(): yield f"```text\n{text.rstrip()}\n```"


def readme(notebook, site):
    "README.md's text and the pictures in it, for the cells of `notebook` and the docs' address `site`"
    parts, figures = ["<!-- Written from nbs/index.ipynb by .ci/readme.py: edit there. -->"], []
    for cell in notebook["cells"]:
        source = joined(cell["source"])
        if directive("hide", source) is not None or directive("include", source) == "false": continue
        if cell["cell_type"] == "markdown":
            parts.append(NOTEBOOK.sub(rf"]({site}/\1\2.html\3)", source))
        elif cell["cell_type"] == "code":
            code = re.sub(r"(?m)^#\|.*\n?", "", source).strip()
            if code and directive("echo", source) != "false": parts.append(f"```python\n{code}\n```")
            parts += shown_outputs(cell, figures)
    return "\n\n".join(parts) + "\n", figures


def main():
    cfg = get_config()
    notebook = json.loads((cfg.nbs_path / cfg.readme_nb).read_text(encoding="utf-8"))
    text, figures = readme(notebook, cfg.doc_host + cfg.doc_baseurl.rstrip("/"))
    (cfg.config_path / "README.md").write_text(text, encoding="utf-8")
    folder = cfg.config_path / "index_files"
    shutil.rmtree(folder, ignore_errors=True)
    for number, picture in enumerate(figures, 1):
        folder.mkdir(exist_ok=True)
        (folder / f"figure-{number}.png").write_bytes(picture)


if __name__ == "__main__": main()
