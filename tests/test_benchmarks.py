"""The benchmarks start and measure what they claim, and the documents show what they measured."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from minivit.checkpoints.hub import DEMO

sys.path.insert(0, str(ROOT / "benchmarks"))

import report
import results
import workloads
from results import Figure, Row


def run_in_root(*arguments: str) -> str:
    """Run Python in the root of the repository, and return what it prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return results.read_rows()


def make_row(seconds: float, *, line: int, **changes) -> Row:
    """Return a row of a benchmark that measured one time."""
    row = Row(
        benchmark="finetune",
        workload="a job",
        date="2026-01-02",
        commit="aaaaaaa",
        hardware="a GPU, 16 cores",
        versions={"torch": "2.6.0"},
        command="python benchmarks/finetune.py",
        figures={"minivit, time": Figure("s", 1, seconds)},
        line=line,
    )
    return dataclasses.replace(row, **changes)


def newest(rows: list[Row]) -> Figure:
    figure, _ = report.Measurement(rows, "finetune", "a job", "a GPU").figure("minivit, time")
    return figure


def test_all_benchmarks_start():
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    assert "throughput" in names
    run_in_root("-c", f"import sys; sys.path[:0] = ['benchmarks', '.']; import {', '.join(names)}")


def test_throughput_measures_our_loop_and_predictions(tmp_path):
    file = tmp_path / "rows.jsonl"
    printed = run_in_root(
        *("benchmarks/throughput.py", "--model", str(DEMO), "--device", "cpu", "--amp", "off"),
        *("--only", "train,kept,eval", "--photos", "4", "--batch", "4", "--runs", "2"),
        *("--no-compile", "--record", str(file), "--commit", "abc1234"),
    )
    (row,) = results.read_rows(file)
    names = [f"minivit {part}, batch 4, float32, speed" for part in ("train", "kept", "eval")]
    assert list(row.figures) == names
    for figure in row.figures.values():
        assert (figure.unit, figure.runs) == ("images/s", 2)
        assert 0 < figure.min <= figure.max
    assert row.commit == "abc1234"
    assert row.command.startswith("python benchmarks/throughput.py --model DIR --device cpu")
    assert str(tmp_path) not in file.read_text()
    assert file.read_text().strip() == printed.splitlines()[-1]  # to be copied back


def test_every_table_shows_what_was_measured(rows):
    for page in report.PAGES:
        text = page.read_text(encoding="utf-8")
        wrong = report.differing_tables(text, rows)
        assert not wrong, f"{page.name}, tables {wrong}: run python benchmarks/report.py"


def test_every_table_stands_in_one_of_the_pages():
    text = "".join(page.read_text(encoding="utf-8") for page in report.PAGES)
    assert sorted(report.TABLE.findall(text)) == sorted(set(report.TABLE.findall(text)))
    assert {name for name, _ in report.TABLE.findall(text)} == set(report.TABLES)


def test_no_table_of_the_page_is_written_by_hand():
    text = report.TABLE.sub("", (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"))
    assert not [line for line in text.splitlines() if line.startswith(("|", "<sub>"))]


@pytest.mark.parametrize("name", report.TABLES)
def test_a_number_that_was_edited_by_hand_is_found(name, rows):
    for page in report.PAGES:
        text = page.read_text(encoding="utf-8")
        begin = report.BEGIN.format(name)
        if begin in text:
            before, _, after = text.partition(begin)
            table, end, rest = after.partition(report.END)
            last_digit = max(table.rfind(digit, 0, table.find("<sub>")) for digit in "123456789")
            edited = f"{table[:last_digit]}0{table[last_digit + 1 :]}"
            page_of_today = f"{before}{begin}{edited}{end}{rest}"
            assert report.differing_tables(page_of_today, rows) == [name]
            assert report.updated(page_of_today, rows) == text
            return
    pytest.fail(f"no page has a table {name!r}")


def test_the_share_of_the_time_that_the_readme_names_was_measured(rows):
    parts = {"fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = " ".join(readme.split())
    (named,) = re.findall(r"takes about an? (\w+) of the time", text)
    runs = report.Measurement(rows, "finetune", report.GPU_JOB, report.H200)
    theirs, source = runs.figure("transformers, time")
    ours = source.figures["minivit-cold, time"]
    assert abs(theirs.median / ours.median - parts[named]) < 0.5

    tuned = []
    for name in ("transformers-tuned", "transformers-tuned-256", "transformers-even"):
        theirs, source = runs.figure(f"{name}, time")
        tuned.append(theirs.median / source.figures["minivit-cold, time"].median)
    assert min(tuned) > 3
    assert "less than a third of a tuned one's" in text
    assert f"takes {min(tuned):.1f} to {max(tuned):.1f} times as long as `train.py`" in text


def test_a_newly_measured_row_makes_a_table_differ(rows):
    job = next(row for row in reversed(rows) if row.workload == report.GPU_JOB)
    figures = {**job.figures, "minivit-cold, time": Figure("s", 1, 9.87)}
    new = dataclasses.replace(job, commit="fffffff", date="2099-01-01", figures=figures)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.differing_tables(readme, [*rows, new]) == ["the whole job in short"]
    assert "| 9.9 |" in report.updated(readme, [*rows, new])


def test_check_names_the_table_that_differs(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    begin = report.BEGIN.format("the demo")
    page.write_text(f"{begin}\n| 1 |\n\n{report.END}\n")
    monkeypatch.setattr(report, "PAGES", (page,))
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    assert report.main() == 1
    assert "page.md, table 'the demo': differs" in capsys.readouterr().out
    assert "| 1 |" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["report.py"])
    assert report.main() == 0
    assert report.differing_tables(page.read_text(), results.read_rows()) == []


def test_the_plot_was_drawn_from_the_newest_row(rows):
    assert report.is_plot_current(rows)
    old = report.epochs(rows).rows[0]
    name = workloads.epoch_name(4096, 4, workloads.KEPT_NOTHING) + ", time"
    figures = {**old.figures, name: Figure("s", 1, 1.5)}
    new = dataclasses.replace(old, date="2099-01-01", figures=figures)
    assert not report.is_plot_current([*rows, new])


def test_the_newest_row_of_a_command_counts():
    old = make_row(5, line=1, commit="bbbbbbb")
    new = make_row(6, line=2)
    assert newest([old, new]).median == 6
    later = make_row(7, line=1, commit="bbbbbbb", date="2026-01-03")
    assert newest([later, new]).median == 7
    other_machine = make_row(1, line=3, hardware="another GPU, 16 cores")
    assert newest([old, new, other_machine]).median == 6


def test_of_rows_of_one_day_the_one_with_the_most_runs_counts():
    several = make_row(5, line=1, figures={"minivit, time": Figure("s", 2, 5, 4, 6)})
    single = make_row(7, line=2, command="python benchmarks/finetune.py --runs 1")
    assert newest([several, single]).median == 5
    assert newest([several, dataclasses.replace(single, date="2026-01-03")]).median == 7


def test_a_figure_that_the_newest_row_lacks_comes_from_an_older():
    old = make_row(5, line=1, command="python benchmarks/finetune.py --only minivit")
    new = make_row(6, line=2, figures={"transformers, time": Figure("s", 1, 60)})
    runs = report.Measurement([old, new], "finetune", "a job", "a GPU")
    cells = [[runs.cell("transformers, time")], [runs.cell("minivit, time")]]
    lines = report.table(["seconds"], cells)
    assert "rows 1" not in lines
    assert lines.count("torch 2.6.0") == 1  # Only the commands differ.
    assert lines.index("row 1: `python") < lines.index("row 2: `python")
    upgraded = make_row(6, line=3, versions={"torch": "2.14.1"})
    cells = [[report.Cell("6", upgraded)], [report.Cell("5", old)]]
    lines = report.table(["seconds"], cells)
    assert lines.index("row 1: torch 2.14.1") < lines.index("row 2: torch 2.6.0")


def test_rows_of_one_commit_are_runs_of_one_measurement():
    rows = [make_row(seconds, line=i) for i, seconds in enumerate((5, 9, 6))]
    assert newest(rows) == Figure("s", 3, 6, 5, 9)
    upgraded = make_row(2, line=9, versions={"torch": "2.14.1"})
    assert newest([*rows, upgraded]).median == 2


def test_a_ratio_is_taken_within_one_row():
    times = {"transformers, time": Figure("s", 1, 90), "minivit-cold, time": Figure("s", 1, 10)}
    old = make_row(1, line=1, command="all of it", figures=times)
    new = make_row(1, line=2, figures={"minivit-cold, time": Figure("s", 1, 20)})
    runs = report.Measurement([old, new], "finetune", "a job", "a GPU")
    labels = {"transformers": "theirs", "minivit-cold": "ours"}
    text = report.table_of_variants(runs, labels, {}, against="minivit-cold")
    assert "| theirs | 90.0 | 9.0 times |" in text
    assert "| ours | 20.0 | 1.0 times |" in text
    newer = make_row(
        1, line=4, command="theirs", figures={"transformers, time": Figure("s", 1, 80)}
    )
    runs = report.Measurement([old, new, newer], "finetune", "a job", "a GPU")
    assert "| theirs | 80.0 | |" in report.table_of_variants(
        runs, labels, {}, against="minivit-cold"
    )


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Row) if f.name != "line"])
def test_a_row_that_lacks_a_field_is_refused(field, tmp_path):
    file = tmp_path / "rows.jsonl"
    line = results.to_json(make_row(5, line=0, note="quiet"))
    fields = json.loads(line)
    del fields[field]
    file.write_text(f"{line}\n{json.dumps(fields)}\n")
    if field == "note":
        assert len(results.read_rows(file)) == 2
        return
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: .*{field}"):
        results.read_rows(file)


@pytest.mark.parametrize(
    "figure",
    [
        {"runs": 3, "median": 5},
        {"unit": "s", "median": 5},
        {"unit": "s", "runs": 3},
        {"unit": "seconds", "runs": 3, "median": 5},
        {"unit": "s", "runs": 0, "median": 5},
        {"unit": "s", "runs": 3, "median": 5, "min": 4},
        {"unit": "s", "runs": 3, "median": 5, "min": 6, "max": 7},
        {"unit": "s", "runs": 3, "median": 5, "mean": 5},
    ],
)
def test_a_figure_that_is_not_whole_is_refused(figure, tmp_path):
    file = tmp_path / "rows.jsonl"
    fields = json.loads(results.to_json(make_row(5, line=0)))
    fields["figures"]["minivit, time"] = figure
    file.write_text(json.dumps(fields) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1"):
        results.read_rows(file)


def test_a_row_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = make_row(5, line=1, note="quiet", figures={"x": results.figure_of([1, 2, 4.5], "ms")})
    file.write_text(results.to_json(row) + "\n")
    assert results.read_rows(file) == [row]


def test_a_row_needs_its_commit_also_without_git(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["finetune.py"])
    with pytest.raises(SystemExit):
        results.parse(argparse.ArgumentParser())
    assert "give --commit NAME" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--commit", "abc1234"])
    assert results.parse(argparse.ArgumentParser()).commit == "abc1234"
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--no-record"])
    assert results.parse(argparse.ArgumentParser()).record is None


def test_a_command_in_a_row_holds_no_path(tmp_path):
    words = ["benchmarks/finetune.py", f"--data={tmp_path}", "--model", str(tmp_path)]
    words += ["--record", str(tmp_path / "rows.jsonl"), "--commit=abc", "--runs", "1"]
    words += [str(tmp_path / "cat.jpg"), str(tmp_path)]
    command = "python benchmarks/finetune.py --data DIR --model DIR --runs 1 cat.jpg FOLDER"
    assert results.command_line(words) == command
