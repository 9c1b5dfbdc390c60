"""Measurements in a process of their own, with an allocator in its initial state."""

import json
import os
import pathlib
import subprocess
import sys

# The modes of a training step, with flags for XLA. By default XLA on a CPU orders
# operations so that many can run at a time. With this flag it orders them for low
# memory (`CpuCompiler::CreateHloSchedule`).
MODES = {
    "graph": "",
    "xla": "",
    "xla_for_memory": "--xla_cpu_enable_concurrency_optimized_scheduler=false",
}


def run(module, *arguments, xla_flags=""):
    """Runs `python -m benchmarks.MODULE --one ARGUMENTS`; see `python`."""
    module = f"benchmarks.{module}"
    return python("-m", module, "--one", *arguments, xla_flags=xla_flags)


def python(*arguments, xla_flags=""):
    """Runs Python in a process of its own, in the checkout.

    Returns:
        The value of the last line of its output, which is JSON.

    Raises:
        RuntimeError: the process failed. The message has its error output.
    """
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=pathlib.Path(__file__).parents[1],
        env={
            # Without oneDNN, the allocator has no memory statistics on some CPUs.
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
