"README.md's code, run from top to bottom as a reader would"
import re
import shlex
from configparser import ConfigParser
from functools import partial
from pathlib import Path

import mgprune
from mgprune.cli import main
from mgprune.recipe import Recipe

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for block in re.findall(r"(?ms)^```sh\n(.*?)^```", README) for line in block.splitlines()]
BLOCKS = re.findall(r"(?ms)^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", README)  # code, and the text shown under it


def test_the_python_runs_in_its_order(tmp_path, monkeypatch, capsys):
    # the two searches take a minute as they stand, and what they find is shown where the page is made: a few steps will do
    monkeypatch.setattr(mgprune, "discover", partial(mgprune.discover, recipe=Recipe(steps=20)))
    monkeypatch.chdir(tmp_path)
    names, printed = {}, {}
    for code, _ in BLOCKS:
        exec(compile(code, "README.md", "exec"), names)
        printed[code] = capsys.readouterr().out
    assert names["again"] == names["circuit"] and (tmp_path / "years.json").exists()
    assert names["small"].n_neurons() == round(.06 * 2560)
    for code, shown in BLOCKS:
        if shown and "print(" in code and not re.search("discover|circuit|small", code): assert printed[code] == shown


def test_the_commands_run_beside_what_the_python_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r'\.save\("(.+?)"\)', README): Path(name).write_text("somebody's")
    ours = [words for words in COMMANDS if words[0] == "mgprune"]
    assert {words[1] for words in ours} == {"discover", "evaluate"}
    for _, *words in ours:
        assert main([*words, *(["--steps", "40"] if words[0] == "discover" else [])]) == 0, capsys.readouterr().err


def test_what_is_to_be_installed_is_there():
    config = ConfigParser(delimiters=["="])
    config.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")
    settings = config["DEFAULT"]
    assert ["git", "clone", settings["git_url"]] in COMMANDS and ["pip", "install", "-e", f"./{settings['repo']}"] in COMMANDS
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(map(" ".join, COMMANDS))): assert f"{extra}_requirements" in settings
    assert f"Python {settings['min_python']} or later" in README
    for name, words in (("torch", "PyTorch"), ("transformers", "transformers")):
        assert f"{words} {re.search(rf'{name}>=([0-9.]+)', settings['requirements'])[1]}" in README
