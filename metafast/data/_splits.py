"""Which classes belong to which part of a data set: the published lists and random splits."""

from __future__ import annotations

import hashlib
import importlib.resources
from collections.abc import Sequence

from metafast.data._arguments import integer, one_of

SPLITS = ("train", "val", "trainval", "test")


def published_split(file: str, split: object) -> tuple[str, ...]:
    """Names of a split, in the order of the packaged list `metafast/data/<file>.txt`."""
    one_of("split", split, SPLITS)
    sections: dict[str, list[str]] = {}
    text = importlib.resources.files("metafast.data").joinpath(f"{file}.txt").read_text("utf-8")
    for line in text.splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), [])
        elif not line.startswith("#"):
            section.append(line)
    sections["trainval"] = sections["train"] + sections["val"]
    return tuple(sections[str(split)])


def class_split(names: Sequence[str], split: object, fractions: Sequence[float], seed: int) -> list[str]:
    """Names of one part of a random split, in their own order (see :meth:`Classes.split`)."""
    one_of("split", split, SPLITS)
    seed = integer("seed", seed, 0, 2**64 - 1)
    shares = [float(share) for share in fractions]
    if len(shares) != 3 or not all(0 < share < float("inf") for share in shares):
        raise ValueError(f"fractions must be three positive numbers, got {tuple(fractions)!r}")
    val, test = (max(1, round(len(names) * share / sum(shares))) for share in shares[1:])
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
    if val + test >= len(names):
        raise ValueError(
            f"fractions must leave at least one class for each part, got {tuple(fractions)!r} "
            f"for {len(names)} classes"
        )
    parts = {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}
    parts["trainval"] = parts["train"] + parts["val"]
    chosen = set(parts[str(split)])
    return [name for name in names if name in chosen]
