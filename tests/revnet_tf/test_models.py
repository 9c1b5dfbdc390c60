"""The networks are the paper's: counts, shapes, wiring, options."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from twins import assert_close, images

from revnet_tf import models

# Parameters by number of classes, by hand from the authors' published configuration.
PARAMETERS = {
    "ResNet32": {10: 464_154, 100: 470_004},
    "RevNet38": {10: 464_890, 100: 475_060},
    "ResNet110": {10: 1_727_962, 100: 1_733_812},
    "RevNet110": {10: 1_729_194, 100: 1_740_804},
    "ResNet164": {10: 1_703_258, 100: 1_726_388},
    "RevNet164": {10: 1_748_778, 100: 1_794_948},
    "ResNet50": {1000: 25_549_352},
    "RevNet56": {1000: 27_553_128},
    "ResNet101": {1000: 44_541_480},
    "RevNet104": {1000: 45_428_072},
}


def num_parameters(layer):
    """Returns the number of trainable parameters, as the paper counts them."""
    return sum(int(np.prod(v.shape)) for v in layer.trainable_variables)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_papers(name):
    model = getattr(models, name)()
    top = num_parameters(model.get_layer("predictions"))
    classes = model.output_shape[-1]
    for other, count in PARAMETERS[name].items():
        assert num_parameters(model) - top + top // classes * other == count
    # The first number of classes is the default.
    assert classes == next(iter(PARAMETERS[name]))


@pytest.mark.parametrize("name", models.residual.VARIANTS)
def test_depth_in_the_name_is_the_number_of_weight_layers(name):
    row = models.residual.VARIANTS[name]
    convs = 3 if row.bottleneck else 2
    branches = 2 if row.reversible else 1
    depth = convs * branches * sum(row.num_blocks) + 2
    assert name.endswith(f"Net{depth}")


@pytest.mark.parametrize(
    "name, sizes, widths",
    [
        ("RevNet38", (32, 16, 8), (32, 64, 112)),
        ("ResNet32", (32, 16, 8), (16, 32, 64)),
        ("RevNet164", (32, 16, 8), (128, 256, 512)),
        ("RevNet56", (56, 28, 14, 7), (512, 1024, 2048, 3328)),
    ],
)
def test_stages_halve_the_size_and_have_the_listed_width(name, sizes, widths):
    model = getattr(models, name)()
    for i, (size, width) in enumerate(zip(sizes, widths, strict=True)):
        output = model.get_layer(f"stage{i + 1}").output
        assert output.shape == (None, size, size, width)


def test_first_block_has_no_leading_batch_norm_in_f_only():
    model = models.RevNet38()
    first, second = model.get_layer("stage1").blocks[:2]
    kinds = [[type(x).__name__ for x in b.layers] for b in (first.f, first.g, second.f)]
    assert kinds[0] == ["Conv2D", "BatchNormalization", "ReLU", "Conv2D"]
    assert kinds[1] == kinds[2] == ["BatchNormalization", "ReLU", "Conv2D"] * 2
    resnet = models.ResNet32()
    _, first, *others = [x for x in resnet.layers if isinstance(x, keras.Sequential)]
    assert [type(x).__name__ for x in first.layers] == kinds[0]
    assert all([type(x).__name__ for x in s.layers] == kinds[1] for s in others)


def test_no_convolution_has_a_bias_and_norms_have_the_papers_constants():
    model = models.RevNet164()
    found = [x for x in model._flatten_layers() if isinstance(x, keras.layers.Conv2D)]
    assert len(found) == 1 + 27 * 6 + 3 * 2  # stem, branches, shortcuts
    assert not any(x.use_bias for x in found)
    norms = [
        x
        for x in model._flatten_layers()
        if isinstance(x, keras.layers.BatchNormalization)
    ]
    assert {(x.momentum, x.epsilon) for x in norms} == {(0.99, 1e-3)}


@pytest.mark.parametrize(
    "arguments",
    [
        dict(num_blocks=(3, 3), channels=(32, 32, 64)),
        # With 7x7 and 1x1 kernels, in branches and shortcuts.
        dict(
            num_blocks=(2, 1), channels=(32, 32, 64), bottleneck=True, stem="imagenet"
        ),
    ],
)
@pytest.mark.parametrize("network", [models.RevNet, models.ResNet])
def test_weights_start_as_in_the_authors_code(network, arguments):
    model = network(classes=100, **arguments)
    kernels = [v.numpy() for v in model.trainable_variables if v.name == "kernel"]
    *convs, dense = kernels
    for k in convs:
        stddev = np.sqrt(2 / (k.shape[0] * k.shape[1] * k.shape[3]))
        assert np.abs(k).max() <= 2 * stddev
        # Truncation at two standard deviations leaves 0.8796 of the deviation. An
        # estimate from n values has a standard error of about 1 / sqrt(2 n).
        assert abs(k.std() / (0.8796 * stddev) - 1) < 5 / np.sqrt(2 * k.size)
    firsts = [k.ravel()[:8].tobytes() for k in convs]
    assert len(set(firsts)) == len(firsts)
    limit = np.sqrt(3 / dense.shape[0])
    assert 0.95 * limit < np.abs(dense).max() <= limit
    assert abs(dense.std() / (limit / np.sqrt(3)) - 1) < 5 / np.sqrt(2 * dense.size)
    starts = {"gamma": 1, "beta": 0, "bias": 0, "moving_mean": 0, "moving_variance": 1}
    for v in model.variables:
        if v.name in starts:
            np.testing.assert_array_equal(v, np.full(v.shape, starts[v.name]))


@pytest.mark.parametrize("bottleneck", [False, True])
def test_training_gradients_equal_the_ordinary_network(bottleneck):
    results = []
    for recompute in (True, False):
        keras.utils.set_random_seed(1)
        model = models.RevNet(
            (2, 2), (8, 8, 16), bottleneck, input_shape=(8, 8, 3), recompute=recompute
        )
        x = images(4, 8, 8, 3)

        @tf.function(autograph=False)
        def step(x, model=model):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x, training=True)[:, 3])
            weights = [v.value for v in model.trainable_variables]
            return [loss, *tape.gradient(loss, weights)]

        results.append([*step(x), *(v.value for v in model.non_trainable_variables)])
    assert_close(*results, rtol=1e-4, atol=1e-5)


def test_every_weight_of_a_network_gets_a_gradient():
    model = models.RevNet((2, 2), (8, 8, 16), True, input_shape=(8, 8, 3))
    x = images(4, 8, 8, 3)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=True)[:, 3])
    for v, d in zip(
        model.trainable_variables,
        tape.gradient(loss, [v.value for v in model.trainable_variables]),
        strict=True,
    ):
        assert np.any(d.numpy() != 0), v.path


def test_any_number_of_stages_and_blocks():
    model = models.RevNet((1, 2, 1, 1), (8, 8, 8, 12, 16), input_shape=(32, 32, 1))
    assert model.get_layer("stage4").output.shape == (None, 4, 4, 16)
    assert model.output_shape == (None, 10)


def test_without_top_features_have_open_size():
    model = models.RevNet((1, 1), (8, 8, 16), include_top=False)
    assert model.output_shape == (None, None, None, 16)
    assert model(images(2, 12, 20, 3)).shape == (2, 6, 10, 16)
    for pooling in ("avg", "max"):
        model = models.ResNet((1,), (8, 8), include_top=False, pooling=pooling)
        assert model.output_shape == (None, 8)


def test_imagenet_stem_leaves_a_quarter_of_any_size():
    model = models.RevNet((1,), (8, 8), stem="imagenet", include_top=False)
    assert model.output_shape == (None, None, None, 8)
    for size, quarter in {64: 16, 65: 17, 7: 2}.items():
        assert model(images(1, size, 2 * size, 3)).shape[1] == quarter


def test_input_tensor_is_used():
    x = keras.Input((16, 16, 3))
    scaled = keras.layers.Rescaling(1 / 255)(x)
    model = models.RevNet((1,), (8, 8), input_tensor=scaled, classes=3)
    assert model.input is x
    assert model(images(2, 16, 16, 3)).shape == (2, 3)


def test_weights_come_from_a_file(tmp_path):
    model = models.RevNet((1,), (8, 8))
    path = tmp_path / "some.weights.h5"
    model.save_weights(path)
    loaded = models.RevNet((1,), (8, 8), weights=path)
    np.testing.assert_array_equal(*(m(images(1, 32, 32, 3)) for m in (model, loaded)))


def test_kernel_regularizer_covers_kernels_and_nothing_else():
    model = models.RevNet(
        (1, 1), (8, 8, 16), kernel_regularizer=keras.regularizers.L2(0.5)
    )
    kernels = [v for v in model.trainable_variables if v.name == "kernel"]
    expected = sum(0.5 * np.sum(v.numpy() ** 2) for v in kernels)
    assert len(model.losses) == len(kernels)
    np.testing.assert_allclose(sum(map(float, model.losses)), expected, rtol=1e-5)


def test_predictions_are_float32_under_a_mixed_policy():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = models.RevNet((1,), (8, 8))
    assert model.get_layer("stage1").output.dtype == "float32"
    assert model(images(1, 32, 32, 3)).dtype == tf.float32


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_blocks=(1,), channels=(8, 7)), r"\[7\] cannot be split"),
        (dict(num_blocks=(1, 1), channels=(8, 8)), "Expected 3 channels"),
        (dict(num_blocks=(1, 0), channels=(8, 8, 8)), "Each stage needs a block"),
        (dict(num_blocks=(), channels=(8,)), "Each stage needs a block"),
        (dict(num_blocks=(1,), channels=(8, 8), weights="imagenet"), "weights="),
        (dict(num_blocks=(1,), channels=(8, 8), pooling="mean"), "pooling="),
        (dict(num_blocks=(1,), channels=(8, 8), stem="ImageNet"), "stem="),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.RevNet(**arguments)
