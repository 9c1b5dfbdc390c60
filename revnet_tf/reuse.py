"""What a branch finds in its first evaluation and need not compute in the second."""

import contextlib
import contextvars

_scope = contextvars.ContextVar("scope", default=None)


def once(compute):
    """Returns tensors, and whether they are those of a branch's first evaluation.

    They are `compute()` but in the second evaluation of a branch, which gets what the
    same call has returned in the first, and without its gradient. They are kept until
    then: this is for small tensors that take long.

    Raises:
        ValueError: the second evaluation has more calls than the first.
    """
    scope = _scope.get()
    if scope is None:
        return compute(), False
    kept, is_first = scope
    if is_first:
        kept.append(compute())
        return kept[-1], False
    for found in kept:
        return found, True
    raise ValueError(
        "A branch normalizes batches more often when it is called again than when it "
        "was called first: have it do the same each time, or set `recompute=False` on "
        "the block."
    )


@contextlib.contextmanager
def first():
    """Yields the list of what `once` returns meanwhile."""
    kept = []
    with _set((kept, True)):
        yield kept


def second(kept):
    """A context in which `once` returns what it returned in the first, in order."""
    return _set((iter(kept), False))


@contextlib.contextmanager
def _set(scope):
    token = _scope.set(scope)
    try:
        yield
    finally:
        _scope.reset(token)
