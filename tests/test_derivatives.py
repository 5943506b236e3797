"""Derivatives of every order, against finite differences and the reference, in all ways autograd asks for them."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import metafast
from metafast import reference
from metafast.distance import METRICS
from tests import simt
from tests.cases import CASES, SMALL, Case, assert_same, cotangents, outputs, shuffled_labels, weighted_sum

# torch's own forward-mode formulas use it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
each_case = pytest.mark.parametrize("case", CASES, ids=str)
C = SMALL["C"]


def first_gradient(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients of a weighted sum of all results, as a differentiable function of the same inputs."""

    def gradient(*values: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(weighted_sum(outputs(function(*values))), values, create_graph=True)

    return gradient


def orders(function: Callable[..., Any], values: Sequence[Tensor], highest: int) -> list[tuple[Tensor, ...]]:
    """The gradients of order 1 to ``highest``, each of a weighted sum of the one before."""
    values = [v.detach().clone().requires_grad_() for v in values]
    nothing = 0 * sum((v.sum() for v in values), torch.zeros(()))
    result, current = [], outputs(function(*values))
    for _ in range(highest):
        current = torch.autograd.grad(weighted_sum(current) + nothing, values, create_graph=True)
        result.append(tuple(c.detach() for c in current))
    return result


class TestFiniteDifferences:
    """Element by element; along random directions where kernels are emulated, whose formulas are the same."""

    @each_case
    def test_first_order(self, case: Case, device: torch.device) -> None:
        inputs = case.make((2,), SMALL, device=device, requires_grad=True)
        assert gradcheck(
            case.closed(case.function, inputs, C),
            case.floats(inputs),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            fast_mode=simt.active(),
        )

    @each_case
    def test_second_order(self, case: Case, device: torch.device) -> None:
        inputs = case.make((2,), SMALL, device=device, requires_grad=True)
        assert gradgradcheck(
            case.closed(case.function, inputs, C),
            case.floats(inputs),
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
            check_batched_grad=True,
            fast_mode=simt.active(),
        )

    @each_case
    def test_third_order(self, case: Case, hardware: torch.device) -> None:
        inputs = case.make((1,), {"n": 2, "m": 2, "d": 2, "C": 2}, device=hardware, requires_grad=True)
        function = case.closed(case.function, inputs, 2)
        gradient = first_gradient(lambda *values: tuple(o.sin() for o in outputs(function(*values))))
        # Along random directions: element by element it is 250 s for all cases.
        assert gradgradcheck(
            gradient,
            case.floats(inputs),
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
            fast_mode=True,
        )


class TestReference:
    @each_case
    @pytest.mark.parametrize("lead", [(), (2,), (2, 2)], ids=str)
    def test_orders(self, case: Case, lead: tuple[int, ...], device: torch.device) -> None:
        sizes = {"n": 5, "m": 6, "d": 7, "C": 3}
        inputs = case.make(lead, sizes, device=device)
        actual = orders(case.closed(case.function, inputs, 3), case.floats(inputs), 3)
        assert_same(actual, orders(case.closed(case.reference, inputs, 3), case.floats(inputs), 3))

    @pytest.mark.parametrize("case", [c for c in CASES if not c.name.startswith("adapt")], ids=str)
    def test_orders_at_equal_rows(self, case: Case, device: torch.device) -> None:
        """Where a distance is 0 every derivative that does not exist is 0: all are finite, and the reference's."""
        sizes = {"n": 3, "m": 3, "d": 4, "C": 3}
        inputs = case.make((2,), sizes, device=device)
        names = list(case.inputs)
        rows = ("n d", "m d")
        floats = [k for k in case.differentiable if case.inputs[names[k]].shape in rows]
        if "support_labels" in names:
            # With one row a class, a query row can equal a prototype.
            inputs[names.index("support_labels")] = torch.arange(3, device=device).repeat(2, 1)
        for k in floats[1:]:
            inputs[k][:, :2] = inputs[floats[0]][:, :2]
        actual = orders(case.closed(case.function, inputs, 3), case.floats(inputs), 3)
        for gradient in itertools.chain(*actual):
            assert gradient.isfinite().all()
        assert_same(actual, orders(case.closed(case.reference, inputs, 3), case.floats(inputs), 3), 1e-6)

    @pytest.mark.parametrize("metric", METRICS)
    def test_orders_at_zero_rows(self, metric: str, device: torch.device) -> None:
        x, y = (
            torch.randn(2, 3, 4, dtype=torch.float64, device=device),
            torch.zeros(2, 3, 4, dtype=torch.float64),
        )
        x[:, 1] = 0
        inputs = [x, y.to(device)]
        actual = orders(lambda a, b: metafast.pairwise_distance(a, b, metric), inputs, 3)
        for gradient in itertools.chain(*actual):
            assert gradient.isfinite().all()
        assert_same(actual, orders(lambda a, b: reference.pairwise_distance(a, b, metric), inputs, 3))

    @pytest.mark.parametrize(
        "case", [c for c in CASES if "label" in "".join(c.inputs) and "soft" not in c.name], ids=str
    )
    def test_missing_class(self, case: Case, device: torch.device) -> None:
        """Classes without a row, up to order 3; the weighted sum leaves the constant -inf logits out."""
        inputs = case.make((2,), {"n": 4, "m": 3, "d": 3, "C": 3}, device=device)
        for k, spec in enumerate(case.inputs.values()):
            if spec.kind == "labels":
                inputs[k] = inputs[k] % 2

        def finite(function: Callable[..., Any]) -> Callable[..., Any]:
            def of(*values: Tensor) -> tuple[Tensor, ...]:
                out = outputs(function(*values))
                return tuple(torch.where(o.isfinite(), o, 0.0) for o in out)

            return of

        results = [
            orders(finite(case.closed(f, inputs, 3)), case.floats(inputs), 3)
            for f in (case.function, case.reference)
        ]
        assert_same(*results)

    @each_case
    def test_float32_second_order(self, case: Case, device: torch.device) -> None:
        inputs = case.make((2,), {"n": 6, "m": 5, "d": 40, "C": 3}, torch.float32, device)
        exact = [t.double() if t.is_floating_point() else t for t in inputs]
        actual = orders(case.closed(case.function, inputs, 3), case.floats(inputs), 2)
        expected = orders(case.closed(case.reference, exact, 3), case.floats(exact), 2)
        for a, e in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), e, rtol=0, atol=3e-5 * max(1.0, e.abs().max().item()))


class TestMaml:
    @pytest.mark.parametrize("metric", METRICS)
    def test_step(self, metric: str, device: torch.device) -> None:
        """One inner step of a linear embedding, and the outer gradient by central differences."""
        double = {"dtype": torch.float64, "device": device}
        support, query = torch.randn(2, 4, 5, **double), torch.randn(2, 6, 5, **double)
        labels = (
            torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0]], device=device),
            shuffled_labels((2, 6), 2).to(device),
        )
        weight = torch.randn(5, 3, **double)

        def outer(weight: Tensor, rate: Tensor) -> Tensor:
            loss, _ = metafast.prototypical_loss(
                support @ weight, labels[0], support @ weight.roll(1, 0), labels[0], 2, metric
            )
            (gradient,) = torch.autograd.grad(loss.sum(), weight, create_graph=True)
            adapted = weight - rate * gradient
            loss, _ = metafast.prototypical_loss(
                support @ adapted, labels[0], query @ adapted, labels[1], 2, metric
            )
            return loss.mean()

        rate = torch.tensor(0.1, **double, requires_grad=True)
        leaf = weight.clone().requires_grad_()
        to_weight, to_rate = torch.autograd.grad(outer(leaf, rate), (leaf, rate))
        eps = 1e-6
        for k in range(weight.numel()):
            step = (
                torch.zeros_like(weight)
                .view(-1)
                .index_fill(0, torch.tensor(k, device=device), eps)
                .view_as(weight)
            )
            ahead, behind = ((weight + s * step).requires_grad_() for s in (1, -1))
            expected = (outer(ahead, rate) - outer(behind, rate)) / (2 * eps)
            torch.testing.assert_close(to_weight.view(-1)[k], expected.detach(), rtol=1e-6, atol=1e-8)
        with torch.no_grad():
            rates = rate + eps, rate - eps
        expected = (outer(leaf, rates[0]) - outer(leaf, rates[1])) / (2 * eps)
        torch.testing.assert_close(to_rate, expected.detach(), rtol=1e-6, atol=1e-8)


class TestAutograd:
    @each_case
    def test_any_subset_of_the_inputs(self, case: Case, device: torch.device) -> None:
        """First and second gradients of a few inputs are those that all inputs together give."""
        inputs = case.make((2,), SMALL, device=device)
        function, floats = case.closed(case.function, inputs, C), case.floats(inputs)
        full = [t.clone().requires_grad_() for t in floats]
        expected = first_gradient(function)(*full)

        def second(gradients: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
            total = weighted_sum(gradients) + 0 * sum(t.sum() for t in leaves)
            return torch.autograd.grad(total, leaves, retain_graph=True)

        for size in range(1, len(floats)):
            for chosen in itertools.combinations(range(len(floats)), size):
                values = [t.clone().requires_grad_(k in chosen) for k, t in enumerate(floats)]
                leaves = [values[k] for k in chosen]
                out = outputs(function(*values))
                first = torch.autograd.grad(weighted_sum(out), leaves, create_graph=True)
                assert_same(first, [expected[k] for k in chosen])
                assert_same(
                    second(first, leaves), second([expected[k] for k in chosen], [full[k] for k in chosen])
                )

    @pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith("prototypical_loss")], ids=str)
    def test_loss_and_logits_apart_and_together(self, case: Case, device: torch.device) -> None:
        inputs = case.make((2,), SMALL, device=device, requires_grad=True)
        leaves = case.floats(inputs)
        out = case.function(*inputs, C)
        upstream = cotangents(out)
        apart = [
            torch.autograd.grad(o, leaves, u, create_graph=True) for o, u in zip(out, upstream, strict=True)
        ]
        together = torch.autograd.grad(out, leaves, upstream, create_graph=True)
        assert_same([a + b for a, b in zip(*apart, strict=True)], together)
        second = [torch.autograd.grad(weighted_sum(g), leaves, retain_graph=True) for g in (*apart, together)]
        assert_same([a + b for a, b in zip(second[0], second[1], strict=True)], second[2])
        wanted = case.reference(*inputs, C)
        for o, w, u in zip(out, wanted, upstream, strict=True):
            assert_same(
                torch.autograd.grad(o, leaves, u, retain_graph=True),
                torch.autograd.grad(w, leaves, u, retain_graph=True),
            )

    @each_case
    def test_gradients_accumulate_into_leaves(self, case: Case, device: torch.device) -> None:
        inputs = case.make((2,), SMALL, device=device, requires_grad=True)
        leaves = case.floats(inputs)
        total = weighted_sum(outputs(case.function(*inputs, C)))
        total.backward(retain_graph=True)
        once = [t.grad.clone() for t in leaves]
        total.backward()
        assert_same([t.grad for t in leaves], [2 * g for g in once])
        with pytest.raises(RuntimeError, match="second time"):
            total.backward()

    @each_case
    def test_views_of_one_tensor(self, case: Case, device: torch.device) -> None:
        """Inputs that are slices of one leaf give its gradient."""
        inputs = case.make((2,), SMALL, device=device)
        floats = case.floats(inputs)
        leaf = torch.cat([t.reshape(-1) for t in floats]).requires_grad_()
        parts = leaf.split([t.numel() for t in floats])
        function = case.closed(case.function, inputs, C)
        total = weighted_sum(outputs(function(*(p.view_as(t) for p, t in zip(parts, floats, strict=True)))))
        (gradient,) = torch.autograd.grad(total, leaf)
        apart = first_gradient(function)(*(t.clone().requires_grad_() for t in floats))
        assert_same(gradient, torch.cat([g.detach().reshape(-1) for g in apart]))

    @pytest.mark.parametrize("case", [c for c in CASES if "norm_relu_pool" not in c.name], ids=str)
    def test_one_tensor_as_every_input(self, case: Case, device: torch.device) -> None:
        shapes = [tuple(t.shape) for t in case.floats(case.make((2,), {"n": 3, "m": 3, "d": 3, "C": 3}))]
        inputs = case.make((2,), {"n": 3, "m": 3, "d": 3, "C": 3}, device=device)
        leaf = (torch.rand(2, 3, 3, dtype=torch.float64, device=device) + 0.5).requires_grad_()
        results = []
        for f in (case.function, case.reference):
            values = [
                leaf if shape == (2, 3, 3) else t
                for shape, t in zip(shapes, case.floats(inputs), strict=True)
            ]
            total = weighted_sum(outputs(case.closed(f, inputs, 3)(*values)))
            (first,) = torch.autograd.grad(total, leaf, create_graph=True)
            (second,) = torch.autograd.grad(weighted_sum([first]) + 0 * leaf.sum(), leaf)
            results.append((first.detach(), second))
        assert_same(*results)

    @pytest.mark.parametrize(
        "case",
        [
            c
            for c in CASES
            if c.name not in ("prototypes", "adapted_mlp-relu-mse", "adapted_mlp-tanh-mse-many")
        ],
        ids=str,
    )
    def test_inputs_are_guarded(self, case: Case, device: torch.device) -> None:
        """An input changed in place before backward is an error, not a wrong gradient.

        Linear prototypes save none, and the other cases hand a copy of its first input on.
        """
        inputs = [t.clone() for t in case.make((2,), SMALL, device=device, requires_grad=True)]
        out = outputs(case.function(*inputs, C))
        with torch.no_grad():
            case.floats(inputs)[0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out[-1].sum().backward()

    @pytest.mark.parametrize("metric", METRICS)
    def test_results_are_guarded(self, metric: str, device: torch.device) -> None:
        """The fused loss saves its logits for backward."""
        support = torch.randn(2, 4, 3, device=device, requires_grad=True)
        labels = torch.tensor([[0, 1, 1, 0]], device=device).expand(2, 4)
        loss, logits = metafast.prototypical_loss(support, labels, support, labels, 2, metric)
        with torch.no_grad():
            logits.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()

    @each_case
    def test_no_graph_where_none_is_wanted(self, case: Case, device: torch.device) -> None:
        plain = case.make((2,), SMALL, device=device)
        assert not any(o.requires_grad for o in outputs(case.function(*plain, C)))
        recorded = [t.clone().requires_grad_(t.is_floating_point()) for t in plain]
        with torch.no_grad():
            assert not any(o.requires_grad for o in outputs(case.function(*recorded, C)))
        with torch.inference_mode():
            out = outputs(case.function(*plain, C))
            assert all(o.is_inference() for o in out)
        for o, e in zip(out, outputs(case.function(*recorded, C)), strict=True):
            assert e.requires_grad
            if case.name == "attention_lstm":
                # torch's operators make what is recorded.
                torch.testing.assert_close(o, e)
            else:
                assert torch.equal(o, e)

    @each_case
    def test_transforms_under_no_grad(self, case: Case, device: torch.device) -> None:
        """Tangents, gradients of torch.func and mapped calls are what they are elsewhere."""
        inputs = case.make((2,), SMALL, device=device)
        floats = case.floats(inputs)

        def function(*values: Tensor) -> Tensor:
            return weighted_sum(outputs(case.closed(case.function, inputs, C)(*values)))

        def run() -> tuple[Any, ...]:
            along = tuple(t.cos() for t in floats)
            mapped = torch.func.vmap(function)(*(torch.stack([t, t + 0.1]) for t in floats))
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(t, v) for t, v in zip(floats, along, strict=True)]
                tangent = forward_ad.unpack_dual(function(*duals)).tangent
            return (
                *torch.func.jvp(function, floats, along),
                torch.func.grad(function)(*floats),
                mapped,
                tangent,
            )

        expected = run()
        with torch.no_grad():
            actual = run()
        assert_same(actual, expected)

    @each_case
    @pytest.mark.parametrize("order", [0, 1, 2])
    def test_graphs_are_freed(self, case: Case, order: int, device: torch.device) -> None:
        """No cycle keeps results or inputs alive: they go with their last reference, without the collector."""
        gc.disable()
        try:
            inputs = case.make((2,), SMALL, device=device, requires_grad=True)
            leaves = case.floats(inputs)
            out = outputs(case.function(*inputs, C))
            watched = [weakref.ref(t) for t in (*leaves, *out)]
            current = out
            for _ in range(order):
                total = weighted_sum(current) + 0 * sum(t.sum() for t in leaves)
                current = torch.autograd.grad(total, leaves, create_graph=True)
                del total
                watched += [weakref.ref(t) for t in current]
            del inputs, leaves, out, current
            assert [w() for w in watched] == [None] * len(watched)
        finally:
            gc.enable()

    @each_case
    def test_retained_gradient_of_an_inner_node(self, case: Case, device: torch.device) -> None:
        inputs = case.make((2,), SMALL, device=device, requires_grad=True)
        inner = [t * 2 if t.is_floating_point() else t for t in inputs]
        for t in case.floats(inner):
            t.retain_grad()
        weighted_sum(outputs(case.function(*inner, C))).backward()
        for t, leaf in zip(case.floats(inner), case.floats(inputs), strict=True):
            torch.testing.assert_close(2 * t.grad, leaf.grad)


@pytest.mark.parametrize("learned", [False, True], ids=["scale", "scale-and-temperature"])
@pytest.mark.parametrize("first", [0, 20], ids=["few classes", "many classes"])
def test_the_loss_operator(first: int, learned: bool, device: torch.device) -> None:
    """What the public function keeps to itself has its derivatives too: the third output, and a scale of a learned
    temperature."""
    labels, query_labels = (torch.tensor(y, device=device) + first for y in ([[0, 1, 1]], [[1, 0]]))

    def run(support: Tensor, query: Tensor, temperature: Tensor | None = None) -> Any:
        loss, logits, means = torch.ops.metafast.prototypical_loss(
            support, labels, query, query_labels, temperature, 0.7, first + 2, 0
        )
        return loss, logits[..., first:], means

    double = {"dtype": torch.float64, "device": device}
    inputs = [torch.randn(1, rows, 2, **double, requires_grad=True) for rows in (3, 2)]
    if learned:
        inputs.append(torch.full((1,), 1.3, **double, requires_grad=True))
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs, check_fwd_over_rev=True)
