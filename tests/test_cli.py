import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch

import metafast
from metafast import cli, config, sources
from metafast.training import load_checkpoint, pictures, save_checkpoint
from metafast.training.result import command_line, without_absolute_path

SMALL = ["--train-ways", "4", "--train-queries", "2", "--channels", "4", "--queries", "2", "--episodes", "4"]
GLYPHS = {"train": (8, 0), "val": (4, 8), "trainval": (12, 0), "test": (6, 12)}
TRAIN = ["train", "--data", "glyphs", *SMALL, "--steps", "3", "--validation-episodes", "4", "--threads", "1"]


@pytest.fixture(autouse=True)
def small_and_fast(monkeypatch):
    monkeypatch.setattr(sources, "GLYPHS", GLYPHS)
    monkeypatch.setattr(pictures, "have_matplotlib", lambda: False)


@pytest.fixture
def drawing(small_and_fast, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(pictures, "have_matplotlib", lambda: True)


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "GLYPHS", GLYPHS)
        patch.setattr(pictures, "have_matplotlib", lambda: False)
        folder = tmp_path_factory.mktemp("trained") / "run"
        assert cli.main([*TRAIN, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it that a test may change."""
    (tmp_path / "run").mkdir()
    for file in trained.iterdir():
        if file.is_file():
            (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "run"


def make_images(root, classes, per_class, size=(20, 16)):
    """A folder of images for each class, each class with a colour of its own."""
    images = pytest.importorskip("PIL.Image")
    generator = numpy.random.default_rng(0)
    for c in range(classes):
        (root / f"class{c:02d}").mkdir(parents=True)
        colour = generator.integers(0, 255, 3)
        for i in range(per_class):
            pixels = (colour + generator.integers(-20, 20, (size[1], size[0], 3))).clip(0, 255)
            images.fromarray(pixels.astype("uint8")).save(root / f"class{c:02d}" / f"{i}.png")
    return root


def error_of(arguments, capsys, code=2):
    capsys.readouterr()
    assert cli.main(arguments) == code
    printed = capsys.readouterr().err
    assert printed.count("\n") >= 1 and "Traceback" not in printed
    return printed


class TestTrain:
    def test_from_end_to_end(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        record = tmp_path / "record.json"
        options = ["--ways", "3", "5", "--test-shots", "1", "2", "--validate-every", "2"]
        options += ["--record", str(record)]
        assert cli.main([*TRAIN, *options]) == 0
        printed = capsys.readouterr().out
        folder = tmp_path / "runs" / "protonet-glyphs"
        result = json.loads((folder / "result.json").read_text())
        assert json.loads(record.read_text()) == result
        assert str(tmp_path) not in record.read_text()
        assert result["command"] == "metafast " + " ".join([*TRAIN, *options[:-1], "record.json"])
        assert result["environment"]["torch"] == torch.__version__
        assert result["environment"]["threads"] == 1
        assert (result["steps"], result["seed"], result["settings"]["channels"]) == (3, 0, 4)
        # Every setting, those that were filled in for the data set too.
        assert result["options"].keys() >= vars(cli._train_parser().parse_args([])).keys()
        assert result["options"]["train_ways"] == 4 and result["options"]["ways"] == [3, 5]
        assert result["fit"]["lr"] == 0.001
        assert result["settings"]["validation"] == {"ways": 5, "shots": 1, "queries": 2, "seed": 0}
        assert result["batch_norm"] == {"train": "batch", "evaluation": "running"}
        last = (folder / "metrics.csv").read_text().splitlines()[-1].split(",")
        assert result["train_seconds"] == round(float(last[4]), 1)
        shapes = [
            (test["ways"], test["shots"], test["queries"], test["episodes"]) for test in result["tests"]
        ]
        assert shapes == [(3, 1, 2, 4), (3, 2, 2, 4), (5, 1, 2, 4), (5, 2, 2, 4)]
        assert all(0 <= test["accuracy"] <= 1 and test["interval_95"] >= 0 for test in result["tests"])
        assert "protonet with Conv4-4 on glyphs: 32 training classes, images 1x28x28, 4-way" in printed
        assert "step 2/3  loss" in printed
        assert f"test {100 * result['tests'][3]['accuracy']:.2f} % +- " in printed
        for name in ("result.json", "metrics.csv", "checkpoint-best.pt"):
            assert str(folder.relative_to(tmp_path) / name) in printed
            assert (folder / name).is_file()

    def test_pictures_are_drawn_and_named(self, tmp_path, capsys, drawing):
        assert cli.main([*TRAIN, "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        for name in ("learning-curve.png", "episode.png"):
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
            assert str(tmp_path / name) in printed

    def test_without_matplotlib_one_line_says_so(self, tmp_path, capsys):
        assert cli.main([*TRAIN, "--out", str(tmp_path)]) == 0
        message = "no pictures drawn: matplotlib is not installed (pip install metafast[train])"
        assert message in capsys.readouterr().out
        assert not list(tmp_path.glob("*.png"))

    def test_same_seed_same_result(self, tmp_path):
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
            assert cli.main([*TRAIN, "--seed", seed, "--out", str(tmp_path / name)]) == 0
        a, b, c = (load_checkpoint(tmp_path / name / "checkpoint-last.pt")["model"] for name in "abc")
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert not torch.equal(a["encoder.encoder.0.0.weight"], c["encoder.encoder.0.0.weight"])

    def test_trainval_has_no_validation_and_says_so(self, tmp_path, capsys):
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
    def test_temperature(self, tmp_path, options, temperature):
        assert cli.main([*TRAIN, *options, "--learn-temperature", "--out", str(tmp_path)]) == 0
        checkpoint = load_checkpoint(tmp_path / "checkpoint-last.pt")
        assert checkpoint["settings"]["temperature"] == temperature
        assert float(checkpoint["model"]["log_temperature"].exp()) == pytest.approx(temperature, rel=0.01)

    def test_the_course_of_training(self, tmp_path):
        course = {
            "schedule": "cosine",
            "warm_up": 1,
            "clip_norm": 0.5,
            "precision": "bfloat16",
            "patience": 3,
        }
        options = [
            part for name, value in course.items() for part in (f"--{name.replace('_', '-')}", str(value))
        ]
        assert cli.main([*TRAIN, *options, "--lr", "0.01", "--out", str(tmp_path)]) == 0
        result = json.loads((tmp_path / "result.json").read_text())
        assert {**result["fit"], **course, "lr": 0.01} == result["fit"]
        rates = [line.split(",")[3] for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
        assert [float(rate) for rate in rates] == pytest.approx([0.01, 0.01, 0.005])

    def test_resume_goes_on_and_overwrite_starts_again(self, run, capsys):
        arguments = [*TRAIN, "--out", str(run)]
        longer = [*arguments, "--steps", "5"]
        assert "already holds a run; add --resume or --overwrite, or choose another" in error_of(
            longer, capsys
        )
        assert cli.main([*longer, "--resume"]) == 0
        assert load_checkpoint(run / "checkpoint-last.pt")["step"] == 5
        error = error_of([*longer, "--resume", "--lr", "0.5", "--train-ways", "5"], capsys)
        assert (
            "other settings: lr was 0.001, is 0.5; train_ways was 4, is 5; give the options of that" in error
        )
        assert "or --overwrite to start again" in error
        assert (
            "steps: " in (error := error_of([*arguments, "--resume"], capsys)) and "at step 5, got 3" in error
        )
        assert cli.main([*arguments, "--overwrite"]) == 0
        assert load_checkpoint(run / "checkpoint-last.pt")["step"] == 3

    def test_a_loss_that_explodes(self, tmp_path, capsys):
        error = error_of([*TRAIN, "--steps", "9", "--lr", "1e30", "--out", str(tmp_path)], capsys, 1)
        assert "metafast train: error: the loss is nan at step 2; no checkpoint was saved yet" in error

    def test_a_folder_that_cannot_be_made(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        error = error_of([*TRAIN, "--out", str(tmp_path / "file")], capsys, 1)
        assert "metafast train: error: out: expected a folder, got the file" in error


class TestEvaluate:
    def test_repeats_the_test_of_the_training(self, trained, tmp_path, capsys):
        tests = json.loads((trained / "result.json").read_text())["tests"]
        record = tmp_path / "again.json"
        arguments = ["evaluate", "--checkpoint", str(trained), "--queries", "2", "--episodes", "4"]
        assert cli.main([*arguments, "--record", str(record)]) == 0
        result = json.loads(record.read_text())
        assert result["tests"] == tests
        assert result["settings"]["metric"] == "sqeuclidean"
        assert "running BatchNorm, seed 0)" in capsys.readouterr().out
        assert cli.main([*arguments, "--record", str(record), "--per-episode"]) == 0
        (test,) = json.loads(record.read_text())["tests"]
        values = test.pop("per_episode")
        assert [test] == tests and len(values) == 4
        assert sum(values) / 4 == pytest.approx(test["accuracy"])

    def test_options(self, trained, capsys):
        arguments = ["evaluate", "--checkpoint", str(trained / "checkpoint-last.pt"), "--split", "val"]
        arguments += ["--ways", "2", "3", "--shots", "2", "--queries", "3", "--episodes", "5", "--seed", "7"]
        assert cli.main([*arguments, "--batch-norm", "transductive"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        assert lines[0].endswith("(5 episodes, 2-way 2-shot 3-query, transductive BatchNorm, seed 7)")
        assert lines[1].endswith("(5 episodes, 3-way 2-shot 3-query, transductive BatchNorm, seed 7)")

    def test_checkpoints_of_something_else(self, tmp_path, capsys):
        assert "--checkpoint is missing: the folder of a run" in error_of(["evaluate"], capsys)
        (tmp_path / "text.pt").write_text("hello")
        error = error_of(["evaluate", "--checkpoint", str(tmp_path / "text.pt")], capsys)
        assert "--checkpoint: " in error and "is truncated, damaged or not a checkpoint of metafast" in error
        save_checkpoint(tmp_path / "own.pt", {"step": 1, "model": {}, "settings": {}})
        error = error_of(["evaluate", "--checkpoint", str(tmp_path / "own.pt")], capsys)
        assert "own.pt was not written by metafast train" in error


class TestAnalyze:
    ARGUMENTS = ("--ways", "3", "--queries", "2", "--episodes", "4", "--threads", "1")

    def test_report_page_and_file(self, run, tmp_path, capsys, drawing):
        arguments = ["analyze", "--checkpoint", str(run), *self.ARGUMENTS, "--vary-ways", "2"]
        arguments += ["--vary-shots", "1", "5"]
        assert cli.main(arguments) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(
            "generalisation of protonet on glyphs, step 3\n3-way 1-shot 2-query where nothing"
        )
        assert "inner steps  ProtoNet has none" in printed
        result = json.loads((run / "generalisation.json").read_text())
        assert result["command"].startswith("metafast analyze --checkpoint ")
        assert str(tmp_path) not in (run / "generalisation.json").read_text()
        assert (result["steps"], result["settings"]["method"]) == (3, "protonet")
        assert [row["shots"] for row in result["by_shots"]] == [1, 5]
        assert [row["ways"] for row in result["by_ways"]] == [2, 3]
        assert [row["classes"] for row in result["by_classes"]] == ["train", "validation", "test"]
        assert result["calibration"]["temperature"]["value"] > 0
        for row in result["by_classes"]:
            assert f"{100 * row['accuracy']:.2f} % +- {100 * row['interval_95']:.2f}" in printed
        width, height = struct.unpack(">II", (run / "generalisation.png").read_bytes()[16:24])
        assert width > height > 1000
        assert f"saved {run / 'generalisation.json'}, {run / 'generalisation.png'}\n" in printed

    def test_another_data_set_and_another_folder(self, trained, tmp_path, capsys):
        insects = make_images(tmp_path / "insects", 4, 4)
        arguments = ["analyze", "--checkpoint", str(trained), *self.ARGUMENTS, "--vary-ways", "3"]
        arguments += ["--vary-shots", "1"]
        arguments += ["--shift-data", "image-folder", "--shift-root", str(insects), "--out", str(tmp_path)]
        assert cli.main(arguments) == 0
        assert "shift: insects - test classes" in capsys.readouterr().out
        (row,) = json.loads((tmp_path / "generalisation.json").read_text())["by_data"]
        assert row["data"] == "insects"
        assert not list(tmp_path.glob("*.png"))

    def test_what_cannot_be(self, trained, tmp_path, capsys):
        arguments = ["analyze", "--checkpoint", str(trained), *self.ARGUMENTS]
        for options, message in (
            (["--vary-shots", "19"], "; choose fewer with --shots, --vary-shots or --queries\n"),
            (["--vary-steps", "1", "2"], "--vary-steps: protonet does not adapt in steps; leave it out"),
            (
                ["--vary-ways", "40"],
                "ways must be at most the 24 classes of the data set, got 40; choose fewer with --ways",
            ),
            (["--shift-data", "cub"], "--shift-data cub needs --shift-root DIR, the folder CUB_200_2011"),
            (["--shift-root", "x"], "--shift-root: there is no --shift-data"),
            (["--out", str(tmp_path / "none")], "--out: there is no folder"),
        ):
            assert message in error_of([*arguments, *options], capsys)


class TestImageFolder:
    def test_from_images_to_a_report(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        make_images(Path("data/birds"), 20, 5)
        train = "train --data image-folder --root data/birds --size 16 --channels 4 --steps 3 --episodes 4 --out birds"
        assert cli.main([*train.split(), "--validation-episodes", "4"]) == 0
        printed = capsys.readouterr().out
        # 13, 3 and 4 of 20 classes; numbers that do not fit are made to.
        assert "on birds: 13 training classes, images 3x16x16, 13-way 1-shot 4-query training" in printed
        assert "validation is 3-way: there are no more validation classes" in printed
        assert "4-way 1-shot 4-query, running BatchNorm" in printed
        evaluate = "evaluate --checkpoint birds --root data/birds --ways 2 --shots 1 2 --episodes 4"
        assert cli.main(evaluate.split()) == 0
        assert capsys.readouterr().out.count("\n") == 2
        analyze = "analyze --checkpoint birds --root data/birds --shift-data glyphs --episodes 4"
        assert cli.main(analyze.split()) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("generalisation of protonet on birds, step 3\n3-way 1-shot 4-query")
        assert "shift: glyphs - test classes" in printed
        everything = "evaluate --checkpoint birds --root data/birds --split all --ways 20 --episodes 4"
        assert cli.main(everything.split()) == 0

    def test_other_classes_than_those_of_the_training(self, tmp_path, capsys, monkeypatch):
        """A random split of other classes could call one that was trained on a test class."""
        monkeypatch.chdir(tmp_path)
        make_images(Path("birds"), 20, 5)
        train = (
            "train --data image-folder --size 16 --channels 4 --episodes 4 --validation-episodes 4 --out run"
        )
        assert cli.main([*train.split(), "--root", "birds", "--steps", "2"]) == 0
        make_images(Path("fish"), 24, 5)
        resumed = [*train.split(), "--root", "fish", "--steps", "4", "--train-ways", "13", "--resume"]
        assert "training_classes was '13, SHA-256" in error_of(resumed, capsys)
        analyze = "analyze --checkpoint run --root fish --episodes 4 --ways 2"
        assert "--root: the classes there are not those of the training" in error_of(analyze.split(), capsys)

    def test_names_of_folders(self, tmp_path, capsys, monkeypatch):
        make_images(tmp_path / "birds", 20, 5)
        make_images(tmp_path / "glyphs", 8, 5)
        monkeypatch.chdir(tmp_path / "birds")
        train = (
            "train --data image-folder --root . --size 16 --channels 4 --steps 1 --episodes 4 --out ../run"
        )
        assert cli.main([*train.split(), "--validation-episodes", "4"]) == 0
        assert "on birds: 13 training classes" in capsys.readouterr().out
        analyze = (
            "analyze --checkpoint ../run --root . --shift-data glyphs image-folder --shift-root ../glyphs"
        )
        error = error_of([*analyze.split(), "--episodes", "4", "--ways", "2"], capsys)
        assert "--shift-root: two of the data sets would be called 'glyphs'; rename the folder" in error
        error = error_of([*train.split(), "--overwrite", "--min-images", "100"], capsys)
        assert "--min-images: expected at most 5, the images of the largest class of image-folder" in error

    def test_small_classes_and_damaged_files(self, tmp_path, capsys):
        root = make_images(tmp_path / "birds", 12, 4)
        train = "train --data image-folder --size 16 --channels 4 --steps 1 --episodes 4 --shots 2 --ways 2"
        train = [
            *train.split(),
            "--queries",
            "2",
            "--validation-episodes",
            "4",
            "--root",
            str(root),
            "--out",
            str(tmp_path / "run"),
        ]
        (root / "class03" / "0.png").write_bytes(b"no image")
        error = error_of(train, capsys)
        assert "class03/0.png" in error and "leave them out with --skip-corrupt" in error
        with pytest.warns(UserWarning, match="are left out"):
            error = error_of([*train, "--skip-corrupt", "--train-queries", "2"], capsys)
        assert (
            "class 'class03' has 3 images, 4 are needed for 2 shots + 2 queries; choose fewer with --shots or"
            in error
        )
        assert "leave out small classes with --min-images 4" in error
        with pytest.warns(UserWarning, match="are left out"):
            assert cli.main([*train, "--skip-corrupt", "--train-queries", "2", "--min-images", "4"]) == 0

    def test_two_data_sets_in_one_form(self, tmp_path, capsys):
        root = make_images(tmp_path / "birds", 20, 6)
        arguments = [*TRAIN, "--data", "glyphs", "image-folder", "--root", str(root), "--tasks", "2"]
        assert cli.main([*arguments, "--ways", "3", "--out", str(tmp_path / "run")]) == 0
        printed = capsys.readouterr().out
        assert "on glyphs and birds: 45 training classes, images 3x28x28" in printed
        assert "test glyphs " in printed and "test image-folder " in printed
        tests = json.loads((tmp_path / "run" / "result.json").read_text())["tests"]
        assert [test["data"] for test in tests] == ["glyphs", "image-folder"]
        arguments = ["evaluate", "--checkpoint", str(tmp_path / "run"), "--episodes", "4", "--queries", "2"]
        assert cli.main([*arguments, "--root", str(root), "--ways", "3"]) == 0
        assert cli.main([*arguments, "--data", "glyphs", "--ways", "3"]) == 0

    def test_grey_images(self, tmp_path, capsys):
        root = make_images(tmp_path / "birds", 20, 6)
        arguments = [*TRAIN, "--data", "image-folder", "--root", str(root), "--size", "16", "--grey"]
        assert cli.main([*arguments, "--ways", "3", "--out", str(tmp_path / "run")]) == 0
        assert "images 1x16x16" in capsys.readouterr().out


class TestWrongUsage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("train --root x", "--root: glyphs is computed and has no folder; leave --root out"),
            (
                "train --data omniglot",
                "--data omniglot needs --root DIR, the folder with images_background.zip",
            ),
            ("train --data omniglot --root no-such-folder", "--root: root must be the folder that holds"),
            ("train --data omniglot glyphs --root a b", "--root: expected 1 of them, for omniglot, got 2"),
            ("train --data glyphs glyphs", "--data: expected different data sets, got glyphs glyphs"),
            ("train --data image-folder --root .", "image-folder: "),
            (
                "train --train-ways 60",
                "training episodes: ways must be at most the 32 classes of the data set, got 60",
            ),
            ("train --train-ways 60", "; choose fewer with --train-ways"),
            (
                "train --train-ways 4 --shots 16 --train-queries 5",
                "training episodes: shots + queries must be at most",
            ),
            ("train --train-ways 4 --ways 25", "test episodes: ways must be at most the 24 classes"),
            ("train --train-ways 4 --queries 20", "test episodes: shots + queries must be at most"),
            (
                "train --train-ways 4 --queries 20",
                "; choose fewer with --queries, or leave out small classes",
            ),
            ("train --resume --overwrite", "--resume goes on with a run and --overwrite starts it again"),
            ("train --split trainval --patience 3", "--patience needs validation classes"),
            ("train --split-seed 3", "--split-seed is for --data image-folder"),
            ("train --schedule cosine --steps 2 --warm-up 2", "--warm-up: expected fewer than the 2 steps"),
            ("train --record no-such-folder/r.json", "--record: there is no folder no-such-folder"),
            ("train --device warp", "--device: warp: "),
            ("evaluate --checkpoint none.pt", "--checkpoint: there is no file none.pt"),
            ("evaluate --checkpoint n.pt --record no-such-folder/r.json", "--record: there is no folder"),
            ("evaluate --checkpoint n.pt --per-episode", "--per-episode writes into the file of --record"),
            ("train --steps 0", "argument --steps: expected a positive whole number, got '0'"),
            ("train --steps many", "argument --steps: expected a positive whole number, got 'many'"),
            ("train --lr -1", "argument --lr: expected a positive number, got '-1'"),
            ("train --lr nan", "argument --lr: expected a positive number, got 'nan'"),
            ("train --decay 1", "argument --decay: expected a number between 0 and 1, got '1'"),
            ("train --size 8", "argument --size: expected a whole number of at least 16 pixels, got '8'"),
            ("train --seed -1", "argument --seed: expected a whole number from 0 to 2**63 - 1, got '-1'"),
            ("train --episodes 1", "argument --episodes: expected at least 2 episodes, got '1'"),
            ("train --ways 1", "argument --ways: expected at least 2 ways, got '1'"),
            ("train --method magic", "argument --method: invalid choice: 'magic'"),
            ("train --data omniglots", "argument --data: invalid choice: 'omniglots' (choose from"),
            ("train --wasy 5", "there is no option --wasy; did you mean --ways?"),
            ("train --train-way=5", "there is no option --train-way; did you mean --train-ways?"),
            ("train --qqqq", "there is no option --qqqq; metafast train --help lists them"),
            ("train glyphs", "unexpected argument 'glyphs'; metafast train takes options only"),
            ("doctor --quiet", "there is no option --quiet; metafast doctor --help lists them"),
        ],
        ids=lambda value: value[:60],
    )
    def test_says_what_to_do(self, arguments, message, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        printed = error_of(arguments.split(), capsys)
        assert printed.startswith(f"metafast {arguments.split()[0]}: error: ")
        assert message in printed
        assert not list(tmp_path.glob("**/*.pt"))

    @pytest.mark.parametrize(
        ("name", "hint"), [("trian", "; did you mean train?"), ("xyz", " (commands: train, ")]
    )
    def test_no_such_command(self, name, hint, capsys):
        assert f"metafast: error: there is no command {name!r}{hint}" in error_of([name], capsys)

    def test_a_split_for_folders_only(self, trained, capsys):
        error = error_of(["evaluate", "--checkpoint", str(trained), "--split", "all"], capsys)
        assert "--split all is for image-folder; glyphs has train, val, trainval, test" in error


class TestConfig:
    @pytest.fixture(autouse=True)
    def toml(self):
        if sys.version_info < (3, 11):
            pytest.importorskip("tomli")

    def options(self, tmp_path, text, *arguments, command="train"):
        path = tmp_path / "options.toml"
        path.write_text(text)
        return cli._options(command, ["--config", str(path), *arguments])

    def test_every_kind_of_option(self, tmp_path):
        found = self.options(
            tmp_path,
            """
            data = ["omniglot", "glyphs"]   # the field's names
            root = "data/omniglot"
            train_ways = 20
            "test-shots" = [1, 5]
            lr = 5e-4
            learn-temperature = true
            sync-batch-norm = false
            """,
        )
        assert (found.data, found.root) == (["omniglot", "glyphs"], [Path("data/omniglot")])
        assert (found.train_ways, found.test_shots, found.lr) == (20, [1, 5], 5e-4)
        assert (found.learn_temperature, found.sync_batch_norm, found.grey) == (True, False, False)
        assert found.steps == 10000

    def test_every_option_can_be_overridden(self, tmp_path):
        found = self.options(
            tmp_path,
            'ways = [5, 20]\nlr = 1.0\ngrey = true\nresume = true\nmetric = "cosine"\nsplit = "trainval"',
            *[
                "--ways",
                "3",
                "--lr",
                "2",
                "--no-grey",
                "--no-resume",
                "--metric",
                "euclidean",
                "--split",
                "train",
            ],
        )
        assert (found.ways, found.lr, found.grey, found.resume) == ([3], 2.0, False, False)
        assert (found.metric, found.split) == ("euclidean", "train")

    def test_tables_are_for_one_command(self, tmp_path):
        text = 'root = "data"\nseed = 1\n[train]\nsteps = 7\nseed = 2\n[evaluate]\ncheckpoint = "runs/a"\n'
        train = self.options(tmp_path, text)
        evaluate = self.options(tmp_path, text, command="evaluate")
        assert (train.root, train.seed, train.steps) == ([Path("data")], 2, 7)
        assert (evaluate.root, evaluate.test_seed, evaluate.checkpoint) == ([Path("data")], 1, Path("runs/a"))

    def test_a_run_from_a_file(self, tmp_path, capsys):
        pairs = zip(SMALL[::2], SMALL[1::2], strict=True)
        text = "\n".join(f"{name[2:]} = {value}" for name, value in pairs)
        (tmp_path / "options.toml").write_text(f"{text}\nsteps = 9\nvalidation-episodes = 4\nthreads = 1\n")
        arguments = ["train", "--config", str(tmp_path / "options.toml"), "--steps", "2"]
        assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 0
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        assert (result["steps"], result["options"]["train_ways"], result["options"]["config"]) == (
            2,
            4,
            "options.toml",
        )

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("wasy = 5", "metafast train has no option 'wasy'; did you mean ways?"),
            ("[train]\nsteeps = 5", "metafast train has no option 'steeps' in [train]; did you mean steps?"),
            (
                "[evaluate]\nsteps = 5",
                "metafast evaluate has no option 'steps' in [evaluate]; it is one of metafast train",
            ),
            ("checkpoint = 'a'", "it is one of metafast evaluate, so put it into a table [evaluate]"),
            ("[trian]\nsteps = 5", "there is no command for the table [trian]; expected [train], [evaluate]"),
            ("config = 'a'", "metafast train has no option 'config', which is for the command line"),
            ("no-grey = true", "metafast train has no option 'no-grey'"),
            (
                "steps = 'many'",
                "options.toml: argument --steps: expected a positive whole number, got 'many'",
            ),
            ("steps = true", "steps: expected a number or text, got True"),
            ("steps = [1, 2]", "steps: expected a number or text, got [1, 2]"),
            ("ways = []", "ways: expected at least one entry, got []"),
            ("ways = [[5]]", "ways: expected a number or text, or a list of them, got [[5]]"),
            ("grey = 1", "grey: expected true or false, got 1"),
            ("data = 'omniglots'", "argument --data: invalid choice: 'omniglots'"),
            ("steps 5", "options.toml is no TOML: "),
        ],
        ids=lambda value: value.replace("\n", " ")[:40],
    )
    def test_what_is_wrong_is_named(self, tmp_path, text, message, capsys):
        (tmp_path / "options.toml").write_text(text)
        error = error_of(["train", "--config", str(tmp_path / "options.toml")], capsys)
        assert message in error
        assert error.count("options.toml") == 1

    def test_no_file(self, tmp_path, capsys):
        error = error_of(["train", "--config", str(tmp_path / "none.toml")], capsys)
        assert "--config: cannot read" in error and "(No such file or directory)" in error

    def test_without_a_reader_of_toml(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)
        (tmp_path / "options.toml").write_text("steps = 5")
        error = error_of(["train", "--config", str(tmp_path / "options.toml")], capsys)
        assert "--config needs Python 3.11 or later, or the package tomli (pip install tomli)" in error


class TestBench:
    def test_calls_the_benchmarks_of_the_source_tree(self, monkeypatch):
        from benchmarks import ratios

        calls = []
        monkeypatch.setattr(ratios, "main", lambda arguments: calls.append(arguments) or 3)
        assert cli.main(["bench"]) == 3
        assert cli.main(["bench", "--full", "--only", "a", "b", "--threads", "1"]) == 3
        assert calls == [["--quick"], ["--only", "a", "--only", "b", "--threads", "1"]]

    def test_an_installed_package_says_where_they_are(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(
            metafast, "__file__", str(tmp_path / "site-packages" / "metafast" / "__init__.py")
        )
        error = error_of(["bench"], capsys)
        assert "the benchmarks are part of the source tree, not of the installed package" in error


class TestHelp:
    def test_without_a_command_it_is_shown(self, capsys):
        assert cli.main([]) == 2
        printed = capsys.readouterr().out
        assert "train     train a learner, test it and save both" in printed and "examples:" in printed
        assert cli.main(["--help"]) == 0
        assert capsys.readouterr().out == printed

    @pytest.mark.parametrize("command", list(cli.COMMANDS))
    def test_each_command_has_examples_that_it_understands(self, command, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert f"usage: metafast {command}" in printed
        examples = re.findall(
            r"^  (?:torchrun .*)?metafast (\w+) ?(.*)$", printed.partition("examples:")[2], re.MULTILINE
        )
        assert examples
        for name, arguments in examples:
            assert name == command
            given = arguments.split()
            if "--config" in given:
                given = given[2:]
            cli._options(name, given)

    def test_the_readme_has_commands_that_are_understood(self):
        text = (Path(__file__).parents[1] / "README.md").read_text().replace("\\\n", " ")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        commands = re.findall(r"^metafast (\w+) ?([^#\n]*)", "\n".join(blocks), re.MULTILINE)
        assert {name for name, _ in commands} >= {"train", "evaluate", "doctor"}
        for name, arguments in commands:
            if "--config" not in arguments:
                cli._options(name, arguments.split())

    def test_every_option_has_a_text(self):
        for command in cli.COMMANDS.values():
            for action in command.parser()._actions:
                assert action.help, action.option_strings

    def test_version(self, capsys):
        assert cli.main(["--version"]) == 0
        assert re.fullmatch(r"metafast \d+\.\d+\.\d+\n", capsys.readouterr().out)

    def test_doctor_runs(self, monkeypatch):
        monkeypatch.setattr(cli.doctor, "main", lambda options: 7 if options.model is None else 0)
        assert cli.main(["doctor"]) == 7


#: The command line as a process of its own, with few classes and without pictures.
PROGRAM = f"""
import sys
from metafast import cli, sources
from metafast.training import pictures
sources.GLYPHS = {GLYPHS}
pictures.have_matplotlib = lambda: False
sys.exit(cli.main())
"""


class TestProcesses:
    def test_interrupt_without_a_terminal(self, tmp_path):
        arguments = [sys.executable, "-c", PROGRAM, *TRAIN, "--steps", "1000000", "--validate-every", "5"]
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
        step = load_checkpoint(tmp_path / "checkpoint-last.pt")["step"]
        # No progress bar, no traceback: only what happened.
        lines = [line for line in errors.splitlines() if line and not line.startswith("stopping")]
        assert len(lines) == 1
        assert lines[0].startswith(f"metafast train: stopped after step {step} of 1000000; ")

    @pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals need a POSIX system")
    def test_a_terminal_shows_progress(self, tmp_path):
        pytest.importorskip("tqdm")
        import fcntl
        import pty
        import termios

        main, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
        arguments = [sys.executable, "-c", PROGRAM, *TRAIN, "--steps", "60", "--out", str(tmp_path)]
        process = subprocess.Popen(arguments, stdout=terminal, stderr=terminal)
        os.close(terminal)
        shown = b""
        # Linux says by an error that the other end is closed.
        with contextlib.suppress(OSError):
            while part := os.read(main, 4096):
                shown += part
        os.close(main)
        assert process.wait(120) == 0
        text = shown.decode()
        assert re.search(
            r"training: +\d+%.*/60 \[\d\d:\d\d<[\d?:]+.*episodes/s, loss \d.*, accuracy \d", text
        )
        assert re.search(r"validation: +\d+%", text)
        assert re.search(r"step 60/60  loss .*  validation .* best so far\r\n", text)


def test_paths_in_the_recorded_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = str(tmp_path / "data" / "omniglot")
    arguments = ["train", "--root", root, "--out=/somewhere/else/run", "--record", "a b"]
    assert command_line(arguments) == "metafast train --root data/omniglot --out=run --record 'a b'"
    assert without_absolute_path("data/omniglot") == "data/omniglot"
