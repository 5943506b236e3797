"""What keeps a module from second order is found, in its place and with a remedy; what does not is left in peace."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metafast import cli, inner_loop
from metafast.data import Episodes
from metafast.inner_loop import BatchingWarning
from metafast.learners import MAML, ProtoMAML
from metafast.second_order import MISSING, SLOW, UNKNOWN, WRONG, SecondOrderError, examine_model
from tests.test_inner_loop import MODULES


class Once(torch.autograd.Function):
    """A sine whose derivative is for one time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out: Tensor = g * x.cos()
        return out


class Detached(torch.autograd.Function):
    """A sine whose backward hides from autograd what it depends on, and which vmap can call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out: Tensor = g * x.detach().cos()
        return out


class OldStyle(Once):
    """As before torch.func, with an honest backward."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out: Tensor = g * x.cos()
        return out


class Middle(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


class Model(nn.Module):
    """Something planted two levels down, under a call with keywords."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Middle(function))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(input=self.body(x))
        return out


def detached_number(x: Tensor) -> Tensor:
    return x * x.square().sum().item()


def branch(x: Tensor) -> Tensor:
    return x if x[:, 0].sum() > 0 else 2 * x


def in_place(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype).add_(x.sin())


#: What is planted, and of each finding its kind, the operator and a part of the remedy.
PLANTED: dict[str, tuple[Callable[[Tensor], Tensor], list[tuple[str, str, str]]]] = {
    "cdist": (
        lambda x: x + torch.cdist(x, x + 1)[:, :1],
        [(MISSING, "_cdist_backward", "metafast.cdist takes its place")],
    ),
    "pdist": (
        lambda x: x + torch.pdist(x).sum(),
        [(MISSING, "_pdist_backward", "metafast.pairwise_distance of the rows with themselves")],
    ),
    "once differentiable": (
        Once.apply,
        [
            (MISSING, "Once", "leave out once_differentiable"),
            (SLOW, "Once", "a setup_context and generate_vmap_rule = True"),
        ],
    ),
    "detached": (Detached.apply, [(WRONG, "DetachedGenerated or Detached", "no detach()")]),
    "old style": (OldStyle.apply, [(SLOW, "OldStyle", "a setup_context and generate_vmap_rule = True")]),
    "number": (
        detached_number,
        [
            (WRONG, "something that leaves the graph (detach(), item(), no_grad())", "no detach()"),
            (SLOW, "Python's look at a value", "keep numbers tensors"),
        ],
    ),
    "branch": (branch, [(SLOW, "Python's look at a value", "choose by torch.where")]),
    "in place": (
        in_place,
        [(SLOW, "output with shape [4, 8] doesn't match", "a new tensor in place of an old")],
    ),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_what_is_planted_is_found(name: str) -> None:
    torch.manual_seed(0)
    function, wanted = PLANTED[name]
    model = Model(function)
    before = deepcopy(model.state_dict())
    report = examine_model(inner_loop, model, torch.randn(4, 8))
    assert len(report.findings) == len(wanted)
    for finding, (kind, operator, remedy) in zip(report.findings, wanted, strict=True):
        assert finding.kind == kind and finding.module == "body.2 (Middle)"
        assert operator.startswith(finding.operator[: len(operator)]) or finding.operator.startswith(operator)
        assert remedy in finding.remedy
        assert finding.fatal == (kind != SLOW)
    assert report.path == ("loop" if any(kind == SLOW for kind, _, _ in wanted) else "batched")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_two_places_are_two_findings() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Middle(PLANTED["cdist"][0]), Middle(Detached.apply)
            self.between = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.other(self.between(self.one(x)))
            return out

    found = examine_model(inner_loop, Both(), torch.randn(4, 8)).findings
    assert [(each.kind, each.module) for each in found] == [
        (MISSING, "one (Middle)"),
        (WRONG, "other (Middle)"),
    ]


@pytest.mark.parametrize("name", [name for name in MODULES if MODULES[name][2] != "loop"])
def test_sound_modules_have_no_finding(name: str) -> None:
    torch.manual_seed(0)
    build, shape, path = MODULES[name]
    report = examine_model(inner_loop, build(), torch.rand(4, *shape))
    assert report.findings == [] and report.path == path


NOTED = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), "BatchNorm is transductive"),
    "recurrent": (lambda: nn.LSTM(8, 3, batch_first=True), "recurrent layers are computed without cuDNN"),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True),
        "attention is computed by products and a softmax",
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6)), "as group norm"),
    "dropout": (lambda: nn.Sequential(nn.Linear(8, 6), nn.Dropout()), "dropout draws a mask for each task"),
}


@pytest.mark.parametrize("name", [name for name in NOTED if name != "recurrent"])
def test_what_is_computed_in_another_way_is_noted(name: str) -> None:
    build, text = NOTED[name]
    rows = torch.randn(4, 5, 8) if name == "attention" else torch.randn(4, 8)
    report = examine_model(inner_loop, build(), rows)
    assert report.findings == [] and any(text in note for note in report.notes)
    assert examine_model(inner_loop, nn.Linear(8, 2), torch.randn(4, 8)).notes == []


def test_recurrent_layers_inside_a_model() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = NOTED["recurrent"][0]()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.recurrent(x)[0][:, -1]
            return out

    report = examine_model(inner_loop, Last(), torch.randn(4, 5, 8))
    (finding,) = report.findings
    assert finding.kind == SLOW and finding.module == "recurrent (LSTM)"
    assert finding.operator == "torch's recurrent kernel" and NOTED["recurrent"][1] in report.notes[0]


ROWS, LABELS = torch.randn(2, 4, 8), torch.randint(0, 3, (2, 4))


@pytest.mark.parametrize("name", ["cdist", "once differentiable"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.filterwarnings("ignore::metafast.inner_loop.BatchingWarning")
def test_the_exception_itself_names_the_operator(name: str, recompute: bool) -> None:
    """Also the second time; and where no second derivative is needed there is none."""
    function, ((_, operator, remedy), *_) = PLANTED[name]
    model = Model(function)
    for _ in range(2):
        with pytest.raises(SecondOrderError) as caught:
            inner_loop(model, ROWS, LABELS, 0.1, 2, recompute=recompute)
        text = str(caught.value)
        assert f"no second derivative: {operator} in body.2 (Middle); " in text and remedy in text
    first = inner_loop(model, ROWS, LABELS, 0.1, 2, first_order=True, recompute=recompute)
    first(ROWS).sum().backward()
    with torch.no_grad():
        assert inner_loop(model, ROWS, LABELS, 0.1, 2)(ROWS).isfinite().all()
    episodes = Episodes(ROWS, LABELS, ROWS, LABELS, 3)
    with pytest.raises(SecondOrderError, match=operator):
        MAML(model)(episodes)


def test_only_the_first_loop_goes_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = Model(torch.sin), []
    monkeypatch.setattr(sys.modules["metafast.inner_loop"], "go_backward", lambda *args: calls.append(1))
    for recompute in (False, True, False):
        inner_loop(model, ROWS, LABELS, 0.1, 2, recompute=recompute)
    assert len(calls) == 1
    inner_loop(deepcopy(model), ROWS, LABELS, 0.1, 2, recompute=True)
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore::metafast.inner_loop.BatchingWarning")
def test_an_operator_is_named_where_its_module_cannot_be_told() -> None:
    """A module that casts, one that cannot be copied, and the head of ProtoMAML."""

    class Casts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x.float())
            return y + torch.cdist(y, y + 1)[:, :1]

    class Unique(Casts):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("there is one alone")

    for kind in (Casts, Unique):
        with pytest.raises(SecondOrderError, match=f"_cdist_backward in {kind.__name__}; metafast.cdist"):
            inner_loop(kind(8, 3), ROWS, LABELS, 0.1, 1)
    episodes = Episodes(ROWS, LABELS, ROWS, LABELS, 3)
    with pytest.raises(SecondOrderError, match="marked as once_differentiable in Sequential; leave out"):
        ProtoMAML(Model(Once.apply), steps=1)(episodes)


def test_integers_and_values_that_are_not_finite() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.middle = nn.Embedding(7, 8), Middle(PLANTED["cdist"][0])

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.middle(self.embedding(x))
            return out

    (finding,) = examine_model(inner_loop, Tokens(), torch.randint(0, 7, (4,))).findings
    assert finding.kind == MISSING and finding.module == "middle (Middle)"
    (finding,) = examine_model(inner_loop, Model(lambda x: x.clamp(max=0).log()), torch.randn(4, 8)).findings
    assert finding.kind == UNKNOWN and finding.module == "body.2 (Middle)" and not finding.fatal


def test_proto_maml_goes_backward_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though each call makes a model of its own around the encoder."""
    calls: list[int] = []
    monkeypatch.setattr(sys.modules["metafast.inner_loop"], "go_backward", lambda *args: calls.append(1))
    learner, episodes = ProtoMAML(Model(torch.sin)), Episodes(ROWS, LABELS, ROWS, LABELS, 3)
    for _ in range(3):
        learner(episodes)
    assert len(calls) == 1


def test_other_errors_of_a_backward_pass_stay_what_they_are() -> None:
    class Fails(Detached):
        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            if torch.is_grad_enabled() and g.requires_grad:
                raise ValueError("on purpose")
            return g

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BatchingWarning)
        with pytest.raises(ValueError, match="on purpose"):
            inner_loop(Model(Fails.apply), ROWS, LABELS, 0.1, 1)


def test_the_doctor_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "planted_models.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Bad(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(8, 3)\n"
        "    def forward(self, x):\n"
        "        return torch.cdist(self.linear(x), self.linear(x) + 1)\n"
        "class Good(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU(), nn.Linear(4, 3))\n"
        "good = Good()\n"
        "class Pair(nn.Linear):\n"
        "    def __init__(self):\n"
        "        super().__init__(8, 3)\n"
        "    def forward(self, x, y=None):\n"
        "        return x, y\n"
        "class Two(Pair):\n"
        "    def forward(self, x, y):\n"
        "        return x\n"
        "def broken():\n"
        "    raise KeyError('size')\n"
        "empty = nn.Flatten()\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "--model", "planted_models:Bad", "--input", "8"]) == 1
    printed = capsys.readouterr().out
    assert "ERROR: no second derivative: _cdist_backward in Bad; metafast.cdist takes its place" in printed
    for name in ("Good", "good"):
        arguments = ["doctor", "--model", f"planted_models:{name}", "--input", "8", "--batch-norm", "frozen"]
        assert cli.main([*arguments, "--rows", "3"]) == 0
        printed = capsys.readouterr().out
        assert (
            "inner loop     batched: every layer is called with the weights of all tasks at once" in printed
        )
        assert "BatchNorm is frozen: it normalises by running statistics" in printed
        assert "dropout draws a mask for each task" in printed and printed.endswith(
            "problems\n  none found\n"
        )
    assert cli.main(["doctor", "--model", "metafast:Conv4", "--input", "1", "16", "16"]) == 0
    for arguments, text in (
        (
            ["planted_models:Bad"],
            "--input 1 28 28: planted_models:Bad cannot be called with such rows: RuntimeError: mat1",
        ),
        (
            ["planted_models:Worse"],
            "planted_models:Worse does not give a model: module 'planted_models' has no",
        ),
        (["no_such_module:Net"], "--model: no_such_module:Net does not give a model: No module named"),
        (
            ["planted_models"],
            "--model: expected module:name, such as package.models:Net, got 'planted_models'",
        ),
        (["math:inf"], "--model: math:inf does not give a model: 'float' object is not callable"),
        (["planted_models:Two", "--input", "8"], "cannot be called with such rows: TypeError: "),
        (
            ["planted_models:Pair", "--input", "8"],
            "expected a tensor of outputs from planted_models:Pair, got tuple",
        ),
        (["planted_models:broken"], "--model: planted_models:broken does not give a model: 'size'"),
        (["planted_models:empty"], "--model: planted_models:empty has no parameters that adapt"),
        (["builtins:dict"], "--model: expected a torch.nn.Module from builtins:dict, got dict"),
    ):
        capsys.readouterr()
        assert cli.main(["doctor", "--model", *arguments]) == 2
        assert text in capsys.readouterr().err
