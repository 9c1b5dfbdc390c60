"""The first columns of every CSV file: date, commit, device and versions."""

import contextlib
import csv
import datetime
import os
import pathlib
import subprocess

import keras
import tensorflow as tf

FOLDER = pathlib.Path(__file__).parent
# Plots, for the README and the guide.
IMAGES = FOLDER.parent / "docs" / "images"


def provenance():
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "device": device(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
    }


@contextlib.contextmanager
def table(name, columns):
    """Begins a CSV file, and yields a function that adds and prints a row."""
    common = provenance()
    with open(FOLDER / name, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*common, *columns])

        def add(*row):
            writer.writerow([*common.values(), *row])
            file.flush()
            print(*row, flush=True)

        yield add


def device():
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        return details.get("device_name", "GPU")
    model = "CPU"
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":")[1].strip()
    return f"{model}, {os.cpu_count()} cores"
