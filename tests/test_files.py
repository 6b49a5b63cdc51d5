"""Files of a run: written whole or not at all, and a journal that survives a crash."""

import errno
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from data.errors import RunError
from data.files import Folder, Journal


@pytest.fixture(params=["path", "file-url", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder on each kind of storage, which does not exist yet."""
    urls = {
        "path": str(tmp_path / "run"),
        "file-url": f"file://{tmp_path}/run",
        "memory": f"memory://{uuid.uuid4().hex}",
    }
    return Folder(urls[request.param])


@pytest.fixture
def local(tmp_path: Path) -> Folder:
    """An empty folder on the local disk."""
    return Folder(tmp_path / "run")


@pytest.fixture
def remote() -> Folder:
    """An empty folder on storage that is not the local disk."""
    return Folder(f"memory://{uuid.uuid4().hex}")


def path_of(folder: Folder) -> Path:
    """Where a local folder is."""
    assert folder.local_path is not None
    return folder.local_path


# ---- folders


def test_what_was_written_is_read_back(folder: Folder) -> None:
    """Any bytes, none, and a second version of the same file."""
    for content in (bytes(range(256)) * 5, b"", b"second"):
        folder.write("a.bin", content)
        assert folder.read("a.bin") == content
    assert folder.names() == ["a.bin"]


def test_writing_makes_the_folders_above(folder: Folder) -> None:
    """Also those inside a name; a folder below is the same place."""
    folder.write("imp/level-0/ticket.json", b"{}")
    assert (folder / "imp" / "level-0").read("ticket.json") == b"{}"
    assert (folder / "imp/level-0").names() == ["ticket.json"]
    assert folder.names() == ["imp"]


def test_names_are_sorted_and_those_directly_inside(folder: Folder) -> None:
    """Files and folders alike, without their paths."""
    for name in ("b.txt", "c/deep/x", "a.txt", "step-00000010/x", "step-00000009/x"):
        folder.write(name, b"")
    assert folder.names() == ["a.txt", "b.txt", "c", "step-00000009", "step-00000010"]


def test_a_folder_that_is_not_there_has_no_names_and_no_files(folder: Folder) -> None:
    """Looking does not make it."""
    assert not folder.exists()
    assert folder.names() == []
    assert not folder.exists("a")
    for look in (folder.read, folder.digest, folder.read_json):
        with pytest.raises(FileNotFoundError):
            look("a")
    assert not folder.exists()


def test_existence_follows_writing_and_removing(folder: Folder) -> None:
    """Of a file, of a folder with all that is in it, and of the whole; twice is no error."""
    folder.write("a", b"1")
    folder.write("sub/deep/b", b"2")
    folder.write("subway", b"3")
    assert all(folder.exists(name) for name in ("", "a", "sub", "sub/deep/b"))
    folder.remove("a")
    folder.remove("sub")
    folder.remove("sub")
    assert folder.names() == ["subway"]
    folder.remove()
    folder.remove()
    assert not folder.exists()


def test_a_made_folder_exists_and_is_empty(folder: Folder) -> None:
    """Making it again is no error."""
    folder.make()
    folder.make()
    assert folder.exists()
    assert folder.names() == []


def test_json_documents_are_read_back(folder: Folder) -> None:
    """Ending in a newline, as text files do."""
    document = {"a": [1, 2.5, None], "ü": {"b": "\n"}}
    folder.write_json("d.json", document)
    assert folder.read_json("d.json") == document
    assert folder.read("d.json").endswith(b"\n")
    folder.write("torn.json", b'{"a": [1, ')
    with pytest.raises(ValueError, match="Expecting"):
        folder.read_json("torn.json")


def test_the_digest_is_sha256(folder: Folder) -> None:
    """The published test vector of `abc`, and a file of several blocks."""
    folder.write("abc", b"abc")
    assert (
        folder.digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    folder.write("large", b"x" * 1_000_003)
    assert folder.digest("large") == hashlib.sha256(b"x" * 1_000_003).hexdigest()


def test_a_folder_prints_as_its_url_without_a_slash_at_the_end(tmp_path: Path) -> None:
    """As it was given, so that it can be pasted back."""
    assert str(Folder("memory://bucket/run/")) == "memory://bucket/run"
    assert str(Folder("memory://bucket") / "a/b") == "memory://bucket/a/b"
    assert str(Folder(tmp_path)) == str(tmp_path)


def test_only_a_local_folder_has_a_path(tmp_path: Path, remote: Folder) -> None:
    """As a path or as a URL."""
    for url in (tmp_path / "x", f"{tmp_path}/x/", f"file://{tmp_path}/x"):
        assert Folder(url).is_local
        assert Folder(url).local_path == tmp_path / "x"
    assert not remote.is_local
    assert remote.local_path is None


def test_a_relative_path_and_the_home_folder_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder stays where it was when the process changes its directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Folder("~/runs").local_path == tmp_path / "home" / "runs"
    monkeypatch.chdir(tmp_path)
    folder = Folder("runs/a")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder.write("x", b"1")
    assert (tmp_path / "runs" / "a" / "x").read_bytes() == b"1"


def test_the_root_of_a_remote_storage_is_remote() -> None:
    """`memory://` is not a folder of the current directory."""
    assert not Folder("memory://").is_local


# ---- writing whole or not at all


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_content_and_no_rubbish(
    local: Folder, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """A full disk at any point before the rename."""
    local.write("ticket.json", b"old")

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="No space left"):
            local.write("ticket.json", b"new and longer")
        with pytest.raises(OSError, match="No space left"):
            local.write("other.json", b"new")
    assert os.listdir(path_of(local)) == ["ticket.json"]
    assert local.read("ticket.json") == b"old"
    local.write("ticket.json", b"new")  # and the next attempt succeeds
    assert os.listdir(path_of(local)) == ["ticket.json"]
    assert local.read("ticket.json") == b"new"


def test_until_the_rename_a_reader_sees_the_old_content(
    local: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the moment of the rename the new content is whole, synced, and in the same folder."""
    local.write("a/ticket.json", b"old")
    events: list[str] = []
    replace, fsync = os.replace, os.fsync

    def recording_fsync(descriptor: int) -> None:
        events.append("fsync")
        fsync(descriptor)

    def recording_replace(source: Path, target: Path) -> None:
        assert events == ["fsync"]
        assert Path(target).read_bytes() == b"old"
        assert Path(source).read_bytes() == b"new"
        assert Path(source).parent == Path(target).parent
        replace(source, target)
        events.append("replace")

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    local.write("a/ticket.json", b"new")
    assert local.read("a/ticket.json") == b"new"
    assert events == ["fsync", "replace", "fsync"]  # the file, then its folder


def test_an_interrupted_remote_write_leaves_the_old_content(
    remote: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One PUT and no rename: a failure before it leaves the object as it was."""
    remote.write("a", b"old")
    calls: list[bytes] = []

    def fail(path: str, value: bytes, **options: Any) -> None:
        calls.append(value)
        raise OSError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(remote._fs, "pipe_file", fail)
        with pytest.raises(OSError, match="connection lost"):
            remote.write("a", b"new")
    assert calls == [b"new"]
    assert remote.read("a") == b"old"
    assert remote.names() == ["a"]


# ---- journals


def test_a_journal_is_one_json_object_a_line(folder: Folder) -> None:
    """In the order in which they were added, newlines inside a string escaped."""
    journal = Journal(folder, "metrics.jsonl")
    assert journal.records == []
    journal.append({"step": 1, "loss": 0.5})
    journal.append({"text": "two\nlines\r\n\u2028"})
    journal.close()
    lines = folder.read("metrics.jsonl").decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"step": 1, "loss": 0.5},
        {"text": "two\nlines\r\n\u2028"},
    ]
    assert lines[-1] == ""


def test_a_journal_that_is_opened_again_goes_on(folder: Folder) -> None:
    """It knows the records that are there and appends to them."""
    for step in range(3):
        journal = Journal(folder, "metrics.jsonl")
        assert journal.records == [{"step": earlier} for earlier in range(step)]
        journal.append({"step": step})
        journal.close()
    assert folder.read("metrics.jsonl") == b'{"step": 0}\n{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2}', b"{", b"\x00\x00"])
def test_a_torn_last_line_is_dropped(folder: Folder, torn: bytes) -> None:
    """Also one that lacks nothing but its newline; what is added then stands on its own line."""
    folder.write("metrics.jsonl", b'{"step": 0}\n{"step": 1}\n' + torn)
    journal = Journal(folder, "metrics.jsonl")
    assert journal.records == [{"step": 0}, {"step": 1}]
    journal.append({"step": 9})
    journal.close()
    assert folder.read("metrics.jsonl") == b'{"step": 0}\n{"step": 1}\n{"step": 9}\n'


def test_a_journal_that_holds_only_a_torn_line_starts_anew(folder: Folder) -> None:
    """The crash came in the very first line."""
    folder.write("metrics.jsonl", b'{"st')
    journal = Journal(folder, "metrics.jsonl")
    assert journal.records == []
    journal.close()
    assert folder.read("metrics.jsonl") == b""


def test_a_line_reaches_the_local_file_at_once(local: Folder) -> None:
    """Without a sync: a killed process loses none."""
    journal = Journal(local, "metrics.jsonl")
    journal.append({"step": 0})
    assert (path_of(local) / "metrics.jsonl").read_bytes() == b'{"step": 0}\n'
    journal.close()


def test_a_sync_makes_the_lines_so_far_readable(folder: Folder) -> None:
    """On remote storage too, and what comes after is still appended."""
    journal = Journal(folder, "metrics.jsonl")
    journal.append({"step": 0})
    journal.sync()
    assert folder.read("metrics.jsonl") == b'{"step": 0}\n'
    journal.append({"step": 1})
    journal.sync()
    assert folder.read("metrics.jsonl") == b'{"step": 0}\n{"step": 1}\n'
    journal.close()


def test_a_damaged_line_in_the_middle_is_an_error(folder: Folder) -> None:
    """Only the last line can be torn by a crash; anything else is not passed over."""
    folder.write("metrics.jsonl", b'{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: damaged"):
        Journal(folder, "metrics.jsonl")
    assert folder.read("metrics.jsonl") == b'{"step": 0}\n{"st\n{"step": 2}\n'
