"""Interrupts. They end a program with one line and status 130."""

import contextlib
import os
import signal
import sys

STATUS = 128 + signal.SIGINT


def run(prog, main):
    """Runs a program. An interrupt ends it at once.

    While TensorFlow loads, a `KeyboardInterrupt` can turn into any other error.

    Args:
        prog: string, the name of the program.
        main: function, the program.
    """
    has_ended = False
    stderr = os.dup(2)  # `command.load_tensorflow` redirects the original.

    def end(*_):
        if not has_ended:
            # `print` is not safe in a signal handler.
            os.write(stderr, f"{prog}: error: interrupted\n".encode())
        os._exit(STATUS)

    _handle(end)
    try:
        sys.exit(main())
    finally:
        has_ended = True


@contextlib.contextmanager
def raised_interrupt():
    """Has the first interrupt in the block raise `KeyboardInterrupt`.

    The process handles a second one as it did before the block.
    """

    def interrupt(*_):
        signal.signal(signal.SIGINT, before)
        raise KeyboardInterrupt

    before = _handle(interrupt)
    try:
        yield
    finally:
        _handle(before)


def _handle(handler):
    """Sets the handler of interrupts, and returns the handler before.

    The function leaves ignored interrupts ignored. A shell has its background jobs
    ignore them.
    """
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    return before
