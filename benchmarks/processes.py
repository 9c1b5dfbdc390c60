"""Measurements that need a process of their own: an allocator without a past."""

import json
import os
import pathlib
import subprocess
import sys

# How a training step is run, and with what flags of XLA: on a CPU it orders the
# operations so that many can run at a time, and with this flag so that they need little
# memory (`CpuCompiler::CreateHloSchedule`).
MODES = {
    "graph": "",
    "xla": "",
    "xla_for_memory": "--xla_cpu_enable_concurrency_optimized_scheduler=false",
}


def run(module, *arguments, xla_flags=""):
    """Returns what `python -m benchmarks.MODULE --one ARGUMENTS` prints (`python`)."""
    module = f"benchmarks.{module}"
    return python("-m", module, "--one", *arguments, xla_flags=xla_flags)


def python(*arguments, xla_flags=""):
    """Runs Python in a process of its own, in the checkout.

    Returns:
        The last line that it prints, which is JSON.

    Raises:
        RuntimeError: the process failed; says what it wrote.
    """
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=pathlib.Path(__file__).parents[1],
        env={
            # On every processor: the allocator of some keeps no account without it.
            "TF_ENABLE_ONEDNN_OPTS": "1",
            **os.environ,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "XLA_FLAGS": xla_flags,
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
