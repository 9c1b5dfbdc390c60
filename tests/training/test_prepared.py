import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from training import data
from training import prepared as prepared_data
from training.recipes import RECIPES

CIFAR10 = RECIPES["cifar10_revnet38"]
NAME = "cifar10/3.0.2/cifar10-train.tfrecord-00000-of-00001"


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the made-up CIFAR-10, to be damaged."""
    shutil.copytree(prepared, tmp_path / "copy")
    return tmp_path / "copy"


def damage_image(path, number, put_junk):
    """Damages one image, in a record that is whole."""
    put_junk(path, [number])


def damage_record(path, number, put_junk):
    """Flips a bit of one record, so that its checksum is wrong."""
    content, start = bytearray(path.read_bytes()), 0
    for _ in range(number):
        # Length, its checksum, the record, its checksum.
        start += 8 + 4 + struct.unpack_from("<Q", content, start)[0] + 4
    content[start + 100] ^= 1
    path.write_bytes(content)


def damage_end(path, number, put_junk):
    """Ends the file before the last record does."""
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    # The damage, the first unreadable record, their number, and the reason.
    "image": (damage_image, 7, 1, "Unknown image file format"),
    "record": (damage_record, 7, 13, "corrupted record"),
    "end": (damage_end, 19, 1, "truncated record"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_corrupt_record_ends_the_reading_with_its_file_number_and_reason(
    copy, kind, put_junk
):
    damage, number, _, why = DAMAGES[kind]
    damage(copy / NAME, number, put_junk)
    with pytest.raises(OSError) as error:
        data.load(CIFAR10, copy)
    assert str(error.value).startswith(f"{copy / NAME}, record {number}: ")
    assert why in str(error.value)


@pytest.mark.parametrize("kind", DAMAGES)
def test_skip_corrupt_leaves_out_and_counts_corrupt_records(
    copy, kind, capfd, put_junk
):
    damage, number, count, _ = DAMAGES[kind]
    whole = data.load(CIFAR10, copy)
    damage(copy / NAME, number, put_junk)
    images = data.load(CIFAR10, copy, skip_corrupt=True)
    left_out = range(number, number + count)
    np.testing.assert_array_equal(
        images.train_images, np.delete(whole.train_images, left_out, axis=0)
    )
    np.testing.assert_array_equal(
        images.train_labels, np.delete(whole.train_labels, left_out)
    )
    np.testing.assert_array_equal(images.test_images, whole.test_images)
    assert images.steps_per_epoch(4) == (20 - count) // 4
    assert [text.split(":")[0] for text in images.corrupt] == [
        f"{copy / NAME}, record {i}" for i in left_out
    ]
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("Skipping")] == [
        f"Skipping {copy / NAME}, record {i}" for i in left_out
    ]


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_link(path):
    path.unlink()
    path.symlink_to(path.name)


def cut_the_first_record(path):
    path.write_bytes(path.read_bytes()[:100])


def put_a_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\nsize 12345\n")


@pytest.mark.parametrize("skip_corrupt", [False, True])
@pytest.mark.parametrize(
    "damage, problem",
    [
        (Path.unlink, "No such file or directory"),
        (lambda path: path.write_bytes(b""), "holds no whole record"),
        (cut_the_first_record, "holds no whole record"),
        (put_a_pointer, "holds no whole record"),
        (make_pipe, "is no regular file"),
        (make_folder, "is no regular file"),
        (make_link, "Too many levels of symbolic links"),
    ],
    ids=["missing", "empty", "cut", "git-lfs", "pipe", "folder", "link"],
)
def test_file_that_cannot_be_read_is_named_before_the_reading(
    copy, damage, problem, skip_corrupt
):
    damage(copy / NAME)
    with pytest.raises(OSError) as error:
        data.load(CIFAR10, copy, skip_corrupt)
    folder, name = (copy / NAME).parent, (copy / NAME).name
    assert str(error.value) == (
        f"1 of 1 files in {folder} cannot be read: {name} ({problem}); copy or prepare "
        "the data set again."
    )


def test_five_of_many_missing_files_are_named(tmp_path):
    paths = [str(tmp_path / f"shard-{i}") for i in range(8)]
    Path(paths[0]).write_bytes(bytes(16))  # an empty record
    Path(paths[1]).write_bytes(b"")
    with pytest.raises(OSError) as error:
        prepared_data._check_files(tmp_path, paths, [1, 0, *6 * [1]])
    text = str(error.value)
    assert text.startswith(f"6 of 8 files in {tmp_path} cannot be read: shard-2 (No ")
    assert "shard-6" in text and "shard-7" not in text


@pytest.mark.parametrize("change", [Path.unlink, make_folder])
@pytest.mark.parametrize("shuffle_buffer", [0, 8])
def test_file_that_vanishes_after_the_check_ends_the_reading(
    copy, change, shuffle_buffer
):
    builder = prepared_data.builder("cifar10", copy)
    skipping = prepared_data.Records(builder, "train", skip_corrupt=True)
    strict = prepared_data.Records(builder, "train")
    change(copy / NAME)

    def read(records):
        encoded = records.encoded(shuffle_buffer, tf.constant(1, tf.int64))
        return list(records.decoded(encoded, lambda example: (example["id"],)))

    for records in (skipping, strict):
        with pytest.raises(tf.errors.OpError):
            read(records)
        assert str(copy / NAME) in records.failure
    assert len(skipping.corrupt) == 20


def test_data_set_without_any_good_record_ends_the_reading(copy, put_junk):
    put_junk(copy / NAME, range(20))
    with pytest.raises(OSError, match=f"{NAME}, record 0: .*Unknown image file"):
        data.load(CIFAR10, copy, skip_corrupt=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace("3.0.2", "3.0.1"),
        lambda text: text.replace('"name"', '"nam"'),
        lambda text: text.replace('"cifar10"', '"\xff"'),
    ],
    ids=["empty", "cut", "list", "other version", "other field", "not utf-8"],
)
def test_damaged_description_of_a_data_set_is_named(copy, damage):
    info = copy / "cifar10" / "3.0.2" / "dataset_info.json"
    info.write_text(damage(info.read_text()), encoding="latin-1")
    with pytest.raises(OSError) as error:
        data.load(CIFAR10, copy)
    start = f"the dataset_info.json of cifar10/3.0.2 in data_dir={copy} is damaged ("
    assert str(error.value).startswith(start)


def test_data_folder_whose_name_is_not_utf_8_is_refused(copy):
    folder = copy.with_name("\udcff")
    copy.rename(folder)
    with pytest.raises(ValueError, match="udcff' is not UTF-8; rename it"):
        data.load(CIFAR10, folder)


def order(records, seed):
    encoded = records.encoded(shuffle_buffer=8, seed=tf.constant(seed, tf.int64))
    return [int(record) for _, record, _ in encoded]


def test_shuffled_order_holds_every_record_once_and_depends_on_the_seed_alone(prepared):
    records = prepared_data.Records(prepared_data.builder("cifar10", prepared), "train")
    first = order(records, 1)
    tf.random.set_seed(99)
    assert order(records, 1) == first
    assert order(records, 2) != first
    assert sorted(first) == list(range(20))
    assert first != sorted(first)


def test_decoding_in_parallel_keeps_the_order(prepared):
    records = prepared_data.Records(prepared_data.builder("cifar10", prepared), "train")
    encoded = records.encoded().repeat(20)
    ids = records.decoded(encoded, lambda example: (example["id"],))
    assert [int(id.numpy()) for (id,) in ids] == 20 * list(range(20))


def test_missing_split_is_named(prepared):
    builder = prepared_data.builder("cifar10", prepared)
    with pytest.raises(OSError, match="has no split 'validation'"):
        prepared_data.Records(builder, "validation")


def test_other_file_format_is_named(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    info = tmp_path / "copy" / "cifar10" / "3.0.2" / "dataset_info.json"
    info.write_text(info.read_text().replace('"tfrecord"', '"array_record"'))
    builder = prepared_data.builder("cifar10", tmp_path / "copy")
    with pytest.raises(OSError, match="is written as array_record; prepare it again"):
        prepared_data.Records(builder, "train")


def test_data_set_that_cannot_be_downloaded_is_refused_with_instructions(tmp_path):
    with pytest.raises(FileNotFoundError, match="tfds build imagenet2012"):
        prepared_data.builder("imagenet2012", tmp_path)


def test_older_version_that_tfds_supports_is_read(imagenet_dir, tmp_path):
    shutil.copytree(imagenet_dir, tmp_path / "copy")
    folder = tmp_path / "copy" / "imagenet2012"
    (folder / "5.1.0").rename(folder / "5.0.0")
    info = folder / "5.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("5.1.0", "5.0.0"))
    builder = prepared_data.builder("imagenet2012", tmp_path / "copy")
    assert builder.version == "5.0.0"


def test_several_workers_do_not_download_over_each_other(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare it with TFDS before"):
        prepared_data.builder("cifar10", tmp_path, download=False)
    assert list(tmp_path.iterdir()) == []
