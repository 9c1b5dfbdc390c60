import itertools
import re
import shutil

import pytest
import tensorflow as tf

from training.checkpoints import Checkpoints


@pytest.fixture
def variable():
    return tf.Variable(tf.zeros([100]))


@pytest.fixture
def checkpoints(tmp_path, variable):
    """Returns the checkpoints of steps 1, 2 and 3. The variable equals the step."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", variable=variable)
    for step in (1, 2, 3):
        variable.assign(tf.fill([100], float(step)))
        checkpoints.save(step, {"step": step})
    variable.assign(tf.zeros([100]))
    return checkpoints


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


DATA, INDEX = "variables.data-00000-of-00001", "variables.index"


def test_two_checkpoints_are_stored_and_the_last_is_restored(checkpoints, variable):
    names = {path.name for path in checkpoints.folder.iterdir()}
    assert names == {"step-2", "step-3"}
    assert checkpoints.restore() == (3, {"step": 3})
    assert set(variable.numpy()) == {3.0}


def test_nothing_is_restored_without_a_checkpoint(tmp_path, variable):
    assert Checkpoints(tmp_path / "none", variable=variable).restore() == (0, {})


def no_object(path):
    path.write_text("[]")


@pytest.mark.parametrize(
    "damage, file",
    [
        *itertools.product([truncate, flip_a_bit, empty, remove], [DATA, INDEX]),
        *itertools.product([truncate, empty, no_object], ["record.json"]),
    ],
)
def test_damaged_checkpoint_is_passed_over_with_a_line(
    damage, file, checkpoints, variable, capsys
):
    damage(checkpoints.folder / "step-3" / file)
    assert checkpoints.restore() == (2, {"step": 2})
    assert set(variable.numpy()) == {2.0}
    err = capsys.readouterr().err
    assert re.fullmatch(r".*step-3 is damaged and passed over: .+\n", err)


def test_damaged_checkpoint_is_replaced_at_its_step(checkpoints, variable):
    empty(checkpoints.folder / "step-3" / DATA)
    checkpoints.restore()
    variable.assign(tf.fill([100], 5.0))
    checkpoints.save(3, {})
    variable.assign(tf.zeros([100]))
    assert checkpoints.restore() == (3, {})
    assert set(variable.numpy()) == {5.0}


def test_run_does_not_begin_again_if_all_checkpoints_are_damaged(checkpoints):
    for step in (2, 3):
        empty(checkpoints.folder / f"step-{step}" / DATA)
    with pytest.raises(OSError, match="none of the checkpoints in .* can be read"):
        checkpoints.restore()


def test_partly_written_folder_is_no_checkpoint(checkpoints, variable):
    (checkpoints.folder / "step-3").rename(checkpoints.folder / "part-step-3")
    assert checkpoints.restore() == (2, {"step": 2})
    assert set(variable.numpy()) == {2.0}
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-2"]


@pytest.mark.parametrize(
    "objects",
    [
        {"other": tf.zeros([100])},
        {"variable": tf.zeros([99])},
        {"variable": tf.zeros([100], tf.int32)},
        {"variable": tf.zeros([100]), "other": tf.zeros([100])},
    ],
    ids=["name", "shape", "dtype", "more"],
)
def test_checkpoint_of_other_variables_is_not_passed_over(objects, checkpoints):
    variables = {name: tf.Variable(value) for name, value in objects.items()}
    with pytest.raises(OSError, match="step-3 holds other variables than the network"):
        Checkpoints(checkpoints.folder, **variables).restore()


def test_checkpoint_of_an_older_version_has_no_record(checkpoints, variable):
    (checkpoints.folder / "step-3" / "record.json").unlink()
    assert checkpoints.restore() == (3, {})
    assert set(variable.numpy()) == {3.0}


def test_folder_with_a_similar_name_is_no_checkpoint(checkpoints):
    for name in ("step-3-copy-4", "step-", "old-step-5"):
        shutil.copytree(checkpoints.folder / "step-3", checkpoints.folder / name)
    assert checkpoints.restore() == (3, {"step": 3})


def test_worker_that_is_not_the_chief_leaves_the_folder_alone(tmp_path, variable):
    worker = Checkpoints(tmp_path / "checkpoints", is_chief=False, variable=variable)
    worker.save(1, {})
    assert list(tmp_path.iterdir()) == []
