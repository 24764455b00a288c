"""Parquet files and `save_to_disk` folders. The tables are made by pyarrow, in the layout that `datasets` writes."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from core.failures import DataError
from pretrain.data.config import SourceConfig
from pretrain.data.sources import open_sources
from pretrain.data.tables import dataset_files
from tests.pretrain.data.data_files import config_of, encoded, picture


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    source = SourceConfig(kind="parquet", task="t2i", paths=[str(tmp_path / "a.parquet")])
    with pytest.raises(DataError, match=r"kind parquet needs pyarrow: pip install 'unipic-rl\[tables\]'"):
        open_sources(config_of(tmp_path, source))


def t2i_columns(count, first=0):
    numbers = range(first, first + count)
    return {
        "image": [{"bytes": encoded(picture(n, 40 + n, 40)), "path": f"{n}.png"} for n in numbers],
        "short": [f"short {n}" for n in numbers],
        "long": [f"long {n}" if n % 2 else None for n in numbers],
    }


def edit_columns(count):
    return {
        "before": [encoded(picture(n)) for n in range(count)],
        "after": [encoded(picture(n + 100)) for n in range(count)],
        "text": [f"instruction {n}" for n in range(count)],
    }


def write_parquet(path, columns, rows_in_group=2):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_in_group)
    return path


def write_folder(folder, *parts, **state):
    """As `Dataset.save_to_disk` lays it out: Arrow streams in several record batches, and state.json."""
    folder.mkdir(parents=True)
    names = []
    for i, columns in enumerate(parts):
        names.append(f"data-{i:05d}-of-{len(parts):05d}.arrow")
        table = pyarrow.table(columns)
        with (
            pyarrow.OSFile(str(folder / names[-1]), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as out,
        ):
            out.write_table(table, max_chunksize=2)
    record = {"_data_files": [{"filename": name} for name in names], "_split": "train"} | state
    (folder / "state.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "dataset_info.json").write_text("{}", encoding="utf-8")
    return folder


def source_of(kind, task, path, **fields):
    return SourceConfig(kind=kind, task=task, paths=[str(path)], **fields)


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_captions_and_pictures_of_a_table_are_read_by_row(tmp_path, kind):
    if kind == "parquet":
        write_parquet(tmp_path / "a.parquet", t2i_columns(3))
        write_parquet(tmp_path / "b.parquet", t2i_columns(2, first=3))
        path = tmp_path / "*.parquet"
    else:
        path = write_folder(tmp_path / "set", t2i_columns(3), t2i_columns(2, first=3))
    config = config_of(tmp_path, source_of(kind, "t2i", path, captions=["short", "long"]))
    (source,) = open_sources(config)
    assert len(source) == 5
    for n in (4, 0, 3, 1, 2):
        assert source.texts(n) == ((f"short {n}", f"long {n}") if n % 2 else (f"short {n}",))
        (read,) = source.pictures(n)
        assert read.tobytes() == picture(n, 40 + n, 40).tobytes()
    assert list(source.widths) == [40, 41, 42, 43, 44]


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_edits_of_a_table_have_plain_bytes_too(tmp_path, kind):
    path = tmp_path / "edits"
    _ = write_parquet(path, edit_columns(3)) if kind == "parquet" else write_folder(path, edit_columns(3))
    fields = {"source": "before", "target": "after", "instruction": "text"}
    (source,) = open_sources(config_of(tmp_path, source_of(kind, "edit", path, **fields)))
    before, after = source.pictures(2)
    assert source.texts(2) == ("instruction 2",)
    assert before.tobytes() == picture(2).tobytes()
    assert after.tobytes() == picture(102).tobytes()


def test_rows_without_bytes_or_text_are_corrupt_by_name(tmp_path):
    columns = t2i_columns(4)
    columns["image"][1] = {"bytes": None, "path": "elsewhere.png"}
    columns["short"][3] = ""
    path = write_parquet(tmp_path / "a.parquet", columns)
    config = config_of(tmp_path, source_of("parquet", "t2i", path, captions=["short"]), max_corrupt_share=0.5)
    (source,) = open_sources(config)
    assert [(key, reason) for _, key, reason in source.index.corrupt] == [
        ("row group 0 row 1", "image holds no bytes, only the path 'elsewhere.png': embed the files"),
        ("row group 1 row 1", "no text in short"),
    ]


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_wrong_columns_and_broken_files_are_errors_by_name(tmp_path, kind):
    path = tmp_path / "data"
    _ = write_parquet(path, t2i_columns(2)) if kind == "parquet" else write_folder(path, t2i_columns(2))
    with pytest.raises(DataError, match=r"no column picture, caption; it has image, short, long"):
        open_sources(config_of(tmp_path, source_of(kind, "t2i", path, image="picture")))
    file = path if kind == "parquet" else next(path.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"not a whole (Parquet file|Arrow stream)"):
        open_sources(config_of(tmp_path, source_of(kind, "t2i", path, captions=["short"])))


def test_folders_that_are_no_single_split_are_refused(tmp_path):
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"several splits; name one of .*dict/train, .*dict/test"):
        dataset_files(tmp_path / "dict")
    with pytest.raises(DataError, match=r"not a folder of Dataset.save_to_disk"):
        dataset_files(tmp_path)
    state = {"_data_files": [{"filename": "a.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"names files that are missing: .*a\.arrow"):
        dataset_files(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps(state | {"_indices_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(DataError, match=r"flatten_indices"):
        dataset_files(tmp_path)
