"""The methods of the command line, and sine waves."""

import json

import pytest
import torch

from metafast import cli, sources
from metafast.methods import METHODS, OPTIONS
from metafast.training import load_checkpoint, pictures

COMMON = [
    "--steps",
    "3",
    "--validate-every",
    "2",
    "--validation-episodes",
    "4",
    "--threads",
    "1",
    "--episodes",
    "4",
]
IMAGES = ["train", "--data", "glyphs", "--size", "16", "--queries", "2", *COMMON]
GLYPHS = [*IMAGES, "--train-queries", "2"]
WAVES = ["train", "--data", "sinusoid", "--hidden", "6", "4", "--queries", "20", *COMMON]
SMALL = {
    "protonet": ["--channels", "4", "--train-ways", "4"],
    "anil": ["--channels", "4", "--train-ways", "4", "--tasks", "2", "--learn-inner-lr"],
    "r2d2": ["--channels", "4", "--train-ways", "4", "--ways", "3"],
    "matching": ["--channels", "4", "--train-ways", "4", "--full-context", "--learn-scale"],
    "relation": ["--channels", "4", "--train-ways", "4", "--size", "22"],
    "feat": ["--channels", "4", "--train-ways", "4", "--tasks", "2", "--heads", "2", "--dropout", "0"],
    "baseline": ["--channels", "4", "--tasks", "3", "--inner-epochs", "2"],
    "baseline-plus-plus": ["--channels", "4", "--tasks", "3", "--inner-epochs", "2", "--scale", "3"],
    "simpleshot": ["--channels", "4", "--tasks", "3"],
    "maml": [
        "--hidden",
        "6",
        "--train-ways",
        "4",
        "--tasks",
        "2",
        "--activation",
        "tanh",
        "--init-std",
        "0.3",
    ],
    "metasgd": ["--hidden", "6", "--train-ways", "4", "--tasks", "2", "--first-order"],
    "boil": ["--channels", "4", "--train-ways", "4", "--tasks", "2"],
    "maml++": ["--channels", "4", "--train-ways", "4", "--tasks", "2", "--inner-batch-norm", "per_step"],
    "reptile": ["--channels", "4", "--train-ways", "4", "--tasks", "2", "--inner-batch", "3"],
    "protomaml": ["--channels", "4", "--train-ways", "4", "--tasks", "2", "--recompute"],
}


@pytest.fixture(autouse=True)
def small_and_fast(monkeypatch):
    monkeypatch.setattr(
        sources, "GLYPHS", {"train": (8, 0), "val": (4, 8), "trainval": (12, 0), "test": (6, 12)}
    )
    monkeypatch.setattr(pictures, "have_matplotlib", lambda: False)


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def refused(arguments, capsys):
    capsys.readouterr()
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"metafast {arguments[0]}: error: ")
    return printed


@pytest.mark.parametrize("method", METHODS)
def test_images_from_training_to_evaluation(method, tmp_path, capsys):
    train = [*(IMAGES if METHODS[method].pretraining else GLYPHS), "--method", method, *SMALL[method]]
    assert cli.main([*train, "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    own = METHODS[method].options
    assert {name for name in OPTIONS if name in result["settings"]} == own.keys()
    assert all(result["options"][name] is None for name in OPTIONS if name not in own)
    (test,) = result["tests"]
    assert test["ways"] == (3 if method == "r2d2" else 4 if METHODS[method].head else 5)
    assert test.get("inner_steps") == own.get("inner_steps")
    record = tmp_path / "again.json"
    arguments = ["evaluate", "--checkpoint", str(tmp_path / "run"), "--queries", "2", "--episodes", "4"]
    if method == "r2d2":
        arguments += ["--ways", "3"]
    assert cli.main([*arguments, "--record", str(record)]) == 0
    assert json.loads(record.read_text())["tests"] == [test]
    if METHODS[method].head:
        error = refused([*arguments, "--ways", "5"], capsys)
        assert (
            f"--ways: {method} has a head for 4 classes from training (--train-ways), so all episodes are 4"
            in error
        )
    if "inner_steps" in own:
        assert cli.main([*arguments, "--test-steps", "0", "2"]) == 0
        printed = capsys.readouterr().out
        assert "test after 0 inner steps " in printed and "test after 2 inner steps " in printed
    else:
        error = refused([*arguments, "--test-steps", "2"], capsys)
        assert f"--test-steps: {method} does not adapt in steps; leave it out" in error


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.waves])
def test_sine_waves_from_training_to_evaluation(method, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(pictures, "have_matplotlib", lambda: True)
    record, run = tmp_path / "record.json", tmp_path / "run"
    train = [
        *WAVES,
        "--method",
        method,
        "--frequency",
        "0.8",
        "1.2",
        "--schedule",
        "step",
        "--test-steps",
        "0",
        "1",
        "3",
        "--out",
        str(run),
    ]
    assert cli.main([*train, "--record", str(record)]) == 0
    printed = capsys.readouterr().out
    assert (
        f"{method} with hidden layers of 6 4 on sinusoid: waves of frequency 0.8 to 1.2, 10-shot 10-query"
        in printed
    )
    assert "test after 1 inner step MSE " in printed and "test after 3 inner steps MSE " in printed
    result = json.loads(record.read_text())
    assert [(test["inner_steps"], test["shots"], test["queries"]) for test in result["tests"]] == [
        (0, 5, 20), (1, 5, 20), (3, 5, 20),
    ]  # fmt: skip
    assert all(test["mse"] > 0 and test["interval_95"] > 0 for test in result["tests"])
    assert result["options"]["tasks"] == METHODS[method].tasks and result["settings"]["frequency"] == [
        0.8,
        1.2,
    ]
    assert result["best_validation_loss"] > 0 and result["best_validation_accuracy"] is None
    for name in ("learning-curve.png", "adaptation.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG") and str(run / name) in printed
    evaluation = [
        "evaluate",
        "--checkpoint",
        str(run),
        "--queries",
        "20",
        "--episodes",
        "4",
        "--record",
        str(record),
    ]
    assert cli.main([*evaluation, "--test-steps", "0", "1", "3"]) == 0
    assert json.loads(record.read_text())["tests"] == result["tests"]
    assert cli.main([*evaluation, "--shots", "5", "10"]) == 0
    tests = json.loads(record.read_text())["tests"]
    usual = METHODS[method].options["inner_steps"]
    assert [(test["shots"], test["inner_steps"]) for test in tests] == [(5, usual), (10, usual)]
    assert cli.main([*train, "--steps", "4", "--resume"]) == 0
    assert load_checkpoint(run / "checkpoint-last.pt")["step"] == 4


def test_meta_sgd_trains_its_rates_from_one_draw(tmp_path):
    drawn = []
    for seed in ("1", "2"):
        run = tmp_path / seed
        arguments = [*WAVES, "--method", "metasgd", "--seed", seed, "--lr", "1e-30", "--out", str(run)]
        assert cli.main(arguments) == 0
        model = load_checkpoint(run / "checkpoint-last.pt")["model"]
        names = [name for name in model if "rates" in name]
        rates = torch.cat([model[name].flatten() for name in names])
        assert len(names) == 6 and rates.unique().numel() == 1
        drawn.append(float(rates[0]))
    assert drawn[0] != drawn[1]
    assert cli.main([*WAVES, "--method", "metasgd", "--inner-lr", "0.02", "--out", str(tmp_path / "3")]) == 0
    model = load_checkpoint(tmp_path / "3" / "checkpoint-last.pt")["model"]
    rates = torch.cat([model[name].flatten() for name in model if "rates" in name])
    assert rates.unique().numel() > 1
    torch.testing.assert_close(rates, torch.full_like(rates, 0.02), rtol=0, atol=0.004)


def test_the_splits_of_sine_waves_share_none():
    amplitudes = [
        float(sources.sinusoids(split, 5, 5, 1, 0, [1.0]).single_plan(0).amplitude[0])
        for split in sources.SINUSOID_SEEDS
    ]
    assert len(set(amplitudes)) == 3
    one = sources.sinusoids("test", 5, 5, 3, 7, [0.8, 1.2]).plan(0)
    assert len(set(one.frequency)) == 3 and all(0.8 <= value <= 1.2 for value in one.frequency)


def test_the_report_of_a_learner_with_a_head(tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main([*GLYPHS, "--method", "anil", *SMALL["anil"], "--out", str(run)]) == 0
    analyze = ["analyze", "--checkpoint", str(run), "--queries", "2", "--episodes", "4", "--vary-shots", "1"]
    assert cli.main([*analyze, "--vary-steps", "0", "2"]) == 0
    report = json.loads((run / "generalisation.json").read_text())
    assert [point["ways"] for point in report["by_ways"]] == [4]
    assert [point["steps"] for point in report["by_steps"]] == [0, 2, 5]
    assert "one number of ways: ANIL has a head for 4 classes" in report["notes"]
    assert "has a head for 4 classes" in refused([*analyze, "--vary-ways", "2", "4"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--method anil --metric cosine",
            "--metric is an option of protonet, feat, simpleshot; anil has no use for it",
        ),
        (
            "--method anil --no-learn-temperature",
            "--learn-temperature is an option of protonet; anil has no use",
        ),
        (
            "--method protonet --inner-lr 0.1",
            "--inner-lr is an option of baseline, baseline-plus-plus, anil, maml, metasgd, boil, maml++, reptile, "
            "protomaml; protonet has no use",
        ),
        (
            "--method relation --size 16",
            "--size: images: expected at least 22 x 22, got 16 x 16",
        ),
        (
            "--method r2d2 --inner-steps 3",
            "--inner-steps is an option of anil, maml, metasgd, boil, maml++, reptile, protomaml; r2d2 has no use",
        ),
        (
            "--method protonet --backbone conv4",
            "--backbone is an option of maml, metasgd, boil, maml++, reptile, protomaml; protonet has no use",
        ),
        ("--method maml --channels 8", "--channels: --backbone mlp has no use for it"),
        ("--method maml --backbone conv4 --hidden 8", "--hidden: --backbone conv4 has no use for it"),
        (
            "--method maml --backbone conv4 --batch-norm running",
            "--batch-norm: expected 'transductive', by which this MAML normalises, got 'running'",
        ),
        (
            "--method maml --backbone conv4 --data sinusoid",
            "--backbone conv4 is for images, and sinusoid has none",
        ),
        (
            "--method maml --inner-batch-norm per_step",
            "--inner-batch-norm per_step is of maml++; maml has no statistics of each step",
        ),
        (
            "--method reptile --first-order",
            "--first-order is an option of anil, maml, metasgd, boil, maml++, protomaml; reptile has no use",
        ),
        (
            "--method simpleshot --train-ways 5",
            "--train-ways: simpleshot is trained on single images of all classes, not on episodes; leave it out",
        ),
        ("--method feat --dropout 1", "argument --dropout: expected a number from 0 to below 1, got '1'"),
        (
            "--method feat --balance -1",
            "argument --balance: expected a number that is not negative, got '-1'",
        ),
        ("--method maml --learn-inner-lr", "--learn-inner-lr is an option of anil; maml has no use for it"),
        ("--method anil --ways 5 7 --train-ways 5", "--ways: anil has a head for 5 classes from training"),
        ("--method r2d2 --test-steps 3", "--test-steps: r2d2 does not adapt in steps; leave it out"),
        (
            "--data sinusoid",
            "--data sinusoid is regression, which needs --method maml or metasgd or boil or maml++ or reptile, got",
        ),
        (
            "--data sinusoid glyphs --method maml",
            "--data: sinusoid is regression and does not go together with",
        ),
        (
            "--data sinusoid --method maml --ways 5",
            "--ways: sinusoid has no classes and no images; leave it out",
        ),
        (
            "--data sinusoid --method maml --root x",
            "--root: sinusoid has no classes and no images; leave it out",
        ),
        (
            "--data sinusoid --method maml --min-images 2",
            "--min-images: sinusoid has no classes and no images",
        ),
        ("--data sinusoid --method maml --split trainval", "--split trainval: sinusoid has train, val, test"),
        (
            "--data sinusoid --method maml --frequency 2 1",
            "--frequency: expected one number, or the lowest and",
        ),
        ("--data glyphs --frequency 2", "--frequency is for --data sinusoid"),
        ("--method maml --inner-lr -1", "argument --inner-lr: expected a positive number, got '-1'"),
    ],
)
def test_options_that_do_not_apply(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(["train", *arguments.split()], capsys)
    assert not list(tmp_path.iterdir())


def test_checkpoints_and_other_data(tmp_path, capsys):
    waves, images = tmp_path / "waves", tmp_path / "images"
    assert cli.main([*WAVES, "--method", "maml", "--out", str(waves)]) == 0
    assert cli.main([*GLYPHS, "--method", "maml", *SMALL["maml"], "--out", str(images)]) == 0
    error = refused(["evaluate", "--checkpoint", str(waves), "--data", "glyphs"], capsys)
    assert "--data: the checkpoint was trained on sinusoid, got glyphs" in error
    error = refused(["evaluate", "--checkpoint", str(images), "--data", "sinusoid"], capsys)
    assert "--data: the checkpoint was trained on glyphs, got sinusoid" in error
    assert "--split all: sinusoid has train, val, test" in refused(
        ["evaluate", "--checkpoint", str(waves), "--split", "all"], capsys
    )
    assert "sinusoid is regression; the report is on classes, so use metafast evaluate" in refused(
        ["analyze", "--checkpoint", str(waves)], capsys
    )


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.pretraining])
def test_pretraining_on_single_images(method, tmp_path, capsys):
    """Gone on with exactly; the base classes are those of the training."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    train = [*IMAGES, "--method", method, *SMALL[method], "--schedule", "constant"]
    assert cli.main([*train, "--out", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "32 training classes, images 1x16x16, pre-training on 3 a step, batch statistics" in printed
    settings = load_checkpoint(run / "checkpoint-best.pt")["settings"]
    assert settings["base_classes"] == 32 and settings["train_ways"] is settings["shots"] is None
    assert cli.main([*train, "--steps", "5", "--resume", "--out", str(run)]) == 0
    assert cli.main([*train, "--steps", "5", "--out", str(whole)]) == 0
    one, other = (load_checkpoint(folder / "checkpoint-last.pt")["model"] for folder in (run, whole))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert ("feature_mean" in one) == (method == "simpleshot")
    error = refused([*train, "--tasks", "4", "--resume", "--out", str(run)], capsys)
    assert "tasks was 3, is 4" in error


def test_an_encoder_of_another_run(tmp_path, capsys):
    """It is what training begins with, and what a run that goes on has begun with."""
    first, other, run = tmp_path / "first", tmp_path / "other", tmp_path / "run"
    for out, seed in ((first, "0"), (other, "1")):
        given = [*IMAGES, "--method", "baseline", *SMALL["baseline"], "--seed", seed]
        assert cli.main([*given, "--out", str(out)]) == 0
    train = [*GLYPHS, "--method", "feat", *SMALL["feat"], "--lr", "1e-12", "--schedule", "constant"]
    train += ["--seed", "5", "--out", str(run)]
    assert cli.main([*train, "--encoder-from", str(first)]) == 0
    begun, found = (load_checkpoint(out / "checkpoint-best.pt")["model"] for out in (first, run))
    names = [name for name in begun if name.startswith("encoder.") and name.endswith("weight")]
    assert names
    for name in names:
        torch.testing.assert_close(found[name], begun[name], rtol=0, atol=1e-9)
    resume = [*train, "--steps", "4", "--resume", "--encoder-from"]
    assert "encoder_from was 'SHA-256" in refused([*resume, str(other)], capsys)
    assert cli.main([*resume, str(first / "checkpoint-best.pt")]) == 0
    for arguments, message in (
        (["--method", "feat", "--encoder-from", str(tmp_path / "none")], "--encoder-from: there is no file"),
        (
            ["--method", "maml", "--backbone", "conv4", "--encoder-from", str(first)],
            "--encoder-from: maml has no encoder that could be another's",
        ),
        (
            ["--method", "feat", "--channels", "8", "--train-ways", "4", "--encoder-from", str(first)],
            "checkpoint-best.pt has another encoder (",
        ),
    ):
        assert message in refused([*GLYPHS, *arguments, "--out", str(tmp_path / "no")], capsys)


def test_the_report_of_a_pretrained_learner(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "have_matplotlib", lambda: True)
        assert cli.main([*IMAGES, "--method", "simpleshot", *SMALL["simpleshot"], "--out", str(run)]) == 0
    assert (run / "learning-curve.png").is_file() and (run / "episode.png").is_file()
    analyze = ["analyze", "--checkpoint", str(run), "--episodes", "4", "--queries", "2", "--ways", "3"]
    assert cli.main([*analyze, "--vary-ways", "2", "3", "--vary-shots", "1", "2"]) == 0
    report = json.loads((run / "generalisation.json").read_text())
    assert [point["ways"] for point in report["by_ways"]] == [2, 3]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            "--method maml --backbone conv4 --channels 4 --recompute",
            "maml with Conv4-4 on glyphs",
        ),
        (
            "--method metasgd --backbone mlp-batchnorm --hidden 6 5",
            "metasgd with hidden layers of 6 5 on glyphs",
        ),
    ],
)
def test_maml_of_a_backbone(options, text, tmp_path, capsys):
    """From training to evaluation, with statistics of each episode."""
    run = tmp_path / "run"
    given = [*options.split(), "--tasks", "2", "--train-ways", "4"]
    assert cli.main([*GLYPHS, *given, "--out", str(run)]) == 0
    printed = capsys.readouterr().out
    assert text in printed and "transductive BatchNorm in the inner loop" in printed
    assert cli.main(["evaluate", "--checkpoint", str(run), "--episodes", "4", "--test-steps", "0", "3"]) == 0
    printed = capsys.readouterr().out
    assert "after 3 inner steps " in printed and "transductive BatchNorm" in printed
