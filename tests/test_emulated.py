"""The emulated device: its kernels run in place of the CPU's, for as long as it is asked for, in every order."""

from __future__ import annotations

import pytest
import torch

import metafast
from tests import simt

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(bool(simt.unavailable()), reason=simt.unavailable()),
]


def launches_of_a_call() -> int:
    before = simt.module().launches()
    x = torch.tensor([[1.0, 2.0]])
    assert metafast.pairwise_distance(x, x + 1).item() == 2
    return simt.module().launches() - before


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_kernels_run_inside_and_only_there(order: str) -> None:
    assert launches_of_a_call() == 0 and not simt.active()
    with simt.emulated(order):
        assert launches_of_a_call() > 0 and simt.active()
        with simt.emulated("forward"):
            assert launches_of_a_call() > 0
        assert launches_of_a_call() > 0 and simt.active()
    assert launches_of_a_call() == 0 and not simt.active()


def test_an_error_inside_ends_it() -> None:
    with pytest.raises(ZeroDivisionError), simt.emulated():
        raise ZeroDivisionError
    assert launches_of_a_call() == 0 and not simt.active()


def test_every_operator_of_tensors_is_emulated() -> None:
    """``simt.module`` refuses a library that lacks one of them."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("metafast::")]
    without = {s.name for s in schemas if not any("Tensor" in str(a.type) for a in s.arguments)}
    assert without == {f"metafast::{name}" for name in simt.CPU_ONLY}


def test_unknown_order() -> None:
    with pytest.raises(ValueError, match="order"), simt.emulated("sideways"):
        pass


def test_a_call_that_launches_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Still:
        def __getattr__(self, name: str) -> object:
            return getattr(loaded, name)

        def launches(self) -> int:
            return 0

    loaded = simt.module()
    monkeypatch.setattr(simt, "module", Still)
    with simt.emulated(), pytest.raises(AssertionError, match="pairwise_distance launched no kernel"):
        metafast.pairwise_distance(torch.ones(1, 2), torch.ones(1, 2))
    with simt.emulated():
        assert metafast.pairwise_distance(torch.ones(0, 2), torch.ones(1, 2)).shape == (0, 1)


def test_the_probe_of_the_doctor_runs() -> None:
    with simt.emulated():
        assert torch.ops.metafast.cuda_probe(torch.arange(5.0)).tolist() == [1, 2, 3, 4, 5]


def test_probe_of_the_doctor() -> None:
    simt.module()
    probe = torch.ops.metafast_simt.cuda_probe
    x = torch.randn(40)
    assert torch.equal(probe(x), x + 1)
    assert probe(x[:0]).shape == (0,)
    with pytest.raises(RuntimeError, match="x: expected up to 1024 numbers, got \\[2, 2\\]"):
        probe(torch.zeros(2, 2))
