import pytest

from training import fit, outputs

ROWS = [
    {"step": 7, "reconstruction_error": 1e-6, "block": "stage1/a", "gradient_angle": 0},
    {"step": 14, "reconstruction_error": 0.1, "block": "stage2", "gradient_angle": 0.5},
]


def edited(change, encoding="utf-8"):
    def damage(path):
        path.write_bytes(change(path.read_text()).encode(encoding))

    return damage


def make_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "semicolons": edited(lambda text: text.replace(",", ";")),
    "byte order mark": edited(lambda text: text, "utf-8-sig"),
    "other encoding": edited(lambda text: text, "utf-16"),
    "not utf-8": edited(lambda text: text.replace("stage2", "étage"), "latin-1"),
    "decimal comma": edited(lambda text: text.replace("0.1", '"0,1"')),
    "removed column": edited(lambda text: text.replace("step,", "").replace("7,", "")),
    "added column": edited(lambda text: text.replace("\n", ",note\n")),
    "other order": edited(lambda text: text.replace("step,recon", "recon,step")),
    "cut line": edited(lambda text: text[:-10]),
    "cut number": edited(lambda text: text[:-1]),
    "blank line": edited(lambda text: text + "\n"),
    "null": edited(lambda text: text.replace("7", "\0")),
    "open quote": edited(lambda text: text.replace("stage2", '"stage2')),
    "empty": edited(lambda text: ""),
    "folder": make_folder,
}


@pytest.fixture
def table(tmp_path):
    outputs.write_table(tmp_path / "table.csv", ROWS)
    return tmp_path / "table.csv"


def test_table_comes_back_with_its_types(table, capsys):
    assert outputs.read_own_table(table, fit.REVERSIBILITY) == ROWS
    assert capsys.readouterr().err == ""


def test_missing_table_has_no_rows(tmp_path):
    assert outputs.read_own_table(tmp_path / "none.csv", fit.REVERSIBILITY) == []


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_table_is_put_aside_with_a_line(damage, table, capsys):
    damage(table)
    whole = table.is_file() and table.read_bytes()
    assert outputs.read_own_table(table, fit.REVERSIBILITY) == []
    aside = table.with_name("table-damaged-1.csv")
    assert list(table.parent.iterdir()) == [aside]
    assert (aside.is_file() and aside.read_bytes()) == whole
    err = capsys.readouterr().err
    assert err == f"{table} is not the table that this run wrote; it is now {aside}\n"


def test_second_damaged_table_does_not_replace_the_first(table):
    for content in ("first", "second"):
        table.write_text(content)
        outputs.read_own_table(table, fit.REVERSIBILITY)
    found = {path.name: path.read_text() for path in table.parent.iterdir()}
    assert found == {"table-damaged-1.csv": "first", "table-damaged-2.csv": "second"}


def test_rows_of_an_older_version_can_have_fewer_columns(table):
    rows = [{"step": 1}, {"step": 2, "seconds": 0.5}]
    outputs.write_table(table, rows)
    assert table.read_text() == "step,seconds\n1,\n2,0.5\n"
