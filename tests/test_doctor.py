"""The doctor tells what is there and what is wrong, in words with a remedy."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from metafast import cli, doctor
from metafast._library import operator, vector_bits

HEALTHY = doctor.Findings(
    metafast="0.1.0",
    torch="2.11.0",
    torch_cuda="13.0",
    devices=(doctor.Device("a GPU", (9, 0)),),
    nvidia_driver=True,
    compiler="gcc 13.2.0",
    built_cuda="13.0",
    built_architectures="8.0;9.0+PTX",
    vector_bits=256,
    threads=2,
    kernels={"pairwise_distance": (True, True), "prototypes": (True, False)},
    wrong=(),
    keeps_pages=True,
    wait_policy="passive",
    missing={"train": ()},
)


def judged(**changes: Any) -> list[doctor.Problem]:
    return doctor.problems(dataclasses.replace(HEALTHY, **changes))


def test_a_healthy_machine_has_no_problem() -> None:
    assert judged() == []
    text = doctor.describe(HEALTHY)
    assert text.endswith("problems\n  none found")
    assert "cuda:0         a GPU, compute capability 9.0; a kernel of this build ran" in text
    assert "idle threads sleep" in text


@pytest.mark.parametrize(
    ("changes", "fatal", "said"),
    [
        ({"torch": "2.9.1+cpu"}, True, "pip install --upgrade 'torch>=2.11'"),
        ({"wrong": ("prototypes",)}, True, "wrong results from prototypes"),
        ({"devices": (doctor.Device("old", (7, 0), "no kernel image"),)}, True, "TORCH_CUDA_ARCH_LIST=7.0"),
        ({"built_cuda": None}, False, "built without CUDA"),
        ({"devices": ()}, False, "sees no device"),
        ({"devices": (), "torch_cuda": None}, False, "install a CUDA build of torch"),
        ({"missing": {"train": ("tqdm",)}}, False, r"pip install 'metafast[train]'"),
    ],
    ids=["old torch", "wrong", "wrong GPU", "no CUDA kernels", "no device", "CPU torch", "no extra"],
)
def test_each_problem_has_a_remedy(changes: dict[str, Any], fatal: bool, said: str) -> None:
    (problem,) = judged(**changes)
    assert problem.fatal is fatal and said in problem.text
    assert f"  {'ERROR' if fatal else 'note'}: {problem.text}" in doctor.describe(
        dataclasses.replace(HEALTHY, **changes)
    )


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.0.dev20260101", "3.0.0"])
def test_later_versions_of_torch_are_fine(version: str) -> None:
    assert judged(torch=version) == []


def test_fatal_problems_come_first() -> None:
    found = judged(missing={"train": ("tqdm",)}, wrong=("prototypes",))
    assert [problem.fatal for problem in found] == [True, False]


def test_this_machine() -> None:
    found = doctor.examine()
    assert found.torch == torch.__version__ and found.wrong == ()
    assert (
        found.vector_bits == vector_bits()
        and found.compiler == json.loads(operator("build_info")())["compiler"]
    )
    assert len(found.devices) == torch.cuda.device_count()
    assert found.kernels["pairwise_distance"][0] and found.kernels["prototypical_loss_vjp"][0]
    assert doctor.PROBE not in found.kernels and "vector_bits" not in found.kernels
    assert "pairwise_distance " in doctor.report()


def test_a_kernel_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.distance, "pairwise_distance", lambda x, y, metric: x @ y.mT)
    assert set(doctor._wrong_operators()) == {
        f"pairwise_distance({metric})" for metric in ("sqeuclidean", "euclidean", "cityblock", "cosine")
    }


@pytest.mark.parametrize(
    ("changes", "code"), [({}, 0), ({"missing": {"train": ("tqdm",)}}, 0), ({"wrong": ("x",)}, 1)]
)
def test_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], code: int
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: dataclasses.replace(HEALTHY, **changes))
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().out.startswith("versions\n")


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--fix"]) == 2
    assert "--fix" in capsys.readouterr().err
