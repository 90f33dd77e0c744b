"README.md's Python, run from top to bottom as a reader would"
import re
from functools import partial
from pathlib import Path

import mgprune
from mgprune.recipe import Recipe

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?ms)^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", README)  # code, and the text shown under it


def test_the_python_runs_in_its_order(tmp_path, monkeypatch, capsys):
    # the two searches take a minute as they stand, and what they find is shown where the page is made: a few steps will do
    monkeypatch.setattr(mgprune, "discover", partial(mgprune.discover, recipe=Recipe(steps=20)))
    monkeypatch.chdir(tmp_path)
    names, printed = {}, {}
    for code, _ in BLOCKS:
        exec(compile(code, "README.md", "exec"), names)
        printed[code] = capsys.readouterr().out
    assert names["again"] == names["circuit"] and (tmp_path / "ioi.json").exists()
    assert names["small"].n_neurons() == round(.08 * 2560)
    for code, shown in BLOCKS:
        if shown and "print(" in code and not re.search("discover|circuit|small", code): assert printed[code] == shown
