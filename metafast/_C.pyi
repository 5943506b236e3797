"""What the compiled library has for Python, beside the operators of torch.ops.metafast."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")

def sample(getrandbits: Callable[[int], int], population: Sequence[T], k: int, /) -> list[T]: ...
def sample_task(
    getrandbits: Callable[[int], int],
    labels: Sequence[T],
    rows_of: Mapping[T, Sequence[U]],
    ways: int,
    rows: int,
    /,
) -> list[U]: ...
def shuffle(getrandbits: Callable[[int], int], values: list[T], /) -> None: ...
def split_orders(
    generator: Any, seeds: list[int], rows: list[int], first: list[int], counts: list[list[int]], /
) -> list[list[int]]: ...
def split_rows(
    items: list[int], labels: list[T], ways: int, shots: int, queries: int, /
) -> tuple[bytearray, list[T]] | None: ...
