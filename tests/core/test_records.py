"""Record files survive a kill in the middle of a line, and are cut at the step a run resumes from."""

import logging
from pathlib import Path

import pytest

from core.records import append_records, keep_up_to, open_records, read_records


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    append_records(path, [{"step": step, "text": "ä\nb"} for step in range(5)])
    append_records(path, [{"step": 4, "text": "evaluation"}])
    return path


def test_records_come_back_in_order(path: Path) -> None:
    assert [record["step"] for record in read_records(path)] == [0, 1, 2, 3, 4, 4]
    assert read_records(path)[0]["text"] == "ä\nb"


def test_every_torn_last_line_is_left_out(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with caplog.at_level(logging.WARNING):
            assert len(read_records(path)) == 5
        assert f"{path}:6: left out the torn last line ({cut - last} bytes)" in caplog.text


def test_a_broken_line_elsewhere_is_an_error(path: Path) -> None:
    path.write_text(path.read_text().replace('{"step": 2', '"step": 2'))
    with pytest.raises(ValueError, match=r"records\.jsonl:3: not a JSON record"):
        read_records(path)


def test_cutting_keeps_the_resumed_step(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open(path, "a") as file:
        file.write('{"step": 5, "te')
    with caplog.at_level(logging.INFO):
        assert keep_up_to(path, 2) == 3
    assert "dropped 3 records after step 2" in caplog.text
    assert [record["step"] for record in read_records(path)] == [0, 1, 2]
    append_records(path, [{"step": 3}])
    assert read_records(path)[-1] == {"step": 3}


def test_cutting_repairs_a_torn_line_even_when_no_record_goes(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step"')
    assert keep_up_to(path, 4) == 0
    assert path.read_bytes() == whole


def test_a_fresh_run_refuses_an_older_ones_records(path: Path) -> None:
    with pytest.raises(FileExistsError, match="resume that run, or choose another output folder"):
        open_records(path, None)
    open_records(path, -1)
    assert read_records(path) == []
    open_records(path, None)
    open_records(path.with_name("absent") / "records.jsonl", 3)
