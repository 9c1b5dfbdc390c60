import json

import pytest
import tensorflow as tf

from training import strategy
from training.strategy import get_strategy


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
    ],
)
@pytest.mark.parametrize("name", ["auto", "multiworker"])
def test_cluster_in_which_this_process_has_no_place_is_refused(name, text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match="^TF_CONFIG=.*does not say which worker"):
        get_strategy(name)


def test_workers_are_counted_with_their_chief(monkeypatch):
    cluster = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
    monkeypatch.setenv("TF_CONFIG", config(cluster, type="worker", index=1))
    assert strategy.num_workers() == 3


def test_cluster_of_one_worker_is_trained_as_without(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config({"worker": ["a:1"]}, type="worker", index=0))
    assert not strategy.is_multiworker(get_strategy("auto"))
