import pytest
import tensorflow as tf

from training.strategy import get_strategy


@pytest.mark.skipif(
    len(tf.config.list_physical_devices("GPU")) > 1, reason="for one GPU or none"
)
@pytest.mark.parametrize("name", ["auto", "single"])
def test_one_device_needs_no_strategy(name):
    assert get_strategy(name) is tf.distribute.get_strategy()


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="'mirored': use 'auto', 'single'"):
        get_strategy("mirored")
