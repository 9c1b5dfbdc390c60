"""Trains a recipe: `python -m training.train [--recipe NAME] [--FIELD VALUE ...]`.

The same command on the folder of an unfinished run resumes it at its last checkpoint.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import types
import typing
import uuid
from pathlib import Path

from training import runs, signals
from training.cluster import cluster_of, wait_for_workers
from training.command import Parser, io_errors, load_tensorflow, one_of, path
from training.recipe import CHOICES
from training.recipe import flags as recipe_flags
from training.recipes import RECIPES
from training.settings import COUNT, check


def main(argv=None):
    parser, name, recipe, args = parse(argv)
    # It holds the lock of the run folder.
    with contextlib.ExitStack() as stack:
        train(parser, name, recipe, args, stack)


def train(parser, name, recipe, args, stack):
    """Trains a recipe, or ends the program with one line that names the reason."""
    run_dir = args.run_dir or Path("runs", name)
    description = runs.describe(name, recipe)

    def hold():
        stack.enter_context(runs.locked(run_dir))
        # Before the lock another process can have changed the folder.
        runs.check_free(run_dir, description)
        if (run_dir / "recipe.json").exists():
            runs.check_checkpoints(run_dir, recipe.train_steps)

    try:
        cluster = cluster_of(args.strategy)
        runs.check_free(run_dir, description)
        is_new = not (run_dir / "recipe.json").exists()
        if cluster.is_chief and not is_new:
            hold()
        # TensorFlow takes seconds to load. The checks above do not wait for it.
        load_tensorflow()
        import keras
        import tensorflow as tf

        from revnet_tf._files import replacing
        from training import data, fit, outputs
        from training import strategy as strategies

        wait_for_workers(cluster)
        strategy = strategies.get_strategy(args.strategy)
        multiworker = strategies.is_multiworker(strategy)
        check_replicas(recipe, strategy.num_replicas_in_sync)
        keras.utils.set_random_seed(recipe.seed)
        if recipe.deterministic:
            tf.config.experimental.enable_op_determinism()
            # The graph optimizer of TensorFlow orders sums by the rest of the graph.
            # The gradients of reconstructed and of stored activations would differ in
            # their last bits. For RevNet-38 with 100 images, it does not suffice to
            # disable `arithmetic_optimization` alone.
            options = {"disable_meta_optimizer": True}
            tf.config.optimizer.set_experimental_options(options)
        images = data.load(
            recipe, args.data_dir, args.skip_corrupt, not multiworker, run_dir
        )
        images.steps_per_epoch(recipe.global_batch_size)
        with strategy.scope():
            network = fit.build(recipe, images)
        memory = largest = None
        if args.memory_report or args.memory_budget:
            memory, largest = fit.plan_memory(
                network, recipe, images, strategy, args.memory_budget
            )
            if args.monitor and not fit.reconstructs(network):
                raise ValueError(
                    f"--monitor={args.monitor} needs blocks that reconstruct their "
                    "activations, and with this --memory-budget all blocks store "
                    "them; lower the budget, or leave --monitor out."
                )
        chief = cluster.is_chief
        if chief and is_new:
            run_dir.mkdir(parents=True, exist_ok=True)
            hold()
            if not (run_dir / "recipe.json").exists():
                run = {"run": uuid.uuid4().hex}
                outputs.write_json(run_dir / "recipe.json", description | run)
    except (ValueError, OSError) as error:
        parser.error(error)
    except io_errors() as error:
        parser.fail(1, lost_worker(error) or error)

    if chief:
        print(
            f"{name}: {fit.num_parameters(network):,} parameters, "
            f"{recipe.train_steps:,} steps, {strategy.num_replicas_in_sync} "
            f"replica(s), in {run_dir}",
            flush=True,
        )
        if unreached := recipe.schedule.unreached_steps(recipe.train_steps):
            print(
                "The run ends before these steps, and its learning rate does not "
                f"decay there: {unreached}",
                flush=True,
            )
        if memory:
            print(f"On each replica, by estimate:\n{memory}", flush=True)
        if largest:
            print(f"Largest batch within the budget: {largest:,}", flush=True)
    callbacks = []
    if chief and args.tensorboard:
        folder = run_dir / "tensorboard"
        callbacks.append(keras.callbacks.TensorBoard(folder, histogram_freq=1))
    if chief and args.monitor:
        batch_size = recipe.global_batch_size
        monitor = fit.Monitor(images, batch_size, run_dir, args.monitor)
        # The callbacks after it find its values in the logs.
        callbacks.insert(0, monitor)
    go_on = f"the same command goes on from the last checkpoint in {run_dir}"
    try:
        with signals.raised_interrupt():
            rows = fit.fit(
                network, recipe, images, run_dir, strategy, args.save_every, callbacks
            )
            if chief:
                serving = recipe.task.serving_model(network, images)
                with replacing(run_dir / "model.keras") as part:
                    serving.save(part)
                finish(run_dir, name, recipe, network, images, rows, strategy)
            # The others wait, or the chief would report a worker that died.
            strategies.on_any_worker(strategy, False)
    except FloatingPointError as error:
        parser.fail(1, error)
    except fit.Preempted as error:
        parser.fail(128 + signal.SIGTERM, f"{error}; {go_on}")
    except io_errors() as error:
        cause = lost_worker(error) or data.failure(images) or error
        parser.fail(1, f"{cause}; when that is mended, {go_on}")
    except KeyboardInterrupt:
        parser.fail(signals.STATUS, f"interrupted; {go_on}")


def lost_worker(error):
    """Returns a message if the reason of an error is another worker, else `None`."""
    _, found, reason = str(error).partition("Collective ops is aborted by: ")
    if not found:
        return None
    return f"another worker has ended or cannot be reached: {reason.splitlines()[0]}"


def check_replicas(recipe, replicas):
    """Raises `ValueError` unless the replicas of a strategy can train the recipe."""
    if recipe.global_batch_size % replicas:
        raise ValueError(
            f"global_batch_size={recipe.global_batch_size} cannot be shared by "
            f"{replicas} replicas; use a multiple of them."
        )
    if recipe.jit and replicas > 1:
        raise ValueError(
            f"jit=True: Keras cannot have XLA compile a step of {replicas} replicas; "
            "leave the flag out, or use --strategy single."
        )


def finish(run_dir, name, recipe, network, images, rows, strategy):
    """Draws the curves of a trained run, scores its saved model and exports it."""
    from training import evaluate, export, fit, outputs

    task = recipe.task
    outputs.draw_curves(run_dir / "curves.png", rows, name, task.score, task.error)
    scores = evaluate.score(run_dir, images, draw=True)
    result = {
        "recipe": name,
        **{f"test_{name}": value for name, value in scores.items()},
        "num_parameters": fit.num_parameters(network),
        "steps": recipe.train_steps,
        "train_seconds": round(sum(row["seconds"] for row in rows), 3),
        "skipped_images": len(images.corrupt),
        **images.about,
    }
    # A process that ended between the export and the result leaves an export.
    shutil.rmtree(run_dir / "export", ignore_errors=True)
    (run_dir / "export").mkdir()
    export.export(run_dir, run_dir / "export" / "1", result)
    outputs.write_json(run_dir / "result.json", result)
    if images.corrupt:
        print(f"\n{len(images.corrupt)} corrupt image(s) left out", end="")
    print()
    for score, value in scores.items():
        print(f"{f'test {score}':<14} {value:.4f}")
    print(f"""\
training       {result["train_seconds"]:.0f} s, {recipe.train_steps:,} steps
model          {run_dir / "model.keras"}
SavedModel     {run_dir / "export" / "1"}
curves         {run_dir / "curves.png"}""")
    if hasattr(recipe.network, "recompute"):
        for way, size in fit.activation_bytes(recipe, images, strategy).items():
            print(f"activations    {size / 1e6:.2f} MB a step if {way}, by estimate")


def parse(argv):
    """Returns the parser, the recipe's name, the recipe, and the other arguments."""
    parser = Parser(
        prog="python -m training.train",
        description="Trains a recipe. Flags of its fields replace their values.",
        epilog=f"Recipes: {', '.join(RECIPES)}.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--recipe",
        type=one_of(RECIPES),
        default="digits_revnet",
        metavar="NAME",
        help="defaults to digits_revnet.",
    )
    parser.add_argument(
        "--run-dir", type=path, default=None, help="defaults to runs/NAME."
    )
    parser.add_argument(
        "--data-dir",
        type=path,
        default=None,
        help="folder that holds the data set. Defaults for TFDS to TFDS_DATA_DIR, then "
        "to TFDS's own; for a folder of pictures to the current folder.",
    )
    parser.add_argument(
        "--skip-corrupt",
        action="store_true",
        default=False,
        help="leave out and count images that cannot be read, rather than end the run.",
    )
    parser.add_argument(
        "--strategy",
        type=one_of(("auto", "single", "mirrored", "multiworker")),
        default="auto",
        metavar="NAME",
        help="auto (default), single, mirrored or multiworker.",
    )
    parser.add_argument(
        "--save-every",
        type=int,
        default=None,
        metavar="N",
        help="steps between checkpoints, in addition to a checkpoint after each epoch.",
    )
    parser.add_argument(
        "--monitor",
        type=int,
        default=None,
        metavar="N",
        help="measure every N steps how exactly activations are reconstructed.",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        default=False,
        help="write curves and histograms to the run folder, for TensorBoard.",
    )
    parser.add_argument(
        "--memory-report",
        action="store_true",
        default=False,
        help="print an estimate of the memory of a training step first.",
    )
    parser.add_argument(
        "--memory-budget",
        type=size,
        default=None,
        metavar="SIZE",
        help="such as 6GiB: store as many activations as fit, recompute the others.",
    )
    flags = recipe_flags()
    for name, flag in flags.items():
        add_flag(parser, name, *flag)
    args = parser.parse_args(argv)
    changes = {name: getattr(args, name) for name in flags if hasattr(args, name)}
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    recipe = RECIPES[args.recipe]
    try:
        choices = {c.flag for c in CHOICES} & recipe.values().keys() & changes.keys()
        chosen = recipe.replace(**{flag: changes[flag] for flag in choices})
        refuse_unknown(parser, chosen, changes)
        recipe = recipe.replace(**changes)
        for flag in ("save_every", "monitor"):
            check(flag, getattr(args, flag), int | None, COUNT)
    except ValueError as error:
        parser.error(error)
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error(
            "--tensorboard needs the package tensorboard: pip install tensorboard, or "
            "leave it out"
        )
    for flag in ("monitor", "memory_budget"):
        if getattr(args, flag) and not getattr(recipe.network, "recompute", False):
            parser.error(
                f"{spelled(flag)}: this network reconstructs no activations; leave it "
                "out"
            )
    return parser, args.recipe, recipe, args


def add_flag(parser, name, kind, help, options):
    """Adds a flag of the recipes, as `recipe.flags` describes it."""
    if isinstance(kind, types.UnionType):
        kind, _ = typing.get_args(kind)  # `None` is the value without the flag.
    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction}
    else:
        is_list = typing.get_origin(kind) is tuple
        kind = typing.get_args(kind)[0] if is_list else kind
        how = {
            "type": one_of(options) if options else kind,
            "metavar": "N" if kind is int else name.upper(),
            "nargs": "*" if is_list else None,
        }
    parser.add_argument(spelled(name), help=help.replace("%", "%%"), **how)


def refuse_unknown(parser, recipe, changes):
    """Ends the program if a flag is given that this recipe does not have."""
    for name in changes:
        if name not in recipe.values():
            kinds = [type(part).__name__ for part in recipe.parts().values()]
            others = [other for other in RECIPES if name in RECIPES[other].values()]
            parser.error(
                f"unexpected {spelled(name)}: {', '.join(kinds)} have no such field; "
                f"recipes that have it: {', '.join(others) or 'none'}"
            )


def spelled(name):
    """Returns the flag of a field."""
    return "--" + name.replace("_", "-")


def size(text):
    """Returns the bytes of a size such as `6GiB`, `500 MB` or `1e9`."""
    found = re.fullmatch(r"([\d.e+]+)\s*(?:([kKMGT]?)(i?)B)?", text)
    try:
        number, prefix, binary = found.groups()
        factor = (1024 if binary else 1000) ** " KMGT".index((prefix or " ").upper())
        num_bytes = int(float(number) * factor)
    except (AttributeError, ValueError, OverflowError):
        num_bytes = 0
    if not 0 < num_bytes < 2**63:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; write it as 6GiB, 500MB or a number of bytes above 0"
        )
    return num_bytes


if __name__ == "__main__":
    # By default XLA orders operations on a CPU for parallel execution, and with this
    # flag for memory. The flags of the environment come last and prevail. A flag is for
    # the whole process, so `main` does not set it.
    order = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ["XLA_FLAGS"] = f"{order} {os.environ.get('XLA_FLAGS', '')}"
    signals.run("python -m training.train", main)
