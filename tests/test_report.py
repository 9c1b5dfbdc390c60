"""The report on the reader's machine: its table and picture show what was measured."""

import csv
import sys

import pytest

from benchmarks import processes, report


@pytest.fixture(scope="module")
def measured():
    """One real measurement of each kind; the others need the same minute each."""
    return {
        "memory": processes.run("report", "memory", "sequence", 2, 8),
        "time": processes.run("report", "time", 2, 8, 1),
    }


@pytest.mark.thorough
def test_a_process_measures_the_memory_of_a_step_and_the_time_of_all_ways(measured):
    assert measured["memory"] > 2**26  # TensorFlow itself
    seconds = measured["time"]
    assert set(seconds) == {*report.WAYS, "forward"}
    assert min(seconds.values()) > 0


@pytest.mark.thorough
def test_table_and_picture_show_the_numbers_of_the_csv(
    measured, tmp_path, monkeypatch, capsys
):
    def run(module, kind, *arguments):
        assert module == "report"
        if kind == "time":
            return dict(measured["time"])
        way, num_blocks, batch_size = arguments
        slope = num_blocks * (1 + list(report.WAYS).index(way)) * 2**20
        return measured["memory"] + slope * batch_size

    monkeypatch.setattr(processes, "run", run)
    argv = "report --processes 1 --blocks 2 5 --output".split()
    monkeypatch.setattr(sys, "argv", [*argv, str(tmp_path / "r")])
    report.main()

    with open(tmp_path / "r" / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["num_blocks"]) for row in rows] == [2] * 4 + [5] * 4
    of = {(row["way"], int(row["num_blocks"])): row for row in rows}
    assert float(of["remat", 5]["bytes_per_sample"]) == 5 * 2 * 2**20
    seconds = measured["time"]
    bound = (seconds["ordinary"] + seconds["forward"]) / seconds["ordinary"]
    assert float(of["bound", 2]["ratio"]) == pytest.approx(bound, 1e-3)

    text = (tmp_path / "r" / "report.md").read_text()
    printed = capsys.readouterr().out
    assert text in printed
    assert "[14/14] 5 blocks" in printed
    device = rows[0]["device"]
    assert text.startswith(device)
    for way, name in report.ROWS.items():
        (line,) = [x for x in text.splitlines() if x.startswith(f"| {name} |")]
        _, *memory, time2, time5 = [cell.strip() for cell in line[1:-1].split("|")]
        assert [time2, time5] == [f"{float(of[way, n]['ratio']):.2f}" for n in (2, 5)]
        sizes = [of[way, n]["bytes_per_sample"] for n in (2, 5)]
        assert memory == [f"{int(s) / 2**20:.2f}" if s else "" for s in sizes]

    figure = report.draw(rows)
    assert device in figure.get_suptitle()
    memory_panel, time_panel = figure.axes
    for panel, column, scale, ways in (
        (memory_panel, "bytes_per_sample", 2**20, list(report.WAYS)),
        (time_panel, "step_seconds", 1, list(report.ROWS)),
    ):
        drawn = {line.get_label(): list(line.get_ydata()) for line in panel.lines}
        assert all(list(line.get_xdata()) == [2, 5] for line in panel.lines)
        assert drawn == {
            report.ROWS[way].replace("`", ""): [
                float(of[way, n][column]) / scale for n in (2, 5)
            ]
            for way in ways
        }
    assert (tmp_path / "r" / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags", ["--rounds 0", "--blocks 4 0", "--output setup.cfg"])
def test_wrong_use_is_one_line_before_anything_is_measured(flags, monkeypatch, capsys):
    monkeypatch.setattr(processes, "run", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["report", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        report.main()
    assert ended.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert flags.split()[0] in line
