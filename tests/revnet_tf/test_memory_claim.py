"""Activation memory does not depend on depth, measured on whole training steps.

The measurements are those of `benchmarks.memory`. In graph mode they are the peak
resident sizes of fresh processes at two batch sizes. With XLA they are the buffers that
the compiler assigns.
"""

import pytest

from benchmarks.memory import bytes_per_sample


def spread(values):
    return max(values) / min(values) - 1


@pytest.mark.thorough
def test_memory_of_a_chain_is_flat_in_graph_mode():
    assert spread([bytes_per_sample("functional", n) for n in (4, 16)]) < 0.15


@pytest.mark.slow
def test_memory_of_ordinary_backpropagation_grows():
    small, large = (bytes_per_sample("ordinary", n) for n in (4, 16))
    assert large / small > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "network", ["sequence", "functional", "sequential", "fixed_point"]
)
def test_memory_of_every_kind_of_chain_is_flat_at_4_8_and_16_blocks(network):
    for mode, depths, limit in (
        ("graph", (4, 8, 16), 0.15),
        ("xla", (4, 8, 16), 0.02),
        # Flat from 8 blocks. A chain of 4 needs a quarter of a stream less for each
        # sample.
        ("xla_for_memory", (8, 16), 0.02),
    ):
        assert spread([bytes_per_sample(network, n, mode) for n in depths]) < limit


@pytest.mark.slow
def test_fixed_point_streams_take_no_more_memory_than_others():
    plain, fixed = (bytes_per_sample(n, 8) for n in ("sequence", "fixed_point"))
    assert fixed < 1.1 * plain


@pytest.mark.slow
def test_memory_of_revnets_is_flat_up_to_18_blocks_a_stage():
    assert spread([bytes_per_sample("revnet", n) for n in (3, 9, 18)]) < 0.15


@pytest.mark.slow
def test_memory_of_the_ordinary_revnet_grows():
    small, large = (bytes_per_sample("revnet_ordinary", n) for n in (3, 9))
    assert large / small > 2
