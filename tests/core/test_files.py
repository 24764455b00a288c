"""Files and folders are whole or absent, and verification names what is wrong."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from core.files import (
    COMPLETE,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    file_sha256,
    folder_manifest,
    new_folder,
    publish_folder,
    verify_folder,
)


def make_folder(folder: Path) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights.bin").write_bytes(b"weights" * 1000)
    (folder / "state.json").write_text("{}")
    return folder


def test_write_replaces_the_content_and_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    atomic_write_text(path, "eins")
    atomic_write_text(path, "zwei é")
    assert path.read_bytes() == "zwei é".encode()
    assert os.listdir(path.parent) == ["file.txt"]


def test_mode_bits_follow_the_umask(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / "atomic", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_whose_filling_fails_leaves_the_old_one_and_no_litter(tmp_path: Path) -> None:
    with new_folder(tmp_path / "step_1") as folder:
        make_folder(folder)
    with pytest.raises(OSError, match="disk full"), new_folder(tmp_path / "step_1") as folder:
        (folder / "state.json").write_text("{")
        raise OSError("disk full")
    assert os.listdir(tmp_path) == ["step_1"] and verify_folder(tmp_path / "step_1") == []


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_folder_cut_or_flipped_anywhere_is_not_sound(tmp_path: Path, how: str) -> None:
    """At 50 places, spread over every file and the manifest."""
    folder = tmp_path / "step_1"
    with new_folder(folder) as filled:
        make_folder(filled)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    tried = 0
    for path, size in zip(files, sizes, strict=True):
        sound = path.read_bytes()
        for offset in sorted({size * k // 24 for k in range(24)}):
            wrong = bytearray(sound)
            wrong[offset] ^= 1 << offset % 8
            path.write_bytes(sound[:offset] if how == "cut" else bytes(wrong))
            problems = verify_folder(folder)
            assert problems and str(folder) in problems[0], (path, offset)
            tried += 1
        path.write_bytes(sound)
    assert tried == 50 and verify_folder(folder) == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "file.json"
    atomic_write_json(path, {"old": True})

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(f"core.files.os.{failing}", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write_json(path, {"old": False})
    assert json.loads(path.read_text()) == {"old": True}
    assert os.listdir(tmp_path) == ["file.json"]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert not os.listdir(tmp_path)


def test_sums_and_manifest(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder")
    expected = hashlib.sha256(b"weights" * 1000).hexdigest()
    assert file_sha256(folder / "adapter" / "weights.bin") == expected
    assert folder_manifest(folder) == {
        "adapter/weights.bin": expected,
        "state.json": hashlib.sha256(b"{}").hexdigest(),
    }
    with pytest.raises(NotADirectoryError, match="state.json"):
        folder_manifest(folder / "state.json")


def test_published_folder_verifies(tmp_path: Path) -> None:
    final = tmp_path / "checkpoints" / "step_000010"
    manifest = publish_folder(make_folder(tmp_path / "filling"), final)
    assert not (tmp_path / "filling").exists()
    assert json.loads((final / COMPLETE).read_text()) == manifest == folder_manifest(final)
    assert verify_folder(final) == []


def test_publishing_replaces_an_older_folder(tmp_path: Path) -> None:
    final = tmp_path / "step_000010"
    publish_folder(make_folder(tmp_path / "filling"), final)
    newer = make_folder(tmp_path / "filling")
    (newer / "state.json").write_text('{"newer": true}')
    publish_folder(newer, final)
    assert (final / "state.json").read_text() == '{"newer": true}'
    assert verify_folder(final) == []
    assert os.listdir(tmp_path) == ["step_000010"]


def test_a_kill_before_the_rename_leaves_nothing_that_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "step_000010"

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("core.files.os.rename", killed)
    with pytest.raises(KeyboardInterrupt):
        publish_folder(make_folder(tmp_path / "filling"), final)
    assert verify_folder(final) == [f"{final}: no such folder"]


def test_verification_names_every_difference(tmp_path: Path) -> None:
    final = tmp_path / "final"
    publish_folder(make_folder(tmp_path / "filling"), final)
    (final / "state.json").write_text("{ }")
    (final / "adapter" / "weights.bin").unlink()
    (final / "surplus.pt").write_text("")
    missing, changed, surplus = verify_folder(final)
    assert missing == f"{final}/adapter/weights.bin: missing"
    assert changed.startswith(f"{final}/state.json: changed")
    assert surplus == f"{final}/surplus.pt: not in the manifest"


@pytest.mark.parametrize("name", [".DS_Store", ".nfs0000000000000001", "adapter/notes.txt"])
def test_a_file_beside_the_manifest_is_a_remark(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    final = tmp_path / "final"
    publish_folder(make_folder(tmp_path / "filling"), final)
    (final / name).write_text("")
    assert verify_folder(final) == []
    assert f"not being in its manifest: {name}" in caplog.text


def test_what_a_file_system_leaves_behind_gets_into_no_manifest(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "filling")
    (folder / ".nfs0000000000000001").write_text("")
    publish_folder(folder, tmp_path / "final")
    (tmp_path / "final" / ".nfs0000000000000001").unlink()
    assert verify_folder(tmp_path / "final") == []


@pytest.mark.parametrize("marker", ["", "[1]", '{"state.json"'])
def test_verification_refuses_a_broken_marker(tmp_path: Path, marker: str) -> None:
    folder = make_folder(tmp_path / "folder")
    assert "never finished" in verify_folder(folder)[0]
    (folder / COMPLETE).write_text(marker)
    (problem,) = verify_folder(folder)
    assert "not a JSON manifest" in problem
