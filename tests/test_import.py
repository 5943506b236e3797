"""Importing metafast: what it brings, what it leaves alone, and what it takes from torch."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import metafast

PACKAGE = Path(metafast.__file__).parent
EXTRAS = ("tqdm", "matplotlib", "PIL", "tensorboard", "torchvision")


def python(code: str) -> str:
    """What ``code`` prints in an interpreter of its own that turns warnings into errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_touches_no_cuda_and_needs_no_extra() -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))  # None: importing it is an ImportError\n"
        "import torch, metafast, metafast.data, metafast.learners, metafast.training, metafast.cli, metafast.doctor\n"
        "print(torch.cuda.is_initialized())"
    )
    assert python(code).strip() == "False"


@pytest.mark.parametrize(
    "name",
    [
        "metafast",
        "metafast.data",
        "metafast.learners",
        "metafast.training",
        "metafast.compat",
        "metafast.compat.easyfsl",
        "metafast.compat.easyfsl.datasets",
        "metafast.compat.easyfsl.methods",
        "metafast.compat.easyfsl.modules",
        "metafast.compat.easyfsl.samplers",
        "metafast.compat.higher",
        "metafast.compat.higher.optim",
        "metafast.compat.higher.patch",
        "metafast.compat.higher.utils",
        "metafast.compat.learn2learn",
        "metafast.compat.learn2learn.algorithms",
        "metafast.compat.learn2learn.data",
        "metafast.compat.learn2learn.nn",
        "metafast.compat.learn2learn.optim",
        "metafast.compat.learn2learn.optim.transforms",
        "metafast.compat.learn2learn.vision",
        "metafast.compat.learn2learn.vision.benchmarks",
        "metafast.compat.learn2learn.vision.datasets",
        "metafast.compat.learn2learn.vision.models",
        "metafast.compat.torchmeta",
        "metafast.compat.torchmeta.datasets",
        "metafast.compat.torchmeta.modules",
        "metafast.compat.torchmeta.toy",
        "metafast.compat.torchmeta.transforms",
        "metafast.compat.torchmeta.utils",
        "metafast.compat.torchmeta.utils.data",
    ],
)
def test_public_names_exist_and_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__) > 0
    assert module.__doc__
    for public in module.__all__:
        value = getattr(module, public)
        if callable(value):
            assert value.__doc__ and value.__doc__.strip(), f"{name}.{public} has no docstring"


def torch_names(source: str) -> set[str]:
    """Dotted names of torch that a source reads, by whatever name it imports them."""
    tree = ast.parse(source)
    bound: dict[str, str] = {}
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {
                a.asname or a.name.partition(".")[0]: a.name for a in node.names if a.name.startswith("torch")
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            bound |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    names |= set(bound.values())
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in bound:
            names.add(".".join([bound[inner.id], *reversed(parts)]))
    return names


def private_names(source: str) -> list[str]:
    """Those with a part that begins with an underscore, each to the first attribute of a private part."""
    return sorted(
        name for name in torch_names(source) if any(part.startswith("_") for part in name.split("."))
    )


def exists(dotted: str) -> bool:
    parts = dotted.split(".")
    value: object = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], start=2):
        if not hasattr(value, part):
            if not isinstance(value, ModuleType):
                return False
            try:
                importlib.import_module(".".join(parts[:depth]))
            except ImportError:
                return False
        value = getattr(value, part)
    return True


def test_torch_names_are_read_from_a_source() -> None:
    source = "import torch\nfrom torch.a import _b as c\nx = torch._C.d(c.e, torch.f)"
    assert private_names(source) == ["torch._C", "torch._C.d", "torch.a._b", "torch.a._b.e"]
    assert exists("torch._C._after_autograd_keyset") and exists("torch.autograd.forward_ad._current_level")
    assert not exists("torch._C._invented") and not exists("torch._invented.module")


AUTODIFF = private_names((PACKAGE / "_autodiff.py").read_text())
ELSEWHERE = sorted(
    {name for path in PACKAGE.rglob("*.py") for name in private_names(path.read_text())}.difference(AUTODIFF)
)


def test_the_private_names_are_the_known_ones() -> None:
    assert {
        "torch._functorch.utils.enable_single_level_autograd_function",
        "torch.autograd.function._SingleLevelFunction",
        "torch._C._after_autograd_keyset",
        "torch._C._AutoDispatchBelowAutograd",
    } <= set(AUTODIFF)


@pytest.mark.parametrize("name", [*AUTODIFF, *ELSEWHERE])
def test_private_names_of_torch_still_exist(name: str) -> None:
    assert exists(name), (
        f"this torch has no {name}, which metafast's derivatives lean on. Find what replaced it in torch's own "
        "torch/_functorch/autograd_function.py and torch/_library/autograd.py, correct metafast/_autodiff.py, and "
        "run tests/test_derivatives.py and tests/test_transforms.py under the oldest and the newest torch."
    )
