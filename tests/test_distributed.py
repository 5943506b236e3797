"""Training and evaluation by several processes (gloo, on the CPU), against one process with all the tasks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from metafast.data import Episodes
from metafast.training import distributed, load_checkpoint
from metafast.training.distributed import RankLostError, Ranks, join, ranks, synchronised
from metafast.training.history import read_history

ROOT = Path(__file__).parent.parent

Results = dict[str, Any]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each scenario of tests/ranks.py gave: by `scenario-processes-rank`."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranks", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: Results = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    return {**found, "folder": folder}


def assert_same_weights(one: Results, other: Results) -> None:
    assert one["weights"].keys() == other["weights"].keys()
    different = [
        name for name, value in one["weights"].items() if not torch.equal(value, other["weights"][name])
    ]
    assert not different


@pytest.mark.parametrize(
    ("scenario", "processes"),
    [
        ("plain", 2),
        ("unequal", 2),
        ("unequal", 3),
        ("varying", 2),
        ("norm", 2),
        ("norm", 3),
        ("clipped", 2),
        ("norm_of_single_tasks", 2),
        ("episode_norm", 2),
        ("norm_of_steps", 2),
        ("other_weights", 2),
    ],
)
def test_trains_as_one_process_does(results: Results, scenario: str, processes: int) -> None:
    alone = results["plain-1-0" if scenario == "other_weights" else f"{scenario}-1-0"]
    together = results[f"{scenario}-{processes}-0"]
    assert [row[0] for row in together["rows"]] == list(range(1, 9))
    torch.testing.assert_close(
        torch.tensor(together["rows"]), torch.tensor(alone["rows"]), rtol=1e-4, atol=1e-6, equal_nan=True
    )
    torch.testing.assert_close(together["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
    assert together["best"] == alone["best"]
    # Trained far enough to tell right from wrong.
    first, last = alone["rows"][0][1], alone["rows"][-1][1]
    assert abs(last - first) > 0.02 * first


def test_float16(results: Results) -> None:
    """Rounded at other places, so only about the same; a step that overflows is left out by all."""
    alone, together = results["float16-1-0"], results["float16-2-0"]
    losses = [torch.tensor([row[1] for row in one["rows"]]) for one in (alone, together)]
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.01)


def test_all_ranks_end_with_the_same_weights_to_the_bit(results: Results) -> None:
    names = [name for name in results if isinstance(results[name], dict) and "weights" in results[name]]
    pairs = [(name, f"{name[:-2]}-0") for name in names if not name.endswith("-0")]
    assert len(pairs) >= 12
    for name, first in pairs:
        assert_same_weights(results[name], results[first])
        assert str(results[name]["rows"]) == str(results[first]["rows"]), name


def test_batch_norm_of_each_rank_alone(results: Results) -> None:
    """Trains on other statistics than one process; the running ones are the mean over the ranks."""
    alone, together = results["local_norm-1-0"], results["local_norm-2-0"]
    assert alone["rows"][0][1] != pytest.approx(together["rows"][0][1], rel=1e-4)
    mean = "encoder.2.running_mean"
    assert float((alone["weights"][mean] - together["weights"][mean]).abs().max()) > 1e-4
    assert_same_weights(together, results["local_norm-2-1"])


@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_is_merged_to_the_bit(results: Results, processes: int) -> None:
    alone = results["evaluation-1-0"]
    assert len(alone) == 4
    for rank in range(processes):
        together = results[f"evaluation-{processes}-{rank}"]
        for name, accuracy in alone.items():
            merged = together[name]
            assert torch.equal(merged.pop("per_episode"), accuracy["per_episode"]), name
            assert merged == {key: value for key, value in accuracy.items() if key != "per_episode"}, name


def test_gradients_that_not_all_ranks_have(results: Results) -> None:
    for rank in (0, 1):
        found = results[f"unused_parameters-2-{rank}"]
        assert [None if g is None else g.tolist() for g in found["gradients"]] == [[21, 41], [0, 1], None]
        assert found["numbers"].tolist() == [2, 1]


def test_only_the_first_rank_writes_and_prints(results: Results) -> None:
    assert (results["files-2-0"], results["files-2-1"]) == (True, False)
    assert sorted(path.name for path in (results["folder"] / "rank0").iterdir()) == [
        "checkpoint-best.pt",
        "checkpoint-last.pt",
        "metrics.csv",
        "result.json",
    ]
    assert results["printed-2-0"].startswith("step 4/8  loss")
    assert results["printed-2-1"] == ""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "few tasks",
            "ValueError: tasks: a step has 1, which 2 processes cannot share out; train on at least 2",
        ),
        ("holds a run", "FileExistsError: out: .* already holds a run"),
        ("damaged", r"CheckpointError: checkpoint: .*checkpoint-last\.pt is truncated, damaged or not"),
        ("in the way", "NotADirectoryError: out: expected a folder, got the file"),
        ("not finite", "NonFiniteError: the loss is nan at step 4; no checkpoint was saved yet"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value and len(value) < 12 else "",
)
def test_every_rank_raises_what_one_met(results: Results, rank: int, what: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(results[f"errors-2-{rank}"][what])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["resumed", "one_is_told_to_stop"])
def test_resume_continues_bit_for_bit(results: Results, how: str, rank: int) -> None:
    """Each rank with random numbers of its own, here for dropout."""
    undisturbed, found = results[f"undisturbed-2-{rank}"], results[f"{how}-2-{rank}"]
    assert_same_weights(found, undisturbed)
    assert str(found["rows"]) == str(undisturbed["rows"])
    assert torch.equal(found["random"], undisturbed["random"])
    assert not torch.equal(results["undisturbed-2-0"]["random"], results["undisturbed-2-1"]["random"])


def test_a_signal_to_one_rank_stops_all_after_the_same_step(results: Results) -> None:
    for rank in (0, 1):
        message = results[f"one_is_told_to_stop-2-{rank}"]["message"]
        assert message.startswith("Interrupted: stopped after step 4 of 8; ")


@pytest.mark.parametrize(("how", "seconds"), [("killed", 20), ("halted", 20)])
def test_a_lost_rank_ends_the_others_with_a_message(results: Results, how: str, seconds: float) -> None:
    found = results[f"{how}-2-0"]
    assert found["message"].startswith(
        "RankLostError: rank 0 of 2 lost another rank, which died or does not answer"
    )
    assert found["message"].endswith("checkpoint-last.pt")
    assert "; resume goes on from " in found["message"]
    assert ".cc:" not in found["message"]
    assert found["seconds"] < seconds


def torchrun(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, "-m", "metafast", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


TRAIN = [
    "train",
    "--data",
    "glyphs",
    "--train-ways",
    "4",
    "--tasks",
    "3",
    "--train-queries",
    "2",
    "--channels",
    "2",
]
TRAIN += [
    "--queries",
    "2",
    "--episodes",
    "40",
    "--validation-episodes",
    "40",
    "--device",
    "cpu",
    "--threads",
    "1",
]


def test_torchrun(tmp_path: Path) -> None:
    """The command in two processes and in one: the same weights to rounding, files and lines once."""
    arguments = [*TRAIN, "--steps", "6", "--validate-every", "3"]
    together = torchrun(*arguments, "--out", str(tmp_path / "two"))
    alone = [sys.executable, "-m", "metafast", *arguments, "--out", str(tmp_path / "one")]
    subprocess.run(alone, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    printed, errors = together.communicate(timeout=300)
    assert together.returncode == 0, errors
    assert printed.count("step 3/6") == 1
    assert printed.count("test ") == 1
    assert printed.count("saved ") == 1
    one, two = (load_checkpoint(tmp_path / name / "checkpoint-last.pt") for name in ("one", "two"))
    losses = [
        [row.loss for row in read_history(tmp_path / name / "metrics.csv", 6)] for name in ("one", "two")
    ]
    # torch's BatchNorm has larger rounding errors than ours.
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    # Not the biases before a BatchNorm: their gradients are rounding errors alone, of which Adam makes whole steps.
    for block in range(4):
        name = f"encoder.encoder.{block}.0.weight"
        torch.testing.assert_close(two["model"][name], one["model"][name], rtol=1e-2, atol=3e-4)
    assert len(two["random"]) == 2


def test_torchrun_with_a_rank_that_is_killed(tmp_path: Path) -> None:
    process = torchrun(*TRAIN, "--steps", "1000000", "--validate-every", "5", "--out", str(tmp_path))
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "checkpoint-last.pt").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
        )
        survivor, killed = map(int, children.stdout.split()[-2:])
        os.kill(killed, 9)
        # The survivor's own message is tested above: torchrun ends it, at times before it could be written.
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0
    assert "SIGKILL" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(survivor, 0)
    assert load_checkpoint(tmp_path / "checkpoint-last.pt")["step"] % 5 == 0


class TestAlone:
    """What there is without other processes."""

    def test_ranks(self):
        group = ranks()
        assert (group.rank, group.count, group.first) == (0, 1, True)
        assert group.takes(7)
        assert group.share(3) == slice(0, 3)
        assert group.gather("a") == ["a"]
        assert group.by_first(lambda: 5) == 5
        values = torch.ones(2)
        assert group.sum(values) is values

    @pytest.mark.parametrize("tasks", [3, 4, 10])
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_shares_are_all_tasks_and_nearly_equal(self, tasks, count):
        shares = [range(tasks)[Ranks(rank, count).share(tasks)] for rank in range(count)]
        assert [task for share in shares for task in share] == list(range(tasks))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1

    def test_join_without_torchrun_only_chooses_the_device(self, monkeypatch):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        assert join("cpu") == torch.device("cpu")
        assert join() == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        assert ranks().count == 1
        with pytest.raises(ValueError, match=r"^warp: "):
            join("warp")

    def test_a_gpu_for_each_process(self, monkeypatch):
        chosen = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
        monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert join("auto") == join("cuda") == torch.device("cuda:1")
        assert chosen == [torch.device("cuda:1")] * 2
        with pytest.raises(
            ValueError, match=r"^cuda:0: torchrun started 2 processes; with cuda each takes a GPU"
        ):
            join("cuda:0")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        message = (
            "^cuda: torchrun started 3 processes on this machine, which has 2 GPUs; --nproc-per-node 2 takes"
        )
        with pytest.raises(ValueError, match=message):
            join("auto")

    def test_processes_that_do_not_come(self, monkeypatch):
        def fail(*arguments, **options):
            raise torch.distributed.DistStoreError("[a/b.cpp:3] Timed out. Perhaps [...]")

        monkeypatch.setattr(distributed.dist, "init_process_group", fail)
        for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        with pytest.raises(RankLostError, match=r"rank 1 of 2 lost another rank, .* \(here: Timed out\)$"):
            join("cpu")


class TestSynchronised:
    """BatchNorm over the ranks, here with one rank, for which it is torch's own to rounding."""

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize(
        ("layer", "shape"),
        [(nn.BatchNorm1d, (7, 5)), (nn.BatchNorm1d, (4, 5, 3)), (nn.BatchNorm2d, (4, 5, 3, 2))],
    )
    def test_is_batch_norm(self, layer, shape, affine, momentum):
        plain, ours = (layer(5, affine=affine, momentum=momentum) for _ in range(2))
        for step in range(3):
            inputs = [(3 * torch.randn(shape) + 100 * step).requires_grad_()]
            inputs.append(inputs[0].detach().clone().requires_grad_())
            expected = plain(inputs[0])
            with synchronised([ours], Ranks()):
                found = ours(inputs[1])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            weights = torch.randn(shape)
            for output in (expected, found):
                (output * weights).sum().backward()
            torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-5)
        assert "forward" not in vars(ours)

    def test_derivatives_to_the_second_order(self):
        norm = nn.BatchNorm1d(3, track_running_stats=False).double()
        inputs = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        with synchronised([norm], Ranks()):
            assert torch.autograd.gradcheck(norm, inputs)
            assert torch.autograd.gradgradcheck(norm, inputs)

    def test_half_inputs_stay_half_and_channels_last(self):
        norm = nn.BatchNorm2d(4)
        inputs = torch.randn(3, 4, 5, 5).to(torch.bfloat16).to(memory_format=torch.channels_last)
        with synchronised([norm], Ranks()):
            found = norm(inputs)
        assert found.dtype == torch.bfloat16
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, nn.BatchNorm2d(4)(inputs), rtol=0.02, atol=0.02)

    def test_evaluation_mode_is_left_alone(self):
        norm = nn.BatchNorm1d(3).eval()
        inputs = torch.randn(4, 3)
        with synchronised([norm], Ranks()):
            found = norm(inputs)
        assert torch.equal(found, norm(inputs))
        assert int(norm.num_batches_tracked) == 0

    def test_a_wrong_input_is_refused_as_by_torch(self):
        with (
            synchronised([norm := nn.BatchNorm2d(3)], Ranks()),
            pytest.raises(ValueError, match="expected 4D"),
        ):
            norm(torch.randn(4, 3))


def test_a_share_is_part_of_the_step():
    batch = Episodes(
        torch.rand(3, 2, 1), torch.tensor([[0, 1]] * 3), torch.rand(3, 2, 1), torch.tensor([[0, 1]] * 3), 2
    )
    parts = [distributed.shared_out(lambda step: batch, Ranks(rank, 2))(0) for rank in range(2)]
    assert [weight for _, weight in parts] == [1 / 3, 2 / 3]
    assert torch.equal(torch.cat([part.support_x for part, _ in parts]), batch.support_x)
