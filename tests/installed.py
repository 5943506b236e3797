"""Tries an installed metafast, outside the source folder: ``python -I tests/installed.py``."""

import importlib.metadata
import importlib.resources
import pathlib
import sysconfig

import torch

import metafast
import metafast.compat.higher
import metafast.data

folder = pathlib.Path(metafast.__file__).parent
assert folder.is_relative_to(sysconfig.get_path("platlib")), f"{folder} is not the installed package"
for name in ("py.typed", "data/omniglot_vinyals.txt", "data/cub.txt"):
    assert importlib.resources.files(metafast).joinpath(name).is_file(), f"{name} was not installed"

x = torch.randn(4, 3, 8, requires_grad=True)
labels = torch.tensor([0, 1, 1]).expand(4, 3)
loss, logits = metafast.prototypical_loss(x, labels, x, labels, 2)
loss.sum().backward()
assert logits.shape == (4, 3, 2) and x.grad is not None and bool(x.grad.isfinite().all())
print(
    f"metafast {importlib.metadata.version('metafast')} works in {folder.name} under torch {torch.__version__}"
)
