"""Drop-in modules under the names of the originals: install, ``metafast.compat --as``, and what is missing."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import metafast
from metafast import compat
from metafast.compat.__main__ import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has imported no original and installed nothing."""
    roots = tuple(compat.LIBRARIES)
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in roots}
    for name in kept:
        del sys.modules[name]
    monkeypatch.setattr(compat._finder, "installed", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in roots]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def impostor(tmp_path: Path) -> Path:
    """A folder with an original that must not be imported."""
    for name in compat.LIBRARIES:
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(f"raise SystemError('the original {name}')")
        (tmp_path / "site" / name / "foo.py").write_text("raise SystemError('a part of the original')")
    return tmp_path / "site"


@pytest.mark.parametrize("library", compat.LIBRARIES)
def test_the_name_of_the_original_is_ours(fresh: None, impostor: Path, library: str) -> None:
    sys.path.insert(0, str(impostor))
    with pytest.raises(SystemError, match="the original"):
        importlib.import_module(library)
    compat.install(library)
    ours = importlib.import_module(f"metafast.compat.{library}")
    assert importlib.import_module(library) is ours
    assert sys.modules[library] is ours
    assert ours.__spec__ is not None and ours.__spec__.name == f"metafast.compat.{library}"
    compat.install(library)
    with pytest.raises(ImportError, match=rf"^{library}\.foo: not provided by metafast\.compat\.{library}; "):
        importlib.import_module(f"{library}.foo")


def test_submodules_are_the_same_objects_under_both_names(fresh: None) -> None:
    compat.install("higher")
    names: dict[str, object] = {}
    exec(
        "import higher.optim\nimport higher.patch as patch\nfrom higher.patch import monkeypatch\n"
        "from higher import utils\nfrom higher.optim import DifferentiableSGD, register_optim",
        names,
    )
    from metafast.compat.higher import optim, patch, utils

    assert names["higher"].optim is optim  # type: ignore[attr-defined]
    assert (names["patch"], names["utils"]) == (patch, utils)
    assert names["monkeypatch"] is patch.monkeypatch
    assert names["DifferentiableSGD"] is optim.DifferentiableSGD
    assert importlib.import_module("higher.utils") is utils


@pytest.mark.parametrize("name", ["higher", "metafast.compat.higher"])
def test_missing_names_are_named_with_their_place(fresh: None, name: str) -> None:
    compat.install("higher")
    module = importlib.import_module(name)
    with pytest.raises(AttributeError) as attribute:
        _ = module.foo
    assert "higher.foo: not provided by metafast.compat.higher" in str(attribute.value)
    assert "look for 'foo' in higher of the original" in str(attribute.value)
    with pytest.raises(AttributeError, match=r"^higher\.optim\.bar: .* look for 'bar' in higher\.optim of"):
        _ = module.optim.bar
    assert not hasattr(module.optim, "bar")
    for code in (f"from {name}.optim import bar", f"import {name}.optim.bar"):
        with pytest.raises(ImportError, match=r"^higher\.optim\.bar: not provided") as missing:
            exec(code)
        assert "docs/migration/higher.md" in str(missing.value)
    for code in (f"from {name} import foo", f"import {name}.foo.bar"):
        with pytest.raises(ImportError, match=r"^higher\.foo: not provided"):
            exec(code)


def test_other_modules_are_found_as_before(fresh: None) -> None:
    compat.install("higher")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'metafast\.compat\.none'"):
        importlib.import_module("metafast.compat.none")
    with pytest.raises(ModuleNotFoundError, match="No module named 'higherer'"):
        importlib.import_module("higherer")


def test_wrong_calls(fresh: None) -> None:
    with pytest.raises(ValueError, match=r"libraries: expected names out of higher.*, got 'torch'"):
        compat.install("higher", "torch")
    with pytest.raises(ValueError, match=r"libraries: expected one or more of higher.*, got none"):
        compat.install()
    assert compat._finder.installed == set()


def test_an_original_that_is_imported_already_is_left_alone(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "higher.py").write_text("here = True")
    sys.path.insert(0, str(tmp_path))
    importlib.invalidate_caches()
    original = importlib.import_module("higher")
    with pytest.raises(RuntimeError, match=r"higher is imported already, from .*higher\.py; call install"):
        compat.install("higher")
    assert sys.modules["higher"] is original


def test_a_script_runs_as_python_runs_it(
    fresh: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], impostor: Path
) -> None:
    script = tmp_path / "script.py"
    (tmp_path / "neighbour.py").write_text("value = 7")
    script.write_text(
        "import sys, neighbour, higher\n"
        "print(__name__, sys.argv[1:], neighbour.value, higher.__name__, sys.path[0])\n"
        "assert sys.argv[0] == __file__\n"
        "raise SystemExit(3)"
    )
    sys.path.insert(1, str(impostor))
    with pytest.raises(SystemExit) as end:
        main(["--as", "higher", str(script), "--as", "x", "-m", "y"])
    assert end.value.code == 3
    expected = f"__main__ ['--as', 'x', '-m', 'y'] 7 metafast.compat.higher {tmp_path.resolve()}\n"
    assert capsys.readouterr().out == expected


def test_a_module_runs_too(fresh: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some_tool.py").write_text("import sys, higher\nprint(__name__, sys.argv, higher.__name__)")
    sys.path.insert(0, str(tmp_path))
    main(["--as", "higher", "--as", "higher", "-m", "some_tool", "-m", "a"])
    expected = f"__main__ {[str(tmp_path / 'some_tool.py'), '-m', 'a']} metafast.compat.higher\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("script.py", "the following arguments are required: --as"),
        ("--as torchmetal script.py", "argument --as: invalid choice: 'torchmetal'"),
        ("--as higher", "expected script.py or -m module"),
        ("--as higher no-such-script.py", "no-such-script.py: no such file"),
    ],
)
def test_wrong_command_lines(
    fresh: None, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_line_in_a_process_of_its_own(impostor: Path) -> None:
    script = ROOT / "tests" / "scripts" / "higher_hypergradient.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "metafast.compat", "--as", "higher", str(script), "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(impostor)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split(",")) == 1 + 8


def test_importing_metafast_puts_no_finder_in_the_way() -> None:
    code = "import sys, metafast; print([f for f in sys.meta_path if 'metafast' in type(f).__module__])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_cdist_is_metafasts() -> None:
    from metafast.compat import torch as ours

    x = torch.randn(3, 4, dtype=torch.float64)
    assert ours.cdist is metafast.cdist and ours.__all__ == ["cdist"]
    torch.testing.assert_close(ours.cdist(x, x + 1), torch.cdist(x, x + 1))
