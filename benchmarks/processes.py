"""Measurements that need a process of their own: an allocator without a past."""

import json
import os
import pathlib
import subprocess
import sys


def run(module, *arguments, environment=None):
    """Runs `python -m benchmarks.MODULE --one ARGUMENTS`.

    Returns:
        The last line that it prints, which is JSON.

    Raises:
        RuntimeError: the process failed; says what it wrote.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", "--one"]
    command += map(str, arguments)
    done = subprocess.run(
        command,
        cwd=pathlib.Path(__file__).parents[1],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **(environment or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
