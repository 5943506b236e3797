"""Real training processes, killed (SIGKILL) at any moment and resumed: the result is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from metafast.training import load_checkpoint
from metafast.training.history import COLUMNS
from tests.killing import KILLS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the trainings of tests/killing.py, and what that says about them."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.killing", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def assert_equal(one: Any, other: Any, where: str) -> None:
    """Equal to the bit: tensors, and plain values that hold them."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    else:
        assert one == other, where


def rows(folder: Path) -> list[list[str]]:
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    assert lines[0] == list(COLUMNS)
    time = COLUMNS.index("seconds")
    return [line[:time] + line[time + 1 :] for line in lines]


def result(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "result.json").read_text())
    del content["train_seconds"]
    return content


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    for name in ("checkpoint-last.pt", "checkpoint-best.pt"):
        assert_equal(
            load_checkpoint(folder / name), load_checkpoint(undisturbed / name), f"{folder.name}/{name}"
        )
    assert rows(folder) == rows(undisturbed), folder.name
    assert_equal(result(folder), result(undisturbed), f"{folder.name}/result.json")
    assert not list(folder.glob(".*")), "temporary files are left"


def test_kills_at_random_moments(killed):
    folder, summary = killed
    assert summary["random"]["kills"] >= KILLS
    runs = sorted((folder / "random").iterdir())
    assert len(runs) == summary["random"]["runs"] + 1
    for run in runs[:-1]:
        assert_same_run(run, runs[-1])


def test_a_kill_at_every_operation_on_files(killed):
    folder, summary = killed
    runs = sorted((folder / "file").iterdir())
    # At least the seven operations of each of three saves; and the run that none was left for.
    assert len(runs) - 2 == summary["file"]["operations"] >= 21
    for run in runs[:-1]:
        assert_same_run(run, runs[-1])


def test_a_kill_of_the_command(tmp_path):
    arguments = [sys.executable, "-m", "metafast", "train", "--data", "glyphs", "--train-ways", "5"]
    arguments += [
        "--channels",
        "2",
        "--train-queries",
        "1",
        "--queries",
        "1",
        "--episodes",
        "4",
        "--steps",
        "40",
    ]
    arguments += [
        "--validation-episodes",
        "4",
        "--validate-every",
        "2",
        "--threads",
        "1",
        "--resume",
        "--out",
    ]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": ROOT}
    undisturbed = subprocess.Popen([*arguments, str(tmp_path / "whole")], **options)
    metrics, begin = tmp_path / "cut" / "metrics.csv", time.monotonic()
    process = subprocess.Popen([*arguments, str(tmp_path / "cut")], **options)
    # Killed once it has saved something, at a moment that the machine chooses.
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 5):
        assert time.monotonic() - begin < 300
        time.sleep(0.005)
    process.kill()
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == -signal.SIGKILL, errors.decode()
    subprocess.run([*arguments, str(tmp_path / "cut")], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    assert undisturbed.wait(timeout=120) == 0, undisturbed.stderr.read()
    undisturbed.stderr.close()
    first, second = (load_checkpoint(tmp_path / name / "checkpoint-last.pt") for name in ("cut", "whole"))
    assert_equal(first, second, "checkpoint-last.pt")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    one, other = (result(tmp_path / name) for name in ("cut", "whole"))
    assert_equal(one["tests"], other["tests"], "tests")
