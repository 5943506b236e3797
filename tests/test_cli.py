import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

from metafast import cli
from metafast.training import load_checkpoint, pictures, save_checkpoint
from metafast.training.result import command_line, without_absolute_path

SMALL = ["--train-ways", "4", "--train-queries", "2", "--channels", "4", "--queries", "2", "--episodes", "4"]
TRAIN = ["train", "--data", "glyphs", *SMALL, "--steps", "3", "--validation-episodes", "4", "--threads", "1"]


@pytest.fixture(autouse=True)
def small_glyphs(monkeypatch):
    monkeypatch.setattr(cli, "GLYPHS", {"train": (8, 0), "val": (4, 8), "trainval": (12, 0), "test": (6, 12)})


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path, capsys):
    """A finished training in `tmp_path / "run"`."""
    assert cli.main([*TRAIN, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_train_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = tmp_path / "record.json"
    options = ["--ways", "3", "5", "--test-shots", "1", "2", "--validate-every", "2", "--record", str(record)]
    assert cli.main([*TRAIN, *options]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "runs" / "protonet-glyphs"
    result = json.loads((folder / "result.json").read_text())
    assert json.loads(record.read_text()) == result
    assert str(tmp_path) not in record.read_text()
    assert result["command"] == "metafast " + " ".join([*TRAIN, *options[:-1], "record.json"])
    assert result["environment"]["torch"] == torch.__version__
    assert result["environment"]["threads"] == 1
    assert (result["steps"], result["options"]["seed"], result["settings"]["channels"]) == (3, 0, 4)
    assert result["settings"]["validation"]["ways"] == 5
    assert result["batch_norm"] == {"train": "batch", "evaluation": "running"}
    last = (folder / "metrics.csv").read_text().splitlines()[-1].split(",")
    assert result["train_seconds"] == round(float(last[4]), 1)
    shapes = [(test["ways"], test["shots"], test["queries"], test["episodes"]) for test in result["tests"]]
    assert shapes == [(3, 1, 2, 4), (3, 2, 2, 4), (5, 1, 2, 4), (5, 2, 2, 4)]
    assert all(0 <= test["accuracy"] <= 1 and test["interval_95"] >= 0 for test in result["tests"])
    assert "protonet with Conv4-4 on glyphs: 32 training classes, 4-way 1-shot 2-query training" in printed
    assert "step 2/3  loss" in printed
    assert f"test {100 * result['tests'][3]['accuracy']:.2f} % +- " in printed
    for name in ("result.json", "metrics.csv", "checkpoint-best.pt"):
        assert str(folder.relative_to(tmp_path) / name) in printed
        assert (folder / name).is_file()


def test_pictures_are_drawn_and_named(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main([*TRAIN, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in ("learning-curve.png", "episode.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert str(tmp_path / name) in printed


def test_without_matplotlib_one_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "have_matplotlib", lambda: False)
    assert cli.main([*TRAIN, "--out", str(tmp_path)]) == 0
    assert (
        "no pictures drawn: matplotlib is not installed (pip install metafast[train])"
        in capsys.readouterr().out
    )
    assert not list(tmp_path.glob("*.png"))


def test_same_seed_same_result(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert cli.main([*TRAIN, "--seed", seed, "--out", str(tmp_path / name)]) == 0
    a, b, c = (load_checkpoint(tmp_path / name / "checkpoint-last.pt")["model"] for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["encoder.encoder.0.0.weight"], c["encoder.encoder.0.0.weight"])


def test_trainval_has_no_validation_and_says_so(tmp_path, capsys):
    assert cli.main([*TRAIN, "--split", "trainval", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "48 training classes" in printed
    assert "no validation: trainval leaves no classes for it" in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["best_validation_accuracy"] is None
    assert (result["best_step"], "validation" in result["settings"]) == (3, False)


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        (["--metric", "cosine"], 10.0),
        (["--metric", "cityblock"], 1.0),
        (["--metric", "cosine", "--temperature", "3"], 3.0),
    ],
    ids=["cosine", "cityblock", "given"],
)
def test_temperature(tmp_path, options, temperature):
    assert cli.main([*TRAIN, *options, "--learn-temperature", "--out", str(tmp_path)]) == 0
    checkpoint = load_checkpoint(tmp_path / "checkpoint-last.pt")
    assert checkpoint["settings"]["temperature"] == temperature
    assert float(checkpoint["model"]["log_temperature"].exp()) == pytest.approx(temperature, rel=0.01)


def test_evaluate_repeats_the_test_of_the_training(run, tmp_path, capsys):
    tests = json.loads((run / "result.json").read_text())["tests"]
    record = tmp_path / "again.json"
    arguments = [
        "evaluate",
        "--checkpoint",
        str(run),
        "--queries",
        "2",
        "--episodes",
        "4",
        "--record",
        str(record),
    ]
    assert cli.main(arguments) == 0
    result = json.loads(record.read_text())
    assert result["tests"] == tests
    assert result["settings"]["metric"] == "sqeuclidean"
    assert "running BatchNorm, seed 0)" in capsys.readouterr().out


def test_evaluate_options(run, capsys):
    arguments = [
        "evaluate",
        "--checkpoint",
        str(run / "checkpoint-last.pt"),
        "--split",
        "val",
        "--ways",
        "2",
        "3",
    ]
    arguments += [
        "--shots",
        "2",
        "--queries",
        "3",
        "--episodes",
        "5",
        "--seed",
        "7",
        "--batch-norm",
        "transductive",
    ]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("(5 episodes, 2-way 2-shot 3-query, transductive BatchNorm, seed 7)")
    assert lines[1].endswith("(5 episodes, 3-way 2-shot 3-query, transductive BatchNorm, seed 7)")


def test_resume_goes_on_and_overwrite_starts_again(run, capsys):
    arguments = [*TRAIN, "--out", str(run)]
    longer = [*arguments, "--steps", "5"]
    assert cli.main(longer) == 2
    assert "already holds a run; add --resume or --overwrite, or choose another" in capsys.readouterr().err
    assert cli.main([*longer, "--resume"]) == 0
    assert load_checkpoint(run / "checkpoint-last.pt")["step"] == 5
    assert cli.main([*longer, "--resume", "--lr", "0.5"]) == 2
    assert "other settings: lr was 0.001, is 0.5; --overwrite starts again" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert load_checkpoint(run / "checkpoint-last.pt")["step"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--root", "x"], "--root: glyphs are computed and have no folder; leave --root out"),
        (
            ["train", "--data", "omniglot"],
            "--data omniglot needs --root DIR, the folder with images_background.zip",
        ),
        (
            ["train", "--data", "omniglot", "--root", "no-such-folder"],
            "--root: root must be the folder that holds",
        ),
        (["train", "--train-ways", "33"], "training episodes: ways must be at most the 32 classes"),
        (
            ["train", "--train-ways", "4", "--shots", "16"],
            "training episodes: shots + queries must be at most",
        ),
        (
            ["train", "--train-ways", "4", "--ways", "20"],
            "validation episodes: ways must be at most the 16 classes",
        ),
        (["train", "--train-ways", "4", "--queries", "20"], "test episodes: shots + queries must be at most"),
        (["train", "--resume", "--overwrite"], "--resume goes on with a run and --overwrite starts it again"),
        (["train", "--record", "no-such-folder/r.json"], "--record: there is no folder no-such-folder"),
        (["train", "--device", "warp"], "--device warp: "),
        (["evaluate", "--checkpoint", "none.pt"], "--checkpoint: there is no file none.pt"),
        (
            ["evaluate", "--checkpoint", "n.pt", "--record", "no-such-folder/r.json"],
            "--record: there is no folder",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"metafast {arguments[0]}: error: ")
    assert message in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--steps", "0"], "argument --steps: expected a positive whole number, got '0'"),
        (["train", "--steps", "many"], "argument --steps: expected a positive whole number, got 'many'"),
        (["train", "--lr", "-1"], "argument --lr: expected a positive number, got '-1'"),
        (["train", "--lr", "nan"], "argument --lr: expected a positive number, got 'nan'"),
        (["train", "--seed", "-1"], "argument --seed: expected a whole number from 0 to 2**63 - 1, got '-1'"),
        (["train", "--episodes", "1"], "argument --episodes: expected at least 2 episodes, got '1'"),
        (["train", "--method", "magic"], "argument --method: invalid choice: 'magic'"),
        (["train", "--wasy", "5"], "unrecognized arguments: --wasy 5"),
        (["evaluate"], "the following arguments are required: --checkpoint"),
        (["learn"], "argument command: invalid choice: 'learn'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_argparse_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_something_else(tmp_path, capsys):
    (tmp_path / "text.pt").write_text("hello")
    assert cli.main(["evaluate", "--checkpoint", str(tmp_path / "text.pt")]) == 2
    assert "--checkpoint: " in (error := capsys.readouterr().err)
    assert "is truncated, damaged or not a checkpoint of metafast" in error
    save_checkpoint(tmp_path / "own.pt", {"step": 1, "model": {}, "settings": {}})
    assert cli.main(["evaluate", "--checkpoint", str(tmp_path / "own.pt")]) == 2
    assert "own.pt was not written by metafast train" in capsys.readouterr().err


def test_a_loss_that_explodes(tmp_path, capsys):
    assert cli.main([*TRAIN, "--steps", "9", "--lr", "1e30", "--out", str(tmp_path)]) == 1
    assert (
        "metafast train: error: the loss is nan at step 2; no checkpoint was saved yet"
        in capsys.readouterr().err
    )


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main([*TRAIN, "--out", str(tmp_path / "file")]) == 1
    assert "metafast train: error: out: expected a folder, got the file" in capsys.readouterr().err


def test_interrupt_of_a_real_process(tmp_path):
    arguments = [sys.executable, "-m", "metafast", *TRAIN, "--steps", "1000000", "--validate-every", "5"]
    process = subprocess.Popen(
        [*arguments, "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoint-last.pt").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "metafast train: stopped after step " in errors
    step = load_checkpoint(tmp_path / "checkpoint-last.pt")["step"]
    assert f"stopped after step {step} of 1000000" in errors


def test_without_a_command_the_help_is_shown(capsys):
    assert cli.main([]) == 2
    assert "train a learner, test it and save both" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"]], ids=["metafast", "train", "evaluate"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert ("examples:" in printed) is bool(command)


def test_doctor_gets_its_arguments(monkeypatch):
    calls = []
    doctor = types.ModuleType("metafast.doctor")
    doctor.main = lambda arguments: calls.append(arguments) or 3
    monkeypatch.setitem(sys.modules, "metafast.doctor", doctor)
    monkeypatch.setattr("metafast.doctor", doctor, raising=False)
    assert cli.main(["doctor", "--verbose"]) == 3
    assert calls == [["--verbose"]]


def test_paths_in_the_recorded_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "train",
        "--root",
        str(tmp_path / "data" / "omniglot"),
        "--out=/somewhere/else/run",
        "--record",
        "a b",
    ]
    assert command_line(arguments) == "metafast train --root data/omniglot --out=run --record 'a b'"
    assert without_absolute_path("data/omniglot") == "data/omniglot"
