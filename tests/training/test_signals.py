"""Interrupts of a program without TensorFlow."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = "program: error: interrupted\n"


def interrupted(main, times, ignored=False):
    """Returns a program that is interrupted after each line of its output, as it ends.

    Args:
        main: string, the code of the program.
        times: int, the number of interrupts.
        ignored: bool, whether the program starts with interrupts ignored.
    """
    lines = [f"    {line}" for line in main.strip().splitlines()]
    code = [
        "import sys, time",
        "from training import signals",
        "def main():",
        *lines,
        "signals.run('program', main)",
    ]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else None
    try:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", "\n".join(code)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        if ignored:
            signal.signal(signal.SIGINT, before)
    with process:
        for _ in range(times):
            assert process.stdout.readline()
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


WAITS = """
print("waiting")
time.sleep(60)
"""
RAISES = """
try:
    with signals.raised_interrupt():
        print("waiting")
        time.sleep(60)
except KeyboardInterrupt:
    print("cleaned")
    time.sleep({0})
    print("interrupted, and cleaned", file=sys.stderr)
    sys.exit(signals.STATUS)
"""
SWALLOWS = """
print("waiting")
try:
    time.sleep(60)
except BaseException:
    raise ImportError("while TensorFlow loads")
"""
ENDS = """
import atexit
@atexit.register
def wait():
    print("ending")
    time.sleep(60)
sys.exit("an error of its own")
"""
GOES_ON = """
print("waiting")
time.sleep(0.5)
with signals.raised_interrupt():
    print("waiting")
    time.sleep(0.5)
print("done")
"""


@pytest.mark.parametrize("main", [WAITS, SWALLOWS], ids=["waits", "swallows"])
def test_interrupt_ends_the_program_with_one_line(main):
    assert interrupted(main, 1) == (130, "", LINE)


def test_interrupt_is_raised_where_the_program_has_to_clean_up():
    expected = (130, "cleaned\n", "interrupted, and cleaned\n")
    assert interrupted(RAISES.format(0), 1) == expected


def test_second_interrupt_does_not_wait_for_the_cleaning():
    assert interrupted(RAISES.format(60), 2) == (130, "", LINE)


def test_interrupt_at_the_end_adds_no_second_line():
    assert interrupted(ENDS, 1) == (130, "", "an error of its own\n")


def test_background_job_goes_on_ignoring_interrupts():
    assert interrupted(GOES_ON, 2, ignored=True) == (0, "done\n", "")
