import json

import pytest
import tensorflow as tf

from training.cluster import Cluster, cluster_of
from training.strategy import get_strategy, is_multiworker


@pytest.mark.skipif(
    len(tf.config.list_physical_devices("GPU")) > 1, reason="for one GPU or none"
)
@pytest.mark.parametrize("name", ["auto", "single"])
def test_one_device_needs_no_strategy(name):
    assert get_strategy(name) is tf.distribute.get_strategy()


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="'mirored': use one of auto, single"):
        get_strategy("mirored")


def config(cluster, **task):
    return json.dumps({"cluster": cluster, "task": task})


def test_several_workers_need_to_be_named(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(ValueError, match="needs the environment variable TF_CONFIG"):
        get_strategy("multiworker")


@pytest.mark.parametrize(
    "text",
    [
        "worker 1",
        "[]",
        "{}",
        config({"worker": ["a:1", "b:1"]}),
        config({"worker": ["a:1", "b:1"]}, type="worker", index=2),
        config({"worker": ["a:1", "b:1"]}, type="worker", index=-1),
        config({"worker": ["a:1", "b:1"]}, type="chief", index=0),
        config({"worker": ["a:1"], "ps": ["b:1"]}, type="ps", index=0),
        config({"worker": "a:1"}, type="worker", index=0),
        config({"worker": ["a:1", "b"]}, type="worker", index=0),
        config({"worker": ["a:1", 2]}, type="worker", index=0),
    ],
)
@pytest.mark.parametrize("name", ["auto", "multiworker"])
def test_cluster_in_which_this_process_has_no_place_is_refused(name, text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match="^TF_CONFIG=.*does not say which worker"):
        get_strategy(name)


@pytest.mark.parametrize(
    "kind, index, place", [("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2)]
)
def test_chief_is_the_first_of_the_workers(kind, index, place, monkeypatch):
    addresses = {"chief": ["a:1"], "worker": ["b:1", "c:1"], "ps": ["d:1"]}
    monkeypatch.setenv("TF_CONFIG", config(addresses, type=kind, index=index))
    for name in ("auto", "multiworker"):
        assert cluster_of(name) == Cluster(("a:1", "b:1", "c:1"), place)
    assert cluster_of("auto").is_chief == (kind == "chief")


@pytest.mark.parametrize("name", ["single", "mirrored"])
def test_strategy_of_one_process_has_no_other_workers(name, monkeypatch):
    addresses = {"worker": ["a:1", "b:1"]}
    monkeypatch.setenv("TF_CONFIG", config(addresses, type="worker", index=1))
    assert cluster_of(name) == Cluster()
    assert cluster_of(name).is_chief


def test_cluster_of_one_worker_is_trained_as_without(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config({"worker": ["a:1"]}, type="worker", index=0))
    assert not is_multiworker(get_strategy("auto"))
