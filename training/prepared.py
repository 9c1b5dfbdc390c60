"""Data sets that TFDS has prepared: their folders and their records.

The handwritten digits do not need TFDS, so only functions import it.
"""

import os
import stat
import sys
import threading
from pathlib import Path

import tensorflow as tf
from google.protobuf import json_format

from training import paths

FILES_AT_ONCE = 16


def names():
    """Returns the names of all data sets that TFDS can prepare."""
    import tensorflow_datasets as tfds

    return tfds.list_builders(with_community_datasets=False)


def builder(name, data_dir=None, download=True):
    """Returns the TFDS builder of a prepared data set of images, each with its class.

    Args:
        name: string, the name of the data set, or `NAME/CONFIGURATION`.
        data_dir: path of a folder of TFDS data sets. Defaults to `TFDS_DATA_DIR`, then
            to the default folder of TFDS.
        download: bool, whether to download and prepare a missing data set.

    Raises:
        ValueError: the path is not UTF-8, or the data set has other features or no such
            configuration.
        FileNotFoundError: the data set is missing and `download` is false, or it must
            be prepared by hand, or it lies in another place or version.
        ConnectionError: the data set is missing and cannot be downloaded.
        OSError: the description of the data set is damaged.
    """
    import tensorflow_datasets as tfds

    if data_dir is not None and not Path(data_dir).is_dir():
        raise FileNotFoundError(
            f"data_dir={data_dir} is no folder; make it to download {name}, or give "
            f"the folder that holds {name}."
        )
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")
    if data_dir:
        paths.check_encoding(data_dir)
    name, _, config = name.partition("/")
    cls = tfds.builder_cls(name)
    if config and config not in cls.builder_configs:
        raise ValueError(
            f"dataset={name}/{config}: expected one of the configurations "
            f"{', '.join(cls.builder_configs) or '(none)'}; use one of them, or give a "
            f"folder as ./{name}/{config}."
        )
    options = {"data_dir": data_dir, "config": config or None}
    for version in (cls.VERSION, *cls.SUPPORTED_VERSIONS):
        try:
            found = cls(version=version, **options)
        except (ValueError, AssertionError, json_format.ParseError) as error:
            raise OSError(
                f"the dataset_info.json of {name}/{version} in data_dir="
                f"{data_dir or tfds.core.constants.DATA_DIR} is damaged ({error}); "
                "copy or prepare the data set again."
            ) from error
        if (Path(found.data_dir) / "dataset_info.json").is_file():
            _check_features(found)
            return found
    wanted = cls(**options)
    _check_features(wanted)
    _download(wanted, download)
    return wanted


def _check_features(builder):
    """Raises `ValueError` unless the examples are images, each with its class."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    is_dict = isinstance(features, tfds.features.FeaturesDict)
    found = dict(features.items()) if is_dict else {}
    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    if not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(
            f"dataset={builder.name}: expected images with the features image (Image) "
            f"and label (ClassLabel), found {', '.join(found) or 'none'}; use a data "
            "set for image classification."
        )


class Records:
    """The records of one split, in the files that TFDS has written.

    A record is corrupt if its file is damaged there, or if its image cannot be decoded.
    It ends the reading with an error that names it, or is left out and counted.

    Args:
        builder: TFDS builder of a prepared data set.
        split: string, the name of the split.
        skip_corrupt: bool, whether to leave out corrupt records.
        decoders: dictionary of TFDS decoders, for the features to leave encoded.

    Raises:
        OSError: the data set has no such split, or a file of it cannot be read.
    """

    def __init__(self, builder, split, skip_corrupt=False, decoders=None):
        info = builder.info.splits.get(split)
        if info is None:
            raise OSError(
                f"{builder.data_dir} has no split {split!r}; prepare it again."
            )
        format = builder.info.file_format.value
        if format != "tfrecord":
            raise OSError(
                f"{builder.data_dir} is written as {format}; prepare it again as "
                "tfrecord, TFDS's default."
            )
        self.paths = [str(path) for path in info.filepaths]
        self.lengths = info.shard_lengths
        _check_files(builder.data_dir, self.paths, self.lengths)
        self.skip_corrupt = skip_corrupt
        self._corrupt = {}
        self._features = builder.info.features
        self._decoders = decoders

    def __len__(self):
        """The number of records, including corrupt records."""
        return sum(self.lengths)

    def encoded(self, shuffle_buffer=0, seed=None):
        """Returns the data set of `(file, record, encoded example)`.

        Args:
            shuffle_buffer: int, the number of records from which the next is drawn at
                random. The order of the files is random, too. 0 keeps both orders.
            seed: scalar `int64` tensor. The order depends on nothing else.
        """
        lengths = tf.constant(self.lengths, tf.int64)
        files = tf.data.Dataset.from_tensor_slices((self.paths, lengths)).enumerate()

        def read(file, path_and_length):
            path, length = path_and_length
            # A blank replaces each record that a damaged file does not yield. The other
            # records keep their numbers, and the split its size.
            blank = tf.data.Dataset.from_tensors(b"").repeat()
            # `ignore_errors` alone would try forever to open a missing file. The range
            # ends the attempts.
            attempts = tf.data.Dataset.range(length)
            found = tf.data.Dataset.zip(attempts, tf.data.TFRecordDataset(path))
            found = found.ignore_errors().map(lambda _, encoded: encoded)
            records = found.concatenate(blank).take(length).enumerate()
            return records.map(lambda record, encoded: (file, record, encoded))

        def shuffled(seed):
            # The seed of this function's graph replaces the global seed.
            tf.compat.v1.set_random_seed(1)
            return (
                files.shuffle(len(self.paths), seed, reshuffle_each_iteration=False)
                .interleave(
                    read,
                    cycle_length=FILES_AT_ONCE,
                    num_parallel_calls=tf.data.AUTOTUNE,
                    deterministic=True,
                )
                .shuffle(shuffle_buffer, seed, reshuffle_each_iteration=False)
            )

        if not shuffle_buffer:
            return files.flat_map(read)
        return tf.data.Dataset.from_tensors(seed).flat_map(shuffled)

    def decoded(self, records, decode):
        """Returns the data set of `decode(example, *more)` without corrupt records.

        Args:
            records: data set of `(file, record, encoded example, *more)`.
            decode: function from an example, a dictionary, to a tuple of tensors.
        """

        def parse(encoded, *more):
            example = self._features.deserialize_example(
                encoded, decoders=self._decoders
            )
            return decode(example, *more)

        def try_one(file, record, encoded, *more):
            result = tf.data.Dataset.from_tensors((encoded, *more)).map(parse)
            blank = tf.nest.map_structure(
                lambda spec: tf.zeros([n or 0 for n in spec.shape], spec.dtype),
                result.element_spec,
            )
            nothing = tf.data.Dataset.from_tensors((False, blank))
            good = result.map(lambda *values: (True, values)).ignore_errors()
            return (
                good.concatenate(nothing)
                .take(1)
                .map(lambda good, values: (good, file, record, values))
            )

        def keep(good, file, record, values):
            return tf.cond(
                good,
                lambda: True,
                lambda: tf.numpy_function(self._report, [file, record], tf.bool),
            )

        return (
            records.interleave(
                try_one,
                cycle_length=FILES_AT_ONCE,
                num_parallel_calls=tf.data.AUTOTUNE,
                deterministic=True,
            )
            .filter(keep)
            .map(lambda good, file, record, values: values)
        )

    @property
    def corrupt(self):
        """The corrupt records found so far: file, number and reason of each."""
        for key, text in list(self._corrupt.items()):
            if text is None:
                file, record = key
                text = f"{self.paths[file]}, record {record}: {self._reason(*key)}"
                self._corrupt[key] = text
        return list(self._corrupt.values())

    @property
    def failure(self):
        """The corrupt record that ended the reading, or `None`."""
        if self.skip_corrupt and len(self._corrupt) < len(self):
            return None
        hint = "" if self.skip_corrupt else "; --skip-corrupt leaves such images out"
        return next((text + hint for text in self.corrupt), None)

    def _report(self, file, record):
        # In a thread of TensorFlow, where an operation that waits for another would
        # block. `corrupt` reads the reason later.
        key = int(file), int(record)
        if self.skip_corrupt and key not in self._corrupt:
            print(f"Skipping {self.paths[file]}, record {record}", file=sys.stderr)
        self._corrupt.setdefault(key)
        if not self.skip_corrupt or len(self._corrupt) == len(self):
            # The reading of a split without any record would not end.
            raise OSError("a corrupt record")
        return False

    def _reason(self, file, record):
        """Reads one record again, and returns the error."""
        try:
            for encoded in tf.data.TFRecordDataset(self.paths[file]).skip(record):
                self._features.deserialize_example(encoded.numpy())
                return "cannot be decoded"
            return "the file ends before it"
        except (tf.errors.OpError, ValueError) as error:
            return getattr(error, "message", str(error)).splitlines()[0]


def _check_files(folder, paths, lengths):
    """Raises `OSError` unless all files of a split can be read.

    Args:
        folder: path of the data set.
        paths: list of strings, the paths of the files.
        lengths: list of integers, the number of records of each file.
    """
    found = zip(paths, map(_problem, paths, lengths), strict=True)
    problems = [f"{os.path.basename(path)} ({why})" for path, why in found if why]
    if problems:
        more = ", ..." if len(problems) > 5 else ""
        raise OSError(
            f"{len(problems)} of {len(paths)} files in {folder} cannot be read: "
            f"{', '.join(problems[:5])}{more}; copy or prepare the data set again."
        )


def _problem(path, length):
    """Returns why a file of `length` records cannot be read, or `None`."""
    try:
        status = os.stat(path)
        # To open a pipe would wait for a writer.
        if not stat.S_ISREG(status.st_mode):
            return "is no regular file"
        with open(path, "rb") as file:
            # The length of a record in 8 bytes, its checksum, the record, its checksum.
            first = int.from_bytes(file.read(8), "little")
        if length and 8 + 4 + first + 4 > status.st_size:
            return "holds no whole record"
    except OSError as error:
        return error.strerror
    return None


def _download(builder, download):
    folder, wanted = Path(builder.data_dir).resolve(), builder.info.full_name
    data_dir = folder.parents[wanted.count("/")]
    found = _misplaced(builder.name, data_dir)
    if found:
        raise FileNotFoundError(
            f"data_dir={data_dir} does not hold {wanted}, but there is "
            f"{', '.join(map(str, found))}; give the folder in which {wanted} lies."
        )
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        raise FileNotFoundError(
            f"data_dir={data_dir} does not hold {wanted}, which cannot be downloaded "
            f"without an account; prepare it with TFDS (`tfds build {builder.name}`, "
            f"https://www.tensorflow.org/datasets/catalog/{builder.name}), or give the "
            "--data-dir in which it lies."
        )
    if not download:
        raise FileNotFoundError(
            f"data_dir={data_dir} does not hold {wanted}, and several workers would "
            "download it over each other; prepare it with TFDS before "
            f"(`tfds build {builder.name} --data_dir={data_dir}`), or give the "
            "--data-dir in which it lies."
        )
    # Some data sets have several files, and some have no list of them.
    files = builder.url_infos or {}
    url, info = next(iter(files.items()), (builder.info.homepage, None))
    size = f", {info.size}" if len(files) == 1 else ""
    print(f"Downloading {wanted}{size}, from {url} to {data_dir}", flush=True)
    problem = _unreachable(url)
    if problem:
        raise ConnectionError(
            f"{folder} is not there, and {url} cannot be reached ({problem}). Run the "
            f"command where there is a network, copy {wanted} from its data folder "
            f"to {folder}, or give the --data-dir in which it lies."
        )
    try:
        builder.download_and_prepare()
    except Exception as error:  # Data sets raise errors of many types.
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"{wanted} cannot be downloaded and prepared ({type(error).__name__}: "
            f"{reason}); prepare it with TFDS (`tfds build {builder.name}`), or give "
            "another data set."
        ) from error


def _misplaced(name, data_dir):
    """Returns the folders of the data set in another version or at another level."""
    patterns = ("", "*/", f"{name}/*/", f"*/{name}/*/")
    infos = [p for at in patterns for p in data_dir.glob(at + "dataset_info.json")]
    return [info.parent for info in infos if name in info.parts]


def _unreachable(url):
    """Returns why `url` does not answer within 15 seconds, or `None`.

    TFDS repeats its attempts for minutes. This function uses the client of TFDS, with
    the same proxies and certificates. No timeout of the client covers the look-up of
    the host name, so a thread waits for it.
    """
    import requests

    problem = ["no answer within 15 seconds"]

    def ask():
        try:
            with requests.get(url, stream=True, timeout=10) as response:
                response.raise_for_status()
            problem[0] = None
        except requests.RequestException as error:
            problem[0] = type(error).__name__

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(15)
    return problem[0]
