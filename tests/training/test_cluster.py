"""Workers that wait for each other, without TensorFlow."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from training import cluster, train
from training.cluster import Cluster, wait_for_workers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ports():
    """Three ports, of which another process listens to the last."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    found = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets[:2]:
        opened.close()
    yield found
    sockets[2].close()


@pytest.fixture
def workers(ports):
    return tuple(f"127.0.0.1:{port}" for port in ports)


@pytest.fixture
def no_patience(monkeypatch):
    monkeypatch.setattr(cluster, "TIMEOUT", 0)


def test_worker_that_never_starts_is_named(workers, no_patience):
    with pytest.raises(TimeoutError) as error:
        wait_for_workers(Cluster(workers, 0))
    text = str(error.value)
    assert f"after 0 s worker 1 at {workers[1]} cannot be reached (" in text
    assert "worker 0" not in text and "worker 2" not in text


def test_chief_that_never_starts_is_named(workers, no_patience):
    with pytest.raises(TimeoutError, match=f"worker 0 at {workers[0]} cannot be"):
        wait_for_workers(Cluster(workers, 1))


def test_host_that_is_unknown_is_named(workers, no_patience):
    with pytest.raises(TimeoutError, match="worker 1 at worker.invalid:1 cannot be"):
        wait_for_workers(Cluster((workers[0], "worker.invalid:1"), 0))


def test_workers_find_each_other_and_leave_their_ports_to_tensorflow(workers, ports):
    code = f"""
import socket, sys
from training.cluster import Cluster, wait_for_workers
wait_for_workers(Cluster({workers[:2]}, 1))
with socket.create_server(("", {ports[1]})):
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE
    ) as second:
        wait_for_workers(Cluster(workers[:2], 0))
        with socket.create_server(("", ports[0])):
            second.communicate(timeout=60)
    assert second.returncode == 0


def test_port_that_another_process_has_is_named(workers, ports):
    with pytest.raises(OSError, match=f"port {ports[2]}, which cannot be opened"):
        wait_for_workers(Cluster(workers, 2))


def test_single_worker_waits_for_none(workers, no_patience):
    wait_for_workers(Cluster())
    wait_for_workers(Cluster(workers[:1], 0))


def test_program_ends_with_one_line_where_a_worker_never_starts(
    workers, no_patience, tmp_path, monkeypatch, capsys
):
    config = {
        "cluster": {"worker": workers[:2]},
        "task": {"type": "worker", "index": 0},
    }
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(SystemExit) as exit_:
        train.main(["--run-dir", str(tmp_path / "run")])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert f"worker 1 at {workers[1]} cannot be reached" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def watched(workers, block):
    """Returns a process in whose watched block the limit is 1 s."""
    code = (
        "import sys, time; from training import cluster; cluster.TIMEOUT = 1\n"
        "with cluster.watched(cluster.Cluster(tuple(sys.argv[1:]), 0)) as note:\n"
        f"    {block}\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *workers],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_worker_that_hangs_ends_the_process_with_one_line(workers):
    done = watched((workers[0], workers[2]), "time.sleep(1000)")
    assert done.returncode == 1
    assert re.fullmatch(
        "python -m training.train: error: this worker has waited 1 s for the others: "
        "all can be reached, so one of them hangs; .* goes on from its last .*\n",
        done.stderr,
    )


def test_worker_that_cannot_be_reached_any_more_is_named(workers):
    done = watched(workers, "time.sleep(1000)")
    assert done.returncode == 1
    assert re.search(f"worker 1 at {workers[1]} cannot be reached", done.stderr)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "num_workers, noting", [(3, "note('batch', logs={})"), (1, "")]
)
def test_progress_or_no_other_worker_keeps_the_process(num_workers, noting, workers):
    block = f"for _ in range(25): time.sleep(0.1); {noting}"
    done = watched(workers[:num_workers], block)
    assert (done.returncode, done.stderr) == (0, "")
