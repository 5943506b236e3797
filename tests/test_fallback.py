"""The plain PyTorch that runs where a device has no kernel: made to run on the CPU in place of every kernel."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import metafast
from metafast import conv_block, inner_update, linear_head, matching, mlp, prototype, ridge
from metafast.attention_lstm import READING
from metafast.distance import DISTANCE, DISTANCE_JVP, DISTANCE_VJP, METRICS
from metafast.norm_relu_pool import NORM, NORM_VJP, NORM_VJP_VJP
from tests.cases import (
    CASES,
    ODD,
    SMALL,
    Case,
    assert_bad_label_spoils_its_task,
    assert_same,
    gradients,
    outputs,
    weighted_sum,
)

# torch's own forward-mode formulas use it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
each_case = pytest.mark.parametrize("case", CASES, ids=str)
OPERATORS = (
    DISTANCE,
    DISTANCE_VJP,
    DISTANCE_JVP,
    prototype.MEANS,
    prototype.MEANS_VJP,
    prototype.LOSS,
    prototype.LOSS_VJP,
    linear_head.HEAD,
    linear_head.HEAD_VJP,
    matching.MATCHING,
    matching.MATCHING_VJP,
    READING,
    ridge.RIDGE,
    ridge.RIDGE_VJP,
    mlp.LOOP,
    mlp.LOOP_VJP,
    NORM,
    NORM_VJP,
    NORM_VJP_VJP,
    conv_block.CONV_POOL,
    conv_block.CONV_POOL_VJP,
    conv_block.CONV_POOL_JVP,
    conv_block.MOMENTS,
)
#: Those for which torch's own kernels do as well where there are none of ours.
OF_TORCH = (inner_update.UPDATE, inner_update.UPDATE_VJP)
# A device without kernels: what its dispatch key leads to is the fallback, which does not care where its tensors are.
BARE = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """Every operator runs its fallback on the CPU; the names of those called."""
    called: list[str] = []
    with torch.library._scoped_library("metafast", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for op in (*OPERATORS, *OF_TORCH):

            def run(*args: Any, op: Any = op) -> Any:
                called.append(op._schema.name.removeprefix("metafast::"))
                return op.redispatch(BARE, *args)

            library.impl(op, run, "CPU", allow_override=True)
        yield called


def test_every_operator_has_one() -> None:
    names = {
        schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("metafast::")
    }
    queries = {f"metafast::{name}" for name in ("vector_bits", "keep_pages", "build_info", "cuda_probe")}
    operators = (*OPERATORS, *OF_TORCH)
    assert names - queries == {op._schema.name for op in operators}
    for op in operators:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op._schema.name, "CompositeExplicitAutograd"), (
            op
        )


class TestInPlaceOfTheKernels:
    @each_case
    def test_values_and_gradients(self, case: Case, request: pytest.FixtureRequest) -> None:
        inputs = case.make((3,), ODD)
        expected = gradients(case.function, inputs, ODD["C"])
        called = request.getfixturevalue("calls")
        assert_same(gradients(case.function, inputs, ODD["C"]), expected)
        assert called or not case.kernels_only

    @each_case
    def test_first_order(self, case: Case, calls: list[str]) -> None:
        inputs = case.make((2,), SMALL, requires_grad=True)
        function = case.closed(case.function, inputs, SMALL["C"])
        assert gradcheck(function, case.floats(inputs), check_forward_ad=True, check_batched_grad=True)

    @each_case
    def test_second_order(self, case: Case, calls: list[str]) -> None:
        inputs = case.make((2,), SMALL, requires_grad=True)
        function = case.closed(case.function, inputs, SMALL["C"])
        assert gradgradcheck(function, case.floats(inputs), check_fwd_over_rev=True, fast_mode=True)

    @each_case
    def test_transforms(self, case: Case, request: pytest.FixtureRequest) -> None:
        inputs = case.make((3, 2), SMALL)
        dims = tuple(0 if s.per_task else None for s in case.inputs.values())

        def outer(*values: Tensor) -> Tensor:
            def inner(*v: Tensor) -> Tensor:
                return weighted_sum([o.sin() for o in outputs(case.function(*v, SMALL["C"]))])

            return torch.vmap(torch.func.grad(inner), dims)(*values).sin().sum()

        meta = torch.func.grad(outer, argnums=case.differentiable)
        expected = meta(*inputs)
        request.getfixturevalue("calls")
        assert_same(meta(*inputs), expected)

    @each_case
    @pytest.mark.parametrize(
        "sizes", [{"n": 0, "m": 3, "d": 4, "C": 2}, {"n": 3, "m": 0, "d": 4, "C": 2}], ids=str
    )
    def test_empty(self, case: Case, sizes: dict[str, int], request: pytest.FixtureRequest) -> None:
        inputs = case.make((2,), sizes)
        expected = gradients(case.function, inputs, 2)
        request.getfixturevalue("calls")
        assert_same(gradients(case.function, inputs, 2), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    @pytest.mark.parametrize("metric", METRICS)
    def test_half(self, metric: str, dtype: torch.dtype, calls: list[str]) -> None:
        """Sums are kept in float32, as in the kernels."""
        x, y = torch.randn(2, 5, 700).to(dtype), torch.randn(2, 6, 700).to(dtype)
        expected = metafast.pairwise_distance(x.float(), y.float(), metric)
        assert torch.equal(metafast.pairwise_distance(x, y, metric), expected.to(dtype))
        zero = torch.zeros(1, 2, 5, dtype=dtype)
        assert (metafast.pairwise_distance(zero, zero, metric) == (metric == "cosine")).all()
        means = metafast.prototypes(
            torch.ones(1, 10000, 3, dtype=dtype), torch.zeros(1, 10000, dtype=torch.int64), 1
        )
        assert means.dtype == dtype and (means == 1).all()

    @pytest.mark.parametrize("metric", METRICS)
    def test_missing_class(self, metric: str, request: pytest.FixtureRequest) -> None:
        support, query = torch.randn(2, 4, 3).double(), torch.randn(2, 3, 3).double()
        labels = torch.tensor([[0, 2, 2, 0], [2, 2, 2, 2]]), torch.tensor([[0, 2, 0], [2, 2, 1]])
        case = Case(
            "",
            lambda s, q, C: metafast.prototypical_loss(s, labels[0], q, labels[1], C, metric),
            lambda *_: None,
            {},
        )
        expected = gradients(case.function, [support, query], 3)
        request.getfixturevalue("calls")
        assert_same(gradients(case.function, [support, query], 3), expected)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_not_finite_stays_in_its_class(self, value: float, request: pytest.FixtureRequest) -> None:
        features, labels = torch.randn(1, 6, 5), torch.tensor([[0, 1, 2, 2, 1, 0]])
        features[0, 3, 2] = value
        expected = metafast.prototypes(features, labels, 4)
        request.getfixturevalue("calls")
        torch.testing.assert_close(metafast.prototypes(features, labels, 4), expected, equal_nan=True)


class TestBadLabels:
    """There is no read-back on a device: the task's results are NaN, those of the others are right."""

    @pytest.mark.parametrize("label", [-1, 3, 2**40, -(2**40)])
    def test_prototypes(self, label: int, calls: list[str]) -> None:
        labels = torch.tensor([[0, 1, 2, 0]]).repeat(3, 1)
        assert_bad_label_spoils_its_task(
            lambda labels, x: metafast.prototypes(x, labels, 3), [torch.randn(3, 4, 5)], labels, label
        )

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("which", ["support", "query"])
    @pytest.mark.parametrize("label", [-1, 3, 2**40])
    def test_loss(self, metric: str, which: str, label: int, calls: list[str]) -> None:
        labels = {
            "support": torch.tensor([[0, 1, 2, 0]]).repeat(3, 1),
            "query": torch.tensor([[2, 1, 0]]).repeat(3, 1),
        }

        def run(chosen: Tensor, s: Tensor, q: Tensor, tau: Tensor) -> Any:
            own = {**labels, which: chosen}
            return metafast.prototypical_loss(s, own["support"], q, own["query"], 3, metric, tau)

        floats = [torch.randn(3, 4, 5), torch.randn(3, 3, 5), torch.rand(3) + 0.5]
        assert_bad_label_spoils_its_task(run, floats, labels[which], label)


def test_each_warns_once() -> None:
    """In an interpreter of its own, since a warning is given once in a process."""
    code = """
import warnings, torch, metafast
from metafast.attention_lstm import READING
from metafast import conv_block, linear_head, matching, mlp, prototype, ridge
from metafast.distance import DISTANCE, DISTANCE_JVP, DISTANCE_VJP
from metafast.norm_relu_pool import NORM, NORM_VJP, NORM_VJP_VJP

bare = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
x, labels = torch.zeros(1, 2, 3), torch.tensor([[0, 1]])
loss = torch.zeros(1)
square = torch.zeros(1, 2, 2)
one = torch.ones(1)
maps, of, y = torch.zeros(1, 1, 3, 2, 2), torch.ones(1, 3), torch.zeros(1, 1, 3, 1, 1)
kernel, pooled = torch.zeros(1, 3, 27), torch.zeros(1, 1, 1, 1, 3)
net = [torch.zeros(3, 3)], [torch.zeros(3)], [], 0.1, 1, 0, 1, False, False
calls = {
    DISTANCE: (x, x, 0),
    DISTANCE_VJP: (square, x, x, 0),
    DISTANCE_JVP: (x, x, x, x, 0),
    prototype.MEANS: (x, labels, 2),
    prototype.MEANS_VJP: (x, labels),
    prototype.LOSS: (x, labels, x, labels, None, 1.0, 2, 0),
    prototype.LOSS_VJP: (loss, square, x, x, labels, x, labels, None, 1.0, square, x, 0),
    linear_head.HEAD: (x, labels, x, x, None, None, None, 0.1, 1, 0, 0.0, 0.0, False, False),
    linear_head.HEAD_VJP: (
        square, None, None, x, labels, x, x, None, None, None, 0.1, 1, 0, 0.0, 0.0, False, False, x, x[:, :0],
    ),
    matching.MATCHING: (x, labels, x, one, 1.0, 1e-8, 2),
    matching.MATCHING_VJP: (square, x, labels, x, one, 1.0, 1e-8, square, labels.double(), square),
    READING: (x, x, torch.zeros(9, 12), torch.zeros(12), x, x, 2),
    ridge.RIDGE: (x, labels, x, one, None, None, 1.0, 1.0, 0.0, 2),
    ridge.RIDGE_VJP: (square, x, labels, x, one, None, 1.0, 1.0, x, square, square),
    mlp.LOOP: (x, x, x, *net),
    mlp.LOOP_VJP: (x, None, x, x, x, *net, x, True),
    NORM: (maps, of, of, None, None, 1e-5, True, True),
    NORM_VJP: (y, None, None, maps, of, of, of, of, y.byte(), False, 1e-5, True, True),
    NORM_VJP_VJP: (maps, of, of, None, None, y, None, None, maps, of, of, of, of, y.byte(), False, 1e-5, True, True),
    conv_block.CONV_POOL: (maps, kernel, of),
    conv_block.CONV_POOL_VJP: (pooled, pooled.byte(), maps),
    conv_block.CONV_POOL_JVP: (pooled.byte(), maps, kernel, of),
    conv_block.MOMENTS: (maps,),
}
warnings.simplefilter("always")
for op, arguments in calls.items():
    for _ in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            op.redispatch(bare, *arguments)
        own = [f"[{w.category.__name__}: {w.message}]" for w in caught if "metafast" in str(w.message)]
        print(op._schema.name, *own)
"""
    root = Path(metafast.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * len(OPERATORS)
    for k, op in enumerate(OPERATORS):
        first, *others = lines[3 * k : 3 * k + 3]
        name = op._schema.name
        assert first == (
            f"{name} [UserWarning: {name.replace('::', '.')}.default: no kernel for device 'cpu' in this build of "
            "metafast; plain PyTorch runs instead. 'metafast doctor' lists the kernels.]"
        )
        assert others == [name, name]
