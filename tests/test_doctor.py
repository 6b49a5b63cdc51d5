"""`tombola doctor` tries what runs need, and says of what would fail how it is mended."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.errors import UserError
from data.files import Folder
from launch import checkups, locks
from launch.cli import run_command


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))


def found(check: Callable[[], checkups.Finding]) -> tuple[str, str]:
    """The state, and all that is said."""
    finding = check()
    return finding.state, f"{finding.found}; {finding.remedy}"


def test_all_is_tried_and_nothing_is_left_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --json one document; the folder of the runs is made only for the moment."""
    root = tmp_path / "runs"
    assert run_command(["doctor", "--root", str(root), "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    states = {finding["what"]: finding["state"] for finding in findings}
    assert not root.exists()
    assert states["gloo"] == states["runs"] == states["software"] == "ok"
    assert set(states.values()) <= {"ok", "note"}
    assert all(finding["remedy"] for finding in findings if finding["state"] == "note")
    assert not dist.is_initialized()


def test_what_fails_is_said_and_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest is tried all the same."""

    def broken() -> checkups.Finding:
        raise RuntimeError("no such library\nand much more")

    monkeypatch.setattr(checkups, "_gloo", broken)
    monkeypatch.setattr(
        checkups, "_compiler", lambda: checkups.Finding("torch.compile", "ok", "fine")
    )
    assert run_command(["doctor", "--root", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "RuntimeError: no such library" in told
    assert "much more" not in told
    assert "1 of these would fail" in told
    assert "locks work" in " ".join(told.split())
    assert not list(tmp_path.glob(".doctor*"))


def test_a_folder_that_cannot_be_written_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    state, told = found(lambda: checkups._runs(str(tmp_path / "file/runs")))
    assert state == "fails"
    assert "choose another --root" in told
    read = Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, name: read(self, name)[:-1])
    state, told = found(lambda: checkups._runs(str(tmp_path)))
    assert (state, "gives back other bytes" in told) == ("fails", True)


def test_a_folder_without_locks_or_space_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    with monkeypatch.context() as patch:
        patch.setattr(locks.fcntl, "flock", no_locks)
        assert found(lambda: checkups._runs(str(tmp_path)))[0] == "note"
    monkeypatch.setattr(checkups, "_LITTLE_SPACE", 1 << 60)
    state, told = found(lambda: checkups._runs(str(tmp_path)))
    assert (state, "a level keeps several" in told) == ("note", True)
    assert found(lambda: checkups._runs("memory://bucket/runs"))[0] == "note"


def test_what_is_not_installed_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_dali() -> None:
        raise UserError("not installed")

    monkeypatch.setattr(checkups, "require_dali", no_dali)
    assert found(checkups._dali)[0] == "note"
    monkeypatch.setattr(
        checkups, "_EXTRAS", {"x": ("no_such.module", "nothing"), "y": ("json", "")}
    )
    state, told = found(checkups._packages)
    assert (state, "pip install 'tombola[x]'" in told) == ("note", True)
    monkeypatch.setattr(checkups, "software_versions", lambda: {"timm": "not installed"})
    assert found(checkups._software) == ("fails", "timm not installed; pip install timm")


def test_dali_that_cannot_decode_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkups, "require_dali", lambda: None)
    monkeypatch.setattr(checkups, "decode_with_dali", lambda contents: ["no kernel image"])
    state, told = found(checkups._dali)
    assert (state, "no kernel image" in told) == ("fails", True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_driver_that_torch_cannot_use_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any is only told so."""
    monkeypatch.setattr(checkups.shutil, "which", lambda name: None)
    monkeypatch.setattr(checkups.os.path, "exists", lambda path: False)
    assert found(checkups._gpus)[0] == "note"
    monkeypatch.setattr(checkups.shutil, "which", lambda name: f"/usr/bin/{name}")
    state, told = found(checkups._gpus)
    assert (state, "update the driver" in told) == ("fails", True)


def test_a_missing_compiler_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: torch.nn.Module) -> None:
        model.forward = lambda x: (_ for _ in ()).throw(RuntimeError("no g++"))  # type: ignore[method-assign]

    monkeypatch.setattr(checkups, "compile_in_place", broken)
    state, told = found(checkups._compiler)
    assert (state, "train.compile = false" in told) == ("note", True)


def test_small_limits_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkups, "_LITTLE_SHARED", 1 << 60)
    monkeypatch.setattr(checkups, "_FEW_FILES", 1 << 60)
    assert found(checkups._shared_memory)[0] == "note"
    assert "ulimit -n" in found(checkups._open_files)[1]


def test_a_host_name_that_leads_nowhere_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo would take it for the address that other nodes reach."""

    def unknown(name: str) -> str:
        raise OSError("unknown")

    if not checkups._network().found.startswith("loopback"):
        monkeypatch.setattr(checkups.socket, "gethostbyname", unknown)
        state, told = found(checkups._network)
        assert (state, "tombola launch" in told) == ("note", True)
        monkeypatch.setattr(checkups.socket, "gethostbyname", lambda name: "10.0.0.7")
        assert found(checkups._network)[0] == "ok"
    monkeypatch.setattr(checkups.psutil, "net_if_addrs", dict)
    assert "loopback alone" in found(checkups._network)[1]
