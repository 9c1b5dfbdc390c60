"""Classification of images: the model for servers, its scores and its predictions."""

import csv
import sys

import keras
import numpy as np

from revnet_tf._files import replacing
from training import folder

BATCH_SIZE = 100


def serving_model(network, images):
    """Returns the model from `uint8` images to probabilities."""
    inputs = keras.Input(images.image_shape, dtype="uint8", name="image")
    normalized = keras.layers.Normalization(
        axis=(1, 2, 3),
        mean=images.mean,
        variance=np.full_like(images.mean, images.scale**2),
    )(inputs)
    probabilities = keras.layers.Softmax(name="probabilities")(network(normalized))
    return keras.Model(inputs, probabilities, name=f"{network.name}_serving")


def evaluate(task, model, images):
    """Returns the scores of a serving model on the test images, by their names."""
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(),
        weighted_metrics=task.metrics(model.output_shape[-1], from_logits=False),
    )
    batches = images.test_batches(BATCH_SIZE, normalize=False)
    logs = model.evaluate(batches, verbose=0, return_dict=True)
    return {name: logs[key] for name, key in task.scores(images.class_names).items()}


def export_options(task, model, result):
    """Returns the arguments of `export_saved_model` for a serving model."""
    # The layers of `serving_model`.
    _, normalization, network, probabilities = model.layers
    pooled = keras.Model(network.input, network.get_layer("avg_pool").output)
    return {
        "class_names": result["class_names"],
        "signatures": {
            "logits": probabilities.input,
            "features": pooled(normalization.output),
        },
        "decode": task.decoder(model.input_shape[1:]),
    }


def predict(task, model, inputs, output, result):
    """Writes the class of each picture, and the probabilities of all, as a table.

    Raises:
        OSError: a file cannot be read as a picture. No table is written.
    """
    ((name, files),) = inputs.items()
    decode = task.decoder(model.input_shape[1:])
    names = result["class_names"]
    with replacing(output / name) as part, part.open("w", newline="") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["file", "class", *names])
        for first in range(0, len(files), BATCH_SIZE):
            batch = files[first : first + BATCH_SIZE]
            images = [folder.read(file, decode) for file in batch]
            for file, image in zip(batch, images, strict=True):
                if isinstance(image, str):
                    raise OSError(f"{file} cannot be read as a picture: {image}")
            for file, row in zip(batch, model(np.stack(images)).numpy(), strict=True):
                values = [f"{value:.6g}" for value in row]
                writer.writerow([file, names[row.argmax()], *values])
            done = first + len(batch)
            print(f"{done:,} of {len(files):,} pictures", file=sys.stderr)
