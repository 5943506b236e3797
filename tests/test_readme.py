"""The examples of README and docstrings run, its commands parse, and the files and targets that it names exist."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest
import torch

import metafast
from metafast import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^ *```(\w+)\n(.*?)^ *```", TEXT, re.MULTILINE | re.DOTALL)
EXAMPLES = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.partition("#")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.replace("\\\n", " ").splitlines()
]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 5 and sum(command.startswith("metafast ") for command in COMMANDS) == 23


@pytest.mark.parametrize(
    "code", EXAMPLES, ids=["training loop", "plain MAML", "MAML", "torch.func", "fit and analyze"]
)
def test_examples_run(code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    # Shapes in the comments of the lines that make a value.
    for name, shape in re.findall(r"^(\w+) = .*# \[([\d, ]+)\]$", code, re.MULTILINE):
        assert list(getattr(names[name], "shape", ())) == [int(size) for size in shape.split(",")]


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match("metafast (train|evaluate|analyze)", c)])
def test_commands_parse(command: str) -> None:
    name, *arguments = shlex.split(command)[1:]
    assert callable(cli.COMMANDS[name].run)
    cli._options(name, arguments)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(COMMANDS) + "".join(re.findall(r"`[^`]*`", TEXT))))
    assert {"demo", "test", "bench", "lint"} <= named
    assert [name for name in named if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


def test_files_exist() -> None:
    files = re.findall(r"`((?:tests/|benchmarks/)?(?:test|bench)_\w+\.py)`", TEXT)
    assert len(files) > 8
    assert [f for f in files if not ((ROOT / f).exists() or (ROOT / "tests" / f).exists())] == []


def test_markers_of_generated_parts() -> None:
    assert TEXT.count("<!-- speed:begin -->") == TEXT.count("<!-- speed:end -->") == 1
    assert TEXT.count("<!-- omniglot") == 1


@pytest.mark.parametrize("name", metafast.__all__)
def test_examples_of_docstrings(name: str) -> None:
    thing = getattr(metafast, name)
    examples = doctest.DocTestFinder(recurse=False).find(
        thing, name, globs={"torch": torch, **vars(metafast)}
    )
    for example in examples:
        assert doctest.DocTestRunner().run(example).failed == 0
