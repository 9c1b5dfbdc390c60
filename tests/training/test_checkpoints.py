import re

import pytest
import tensorflow as tf

from training.checkpoints import Checkpoints


@pytest.fixture
def variable():
    return tf.Variable(tf.zeros([100]))


@pytest.fixture
def checkpoints(tmp_path, variable):
    """Those of steps 1, 2 and 3, in which the variable had these values."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", variable=variable)
    for step in (1, 2, 3):
        variable.assign(tf.fill([100], float(step)))
        checkpoints.save(step)
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


def test_two_are_kept_and_the_last_is_restored(checkpoints, variable):
    names = {path.name for path in checkpoints.folder.iterdir()}
    assert names == {"step-2", "step-3"}
    assert checkpoints.restore() == 3
    assert set(variable.numpy()) == {3.0}


def test_without_any_nothing_is_restored(tmp_path, variable):
    assert Checkpoints(tmp_path / "none", variable=variable).restore() == 0


@pytest.mark.parametrize("file", [DATA, INDEX])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, remove])
def test_damaged_one_is_passed_over_with_a_line(
    file, damage, checkpoints, variable, capsys
):
    damage(checkpoints.folder / "step-3" / file)
    assert checkpoints.restore() == 2
    assert set(variable.numpy()) == {2.0}
    err = capsys.readouterr().err
    assert re.fullmatch(r".*step-3 is damaged and passed over: .+\n", err)


def test_damaged_one_is_replaced_when_its_step_comes_again(checkpoints, variable):
    empty(checkpoints.folder / "step-3" / DATA)
    checkpoints.restore()
    variable.assign(tf.fill([100], 5.0))
    checkpoints.save(3)
    variable.assign(tf.zeros([100]))
    assert checkpoints.restore() == 3
    assert set(variable.numpy()) == {5.0}


def test_run_is_not_begun_anew_where_all_are_damaged(checkpoints):
    for step in (2, 3):
        empty(checkpoints.folder / f"step-{step}" / DATA)
    with pytest.raises(OSError, match="none of the checkpoints in .* can be read"):
        checkpoints.restore()


def test_one_that_was_not_written_to_its_end_is_no_checkpoint(checkpoints, variable):
    (checkpoints.folder / "step-3").rename(checkpoints.folder / "part-step-3")
    assert checkpoints.restore() == 2
    assert set(variable.numpy()) == {2.0}
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-2"]


def test_one_of_other_variables_is_no_damaged_one(checkpoints, tmp_path):
    other = Checkpoints(checkpoints.folder, other=tf.Variable(0.0))
    with pytest.raises(AssertionError):
        other.restore()


def test_worker_that_is_not_the_chief_leaves_the_folder_alone(tmp_path, variable):
    worker = Checkpoints(tmp_path / "checkpoints", is_chief=False, variable=variable)
    worker.save(1)
    assert list(tmp_path.iterdir()) == []
