"""Run notebooks and save their outputs: python .ci/execute.py [--fast] [--check] [nbs/30_plots.ipynb ...]

Outputs are committed, so that GitHub and the docs show the figures. Running a notebook twice writes the
same file: progress bars stay silent, streams are joined, and widget ids, which Jupyter draws at random,
are renamed by order of appearance. A notebook that fails is left as it was.

--fast   cells marked `#| slow` do not run and keep the outputs they have
--check  write nothing, and fail where the text outputs differ from the saved ones
"""
import argparse
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from execnb.nbio import dict2nb, nb2str
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev.clean import clean_nb
from nbdev.config import get_config

SLOW = re.compile(r"(?m)^#\|\s*slow\s*$")
NOT_RUN = re.compile(r"(?m)^#\|\s*eval:\s*false\s*$")
WIDGET_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
STATE, VIEW = "application/vnd.jupyter.widget-state+json", "application/vnd.jupyter.widget-view+json"
# tqdm's own Jupyter bar ignores TQDM_DISABLE: the kernel starts with the plain bar in its place
PLAIN_BARS = '__import__("tqdm.auto").auto.tqdm = __import__("tqdm.std").std.tqdm'
KERNEL = ["--log-level=ERROR", f"--IPKernelApp.exec_lines={PLAIN_BARS}"]
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Client(NotebookClient):
    "Runs a notebook's cells, except those whose source matches `keep`, which keep their outputs"

    def __init__(self, notebook, keep, **settings):
        self.keep = keep
        super().__init__(notebook, **settings)

    async def async_execute_cell(self, cell, cell_index, **settings):
        if any(pattern.search(cell.source) for pattern in self.keep): return cell
        return await super().async_execute_cell(cell, cell_index, **settings)


def stable(part, names, prefix):
    "The notebook's `part` with each widget id renamed; `names` collects the new ids"
    def rename(found):
        return names.setdefault(found[0], hashlib.md5(f"{prefix}-{len(names)}".encode()).hexdigest())
    return json.loads(WIDGET_ID.sub(rename, json.dumps(part)))


def with_kept_widgets(metadata, saved, cells):
    "The new `metadata`, with the saved state of the widgets that a kept cell in `cells` still shows"
    old = saved.get("widgets", {}).get(STATE, {}).get("state", {})
    shown = {o["data"][VIEW]["model_id"] for c in cells for o in c.get("outputs", []) if VIEW in o.get("data", {})}
    if shown & set(old):
        new = metadata.setdefault("widgets", {STATE: {"state": {}, "version_major": 2, "version_minor": 0}})
        new[STATE]["state"] = old | new[STATE]["state"]
    return metadata


def executed(path, fast):
    "The notebook at `path` after a run, cleaned, as the text to write"
    notebook = nbformat.read(path, as_version=4)
    saved = json.loads(json.dumps(notebook.metadata))
    notebook.metadata.pop("widgets", None)
    Client(notebook, [NOT_RUN, SLOW] if fast else [NOT_RUN], timeout=7200, kernel_name="python3", coalesce_streams=True,
           extra_arguments=KERNEL, resources={"metadata": {"path": str(path.parent)}}).execute()
    result = json.loads(json.dumps(notebook))
    result["metadata"] = with_kept_widgets(result["metadata"], saved, result["cells"])
    names = {}
    for part in ("cells", "metadata"): result[part] = stable(result[part], names, path.stem)
    result = dict2nb(result)
    clean_nb(result)
    return nb2str(result)


def text_outputs(text):
    "What a reader can compare: the printed text and the text results of each cell"
    def joined(value): return "".join(value) if isinstance(value, list) else value
    return [[joined(o.get("text") or o.get("data", {}).get("text/plain")) for o in c.get("outputs", [])]
            for c in json.loads(text)["cells"]]


def replace(path, text):
    "Write `text` to `path` in one step: a run that is cut short leaves the old file"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="keep the outputs of slow cells")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of them by default")
    args = parser.parse_args()
    cfg = get_config()
    # the kernel imports this checkout, whether or not it is installed
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(cfg.config_path), os.environ.get("PYTHONPATH")]))
    os.environ.update(QUIET)
    os.environ.pop("MPLBACKEND", None)  # the kernel's own backend is the one that saves figures
    found = (p for p in cfg.nbs_path.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    bad = 0
    for path in args.notebooks or sorted(found):
        start, verdict = time.monotonic(), "ok"
        try: text = executed(path.resolve(), args.fast)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error: verdict = f"failed\n{error}"
        else:
            if not args.check: replace(path, text)
            elif text_outputs(text) != text_outputs(path.read_text(encoding="utf-8")): verdict = "differs"
        bad += verdict != "ok"
        print(f"{path.name} {time.monotonic() - start:.0f} s: {verdict}", flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__": main()
