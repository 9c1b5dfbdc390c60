"""Made-up data sets, prepared as TFDS prepares them, and the program, started."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

TESTS = Path(__file__).parents[1]


def store(data_dir, name, version, image, splits, class_names):
    """Prepares a data set.

    Args:
        data_dir: folder to write to.
        name, version: of the data set.
        image: TFDS feature of the images.
        splits: dictionary of lists of examples.
        class_names: list of strings.
    """
    tfds = pytest.importorskip("tensorflow_datasets")
    example = next(iter(splits.values()))[0]
    features = {
        key: tfds.features.Text() for key in example if key not in ("image", "label")
    }
    features["image"] = image
    features["label"] = tfds.features.ClassLabel(names=class_names)
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version=version,
        data_dir=data_dir,
        features=tfds.features.FeaturesDict(features),
        split_datasets={k: list(enumerate(v)) for k, v in splits.items()},
        disable_shuffling=True,
    )
    return data_dir


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The folder of a made-up CIFAR-10, 20 and 10 images."""
    tfds = pytest.importorskip("tensorflow_datasets")
    rng = np.random.default_rng(0)

    def split(size):
        return [
            {
                "id": f"{i}",
                "image": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
                "label": i % 10,
            }
            for i in range(size)
        ]

    return store(
        tmp_path_factory.mktemp("tfds"),
        "cifar10",
        "3.0.2",
        tfds.features.Image(shape=(32, 32, 3)),
        {"train": split(20), "test": split(10)},
        list("abcdefghij"),
    )


@pytest.fixture(scope="session")
def imagenet_dir(tmp_path_factory):
    """The folder of a made-up ImageNet: 12 and 5 JPEG images of different sizes."""
    tfds = pytest.importorskip("tensorflow_datasets")
    rng = np.random.default_rng(0)

    def split(size):
        examples = []
        for i in range(size):
            height, width = rng.integers(100, 400, 2)
            # Smooth, as a photograph is: noise would not survive the compression.
            image = tf.image.resize(rng.integers(0, 256, (4, 4, 3)), (height, width))
            examples.append(
                {
                    "image": tf.cast(image, tf.uint8).numpy(),
                    "label": 10 * i,
                    "file_name": f"n{i:08}_{i}.JPEG",
                }
            )
        return examples

    return store(
        tmp_path_factory.mktemp("tfds"),
        "imagenet2012",
        "5.1.0",
        tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        {"train": split(12), "validation": split(5)},
        [f"n{i:08}" for i in range(1000)],
    )


@pytest.fixture
def put_junk():
    """Puts junk in the place of images, in records that are whole."""

    def put(path, numbers):
        encoded = [r.numpy() for r in tf.data.TFRecordDataset(str(path))]
        with tf.io.TFRecordWriter(str(path)) as writer:
            for i, record in enumerate(encoded):
                example = tf.train.Example.FromString(record)
                if i in numbers:
                    image = example.features.feature["image"].bytes_list
                    image.value[:] = [b"no image"]
                writer.write(example.SerializeToString())

    return put


@pytest.fixture(scope="module")
def start():
    """Starts the training program in processes of their own, killed after the test."""
    processes = []

    def start(*argv, workers=1, **options):
        """Returns one process for each worker.

        Args:
            *argv: of `training.train`.
            workers: number of processes, which find each other by `TF_CONFIG`.
            **options: of `program.py`.
        """
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(workers)]
        ports = [opened.getsockname()[1] for opened in sockets]
        for opened in sockets:
            opened.close()
        cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
        started = []
        for index in range(workers):
            config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
            env = os.environ | {"PYTHONPATH": str(TESTS.parent)}
            if workers > 1:
                env["TF_CONFIG"] = json.dumps(config)
            process = subprocess.Popen(
                [sys.executable, TESTS / "program.py", json.dumps(options)]
                + [str(word) for word in argv],
                cwd=TESTS.parent,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.append(process)
        processes.extend(started)
        return started

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def run(start):
    """Starts processes as `start` does, and returns those that ended, as they ended."""

    def run(*argv, **options):
        return [ended(process) for process in start(*argv, **options)]

    return run


def ended(process, timeout=600):
    """Waits for a process, and returns it as `subprocess.run` does."""
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
