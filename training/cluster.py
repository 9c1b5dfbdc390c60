"""The workers of a run, and the limits of how long they wait for each other.

No TensorFlow here: a start that is refused ends before TensorFlow is loaded.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time

# Seconds without progress after which a worker gives up the others.
TIMEOUT = 600


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes that train a run together.

    Attributes:
        workers: tuple of strings, the addresses `HOST:PORT` of all workers, the chief
            first. It is empty if the run has one process.
        index: int, the place of this process among the workers.
    """

    workers: tuple[str, ...] = ()
    index: int = 0

    @property
    def is_chief(self):
        """Whether this process writes the run folder."""
        return self.index == 0


def cluster_of(strategy):
    """Returns the `Cluster` of a strategy.

    Args:
        strategy: string, the name of the strategy, as for `strategy.get_strategy`.

    Raises:
        ValueError: `TF_CONFIG` is missing or cannot be understood.
    """
    text = os.environ.get("TF_CONFIG")
    if strategy == "multiworker" and not text:
        raise ValueError(
            "strategy='multiworker' needs the environment variable TF_CONFIG, with the "
            "addresses of all workers and the place of this one among them."
        )
    if strategy not in ("auto", "multiworker") or not text:
        return Cluster()
    try:
        config = json.loads(text)
        addresses, kind = config["cluster"], config["task"]["type"]
        index = int(config["task"]["index"])
        chief = addresses.get("chief", [])
        workers = (*chief, *addresses.get("worker", []))
        place = index if kind == "chief" else index + len(chief)
        known = kind in ("chief", "worker") and 0 <= index < len(addresses[kind])
        for address in workers:
            _host_and_port(address)
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise ValueError(
            f"TF_CONFIG={text!r} does not say which worker this is; give it the form "
            '{"cluster": {"worker": ["HOST:PORT", ...]}, '
            '"task": {"type": "worker", "index": 0}}.'
        )
    if strategy == "auto" and len(workers) == 1:
        return Cluster()
    return Cluster(workers, place)


def wait_for_workers(cluster):
    """Waits until all workers of a cluster have started.

    TensorFlow would wait for an hour or more and hold the lock of Python, so that no
    signal could end it. Call this directly before TensorFlow starts its server.

    Raises:
        OSError: a worker did not start within `TIMEOUT` seconds, or another process
            has the port of this one.
    """
    if len(cluster.workers) < 2:
        return
    _, port = _host_and_port(cluster.workers[cluster.index])
    try:
        # The others find this worker by its port, on which TensorFlow listens later.
        # The system completes their connections, which need no answer.
        listening = socket.create_server(("", port), backlog=len(cluster.workers))
    except OSError as error:
        raise OSError(
            f"TF_CONFIG gives this worker port {port}, which cannot be opened "
            f"({error.strerror}); end the other process, or give another port."
        ) from error
    deadline = time.monotonic() + TIMEOUT
    with listening:
        while missing := _missing(cluster):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"after {TIMEOUT} s {missing}; start all workers of TF_CONFIG."
                )
            time.sleep(0.5)


@contextlib.contextmanager
def watched(cluster):
    """Ends this process with one line if the block waits too long for another worker.

    A worker waits for the others within TensorFlow, where no exception reaches it.
    TensorFlow reports a worker that has ended, but not a worker that hangs.

    Args:
        cluster: a `Cluster`.

    Yields:
        The function to call, with any arguments, whenever the block makes progress.
    """
    last = time.monotonic()
    ended = threading.Event()

    def note_progress(*_, **__):
        nonlocal last
        last = time.monotonic()

    def watch():
        while not ended.wait(1):
            if time.monotonic() - last > TIMEOUT:
                reason = _missing(cluster) or "all can be reached, so one of them hangs"
                print(
                    "python -m training.train: error: this worker has waited "
                    f"{TIMEOUT} s for the others: {reason}; start all again, and the "
                    "run goes on from its last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    if len(cluster.workers) > 1:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield note_progress
    finally:
        ended.set()


def _missing(cluster):
    """Returns a text that names the other workers that cannot be reached."""
    found = []
    for index, address in enumerate(cluster.workers):
        if index != cluster.index:
            try:
                socket.create_connection(_host_and_port(address), timeout=5).close()
            except OSError as error:
                found.append(f"worker {index} at {address} cannot be reached ({error})")
    return ", ".join(found)


def _host_and_port(address):
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
