"""Command lines: the values that flags take, help texts, and optimized Python."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from revnet_tf import memory, models
from training import evaluate, export, train
from training.recipe import ResNet, flags
from training.recipes import RECIPES

ROOT = Path(__file__).parents[2]
NUMBERS = (
    "classes num-blocks channels global-batch-size learning-rate train-steps "
    "image-size weight-decay pad decay-steps decay-factor warmup-steps momentum "
    "fraction-bits seed save-every monitor memory-budget"
).split()
MAY_BE_0 = "weight-decay pad warmup-steps momentum fraction-bits seed".split()


CHOICE = {"warmup-steps": ["--schedule", "cosine"]}
TINY = "--num-blocks 1 --channels 8 8 --train-steps 2 --global-batch-size 200".split()


@pytest.fixture(autouse=True)
def fresh_keras():
    """Replaces the reset of Keras, which these many short tests do not need."""


def refused(capsys, main, *argv):
    """Returns the line on stderr of a program that refuses its flags."""
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in argv])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e999", 50 * "9", 400 * "9"])
@pytest.mark.parametrize("flag", NUMBERS)
def test_negative_huge_and_no_numbers_are_refused_in_one_line(flag, value, capsys):
    line = refused(capsys, train.parse, *CHOICE.get(flag, []), f"--{flag}", value)
    assert "unexpected" not in line
    assert flag in line or flag.replace("-", "_") in line


@pytest.mark.parametrize("flag", NUMBERS)
def test_0_is_refused_where_it_means_nothing(flag, capsys):
    if flag in MAY_BE_0:
        _, _, recipe, _ = train.parse([*CHOICE.get(flag, []), f"--{flag}", "0"])
        assert recipe.values()[flag.replace("-", "_")] == 0
    else:
        line = refused(capsys, train.parse, f"--{flag}", "0")
        assert flag in line or flag.replace("-", "_") in line


@pytest.mark.parametrize("value", ["-1 2", "2 0", "2 nan", f"2 {30 * '9'}"])
@pytest.mark.parametrize("flag", ["num-blocks", "channels", "decay-steps"])
def test_every_element_of_a_list_is_checked(flag, value, capsys):
    line = refused(capsys, train.parse, f"--{flag}", *value.split())
    assert flag in line or flag.replace("-", "_") in line


@pytest.mark.parametrize(
    "main, argv",
    [
        (train.main, ["--run-dir", ""]),
        (train.main, ["--data-dir="]),
        (evaluate.main, [""]),
        (evaluate.main, ["run", "--data-dir", ""]),
        (export.main, [""]),
        (export.main, ["run", "--output", ""]),
        (export.main, ["run", "--data-dir", ""]),
    ],
)
def test_path_of_an_unset_variable_is_refused(main, argv, capsys):
    line = refused(capsys, main, *argv)
    assert "expected a path, received an empty string" in line


@pytest.mark.parametrize("flag", ["--monitor 5", "--memory-budget 1GB"])
@pytest.mark.parametrize(
    "network", ["--no-recompute", "--no-reversible", "--recipe cifar10_resnet32"]
)
def test_flag_that_needs_reconstruction_is_refused_without_it(flag, network, capsys):
    line = refused(capsys, train.parse, *flag.split(), *network.split())
    assert f"{flag.split()[0]}: this network reconstructs no activations" in line


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a run of two steps without an export, and its output."""
    run_dir, out = tmp_path_factory.mktemp("runs") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(export, "export", lambda *_: None)
        train.main(["--run-dir", str(run_dir), *TINY])
    return run_dir, out.getvalue()


@pytest.mark.parametrize("data_dir", ["folder", "none"])
def test_data_dir_of_the_digits_is_refused(data_dir, tmp_path, finished_run, capsys):
    finished_run, _ = finished_run
    (tmp_path / "folder").mkdir()
    flags = ["--data-dir", tmp_path / data_dir]
    for main, argv in (
        (train.main, ["--run-dir", tmp_path / "run"]),
        (evaluate.main, [finished_run]),
        (export.main, [finished_run, "--format", "litert_int8"]),
    ):
        line = refused(capsys, main, *argv, *flags)
        assert "the digits are part of scikit-learn; leave --data-dir out" in line
    assert not (tmp_path / "run").exists()


def test_decay_steps_beyond_the_end_are_named(finished_run):
    _, out = finished_run
    assert "its learning rate does not decay there: [560, 784]" in out


def test_run_ends_with_the_activation_memory_of_a_step(finished_run):
    _, out = finished_run
    network = models.RevNet(
        (1,),
        (8, 8),
        input_shape=(8, 8, 1),
        classes=10,
        classifier_activation=None,
        kernel_regularizer="l2",
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(keras.optimizers.SGD(0.1, 0.9), loss)
    sizes = []
    for recompute in (True, False):
        for layer in memory.recomputing_layers(network):
            layer.recompute = recompute
        sizes.append(memory.estimate(network, 200).activation_bytes / 1e6)
    assert sizes[0] < sizes[1]
    assert out.splitlines()[-2:] == [
        f"activations    {sizes[0]:.2f} MB a step if reconstructed, by estimate",
        f"activations    {sizes[1]:.2f} MB a step if stored, by estimate",
    ]


@pytest.mark.parametrize(
    "decay_steps, unreached",
    [("", []), ("8 9", []), ("8 10", [10]), ("11 12", [11, 12])],
)
def test_decay_step_is_reached_if_a_step_follows_it(decay_steps, unreached):
    flags = ["--train-steps", "10", "--decay-steps", *decay_steps.split()]
    _, _, recipe, _ = train.parse(flags)
    assert recipe.schedule.unreached_steps(recipe.train_steps) == unreached


def test_data_dir_of_a_format_that_needs_no_data_is_refused(tmp_path, capsys):
    for file_format in ("saved_model", "litert", "onnx"):
        flags = ["--format", file_format, "--data-dir", tmp_path]
        line = refused(capsys, export.main, tmp_path, *flags)
        assert "only --format litert_int8 reads a data set" in line


def python(*argv):
    return subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
    )


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    out = capsys.readouterr().out
    assert "--global-batch-size N images per step, over all" in " ".join(out.split())
    # Without spaces: argparse breaks words at their hyphens.
    out = "".join(out.split())
    for name, (_, help_text, _) in flags().items():
        assert "--" + name.replace("_", "-") in out
        assert "".join(help_text.split()) in out


def test_every_field_is_a_flag():
    argv = (
        "--dataset cifar100 --classes 7 --reversible --num-blocks 1 2 --channels 2 4 6 "
        "--bottleneck --no-recompute --fraction-bits 14 --global-batch-size 3 "
        "--learning-rate 0.5 --schedule cosine --warmup-steps 3 --momentum 0.8 "
        "--weight-decay 0.7 --train-steps 4 --pad 5 --flip --test-in-mean --seed 6 "
        "--image-size 24 --precision mixed_float16 --no-jit --deterministic "
        "--standardize"
    ).split()
    _, name, recipe, _ = train.parse(argv)
    assert name == "digits_revnet"
    assert recipe.values() == {
        "dataset": "cifar100",
        "classes": 7,
        "reversible": True,
        "num_blocks": (1, 2),
        "channels": (2, 4, 6),
        "bottleneck": True,
        "recompute": False,
        "fraction_bits": 14,
        "global_batch_size": 3,
        "learning_rate": 0.5,
        "schedule": "cosine",
        "warmup_steps": 3,
        "momentum": 0.8,
        "weight_decay": 0.7,
        "train_steps": 4,
        "image_size": 24,
        "pad": 5,
        "flip": True,
        "test_in_mean": True,
        "standardize": True,
        "seed": 6,
        "precision": "mixed_float16",
        "jit": False,
        "deterministic": True,
    }
    found = recipe.values().keys()
    for other in ("cifar10_irevnet163", "brain_revunet"):
        found |= RECIPES[other].values().keys()
    assert flags().keys() == found | {"decay_steps"}
    _, _, recipe, _ = train.parse(["--decay-steps", "1", "2", "--no-reversible"])
    assert (recipe.schedule.decay_steps, type(recipe.network)) == ((1, 2), ResNet)


@pytest.mark.parametrize(
    "argv, flag, kind, others",
    [
        (
            "--recipe cifar10_resnet32 --fraction-bits 14",
            "--fraction-bits",
            "ResNet",
            1,
        ),
        ("--recipe cifar10_resnet32 --recompute", "--recompute", "ResNet", 1),
        ("--no-reversible --no-recompute", "--recompute", "ResNet", 1),
        ("--warmup-steps 5", "--warmup-steps", "Piecewise", 0),
        ("--schedule cosine --decay-steps 5", "--decay-steps", "Cosine", 1),
        ("--schedule cosine --decay-steps", "--decay-steps", "Cosine", 1),
        ("--recipe imagenet_revnet56 --pad 0", "--pad", "ImageNetClassification", 1),
        ("--dataset imagenet2012 --flip", "--flip", "ImageNetClassification", 1),
    ],
)
def test_flag_that_the_recipe_does_not_have_is_refused(
    argv, flag, kind, others, capsys
):
    line = refused(capsys, train.parse, *argv.split())
    assert f"unexpected {flag}: " in line and kind in line
    _, _, named = line.rstrip("\n").partition("recipes that have it: ")
    field = flag[2:].replace("-", "_")
    expected = [name for name in RECIPES if field in RECIPES[name].values()]
    assert named.split(", ") == expected
    assert ("digits_revnet" in expected) == bool(others)


def test_recipes_and_command_lines_do_without_tensorflow():
    done = python(
        "-c",
        "import sys; from training import evaluate, export, recipes, train;"
        "train.parse(['--recipe', 'cifar10_revnet38', '--schedule', 'cosine']);"
        "assert not {'keras', 'tensorflow', 'revnet_tf'} & sys.modules.keys()",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", ["train", "evaluate", "export"])
def test_help_is_the_same_in_optimized_python(program):
    plain, *optimized = (
        python(*options, "-m", f"training.{program}", "--help")
        for options in ([], ["-O"], ["-OO"])
    )
    assert plain.returncode == 0 and plain.stdout.startswith("usage: ")
    for done in optimized:
        assert (done.returncode, done.stdout) == (0, plain.stdout)


@pytest.mark.thorough
def test_programs_run_without_docstrings_and_assertions(tmp_path):
    run_dir, output = str(tmp_path / "run"), str(tmp_path / "export")
    # In one process: each would compile the modules of TensorFlow again.
    script = f"""
from training import evaluate, export, train
train.main(["--run-dir", {run_dir!r}, *{TINY!r}])
evaluate.main([{run_dir!r}])
export.main([{run_dir!r}, "--output", {output!r}])
"""
    done = python("-OO", "-c", script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "export" / "saved_model.pb").is_file()
