"""Checkpoints: whole or nothing, no foreign code, what is kept stays; saved beside the training."""

import errno
import hashlib
import io
import json
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from processes import run_ranks
from states import state_of

from data.errors import RunError, StoreError
from data.files import Folder
from train.checkpoint import Checkpoints
from train.engine import Engine
from train.manifest import manifest_digest
from train.ranks import ALONE, Ranks
from train.safe_dcp import _MetadataUnpickler, read_tensors
from train.staging import Background
from train.state import TrainState

T = TypeVar("T")
STATE: dict[str, Any] = {
    "model": {"a.weight": torch.arange(6.0).view(2, 3), "a.count": torch.tensor(7)},
    "optimizer": {"state": {}, "groups": {"0": {"lr": 0.1, "betas": [0.9, 0.95], "foreach": None}}},
    "mask": torch.tensor([True, False, True]),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "ranks": {"0": {"rng": torch.arange(4, dtype=torch.uint8)}},
    "progress": {"step": 3, "exact": 0.1 + 0.2},
}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(Folder(tmp_path), Engine(), keep=2)


def save(checkpoints: Checkpoints, step: int, *, kept: bool = False) -> None:
    """A save that is committed."""
    checkpoints.save(step, STATE, kept=kept)
    checkpoints.wait()


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return bool(left == right)


def test_a_state_comes_back_as_it_was(checkpoints: Checkpoints) -> None:
    """Tensors of any type and size, nested values, empty dicts, `None`, floats to the last bit."""
    save(checkpoints, 3)
    assert checkpoints.latest() == 3
    assert same(checkpoints.load(3), STATE)


def test_a_state_on_an_object_store_comes_back_as_it_was() -> None:
    """The same through fsspec; `memory://` stands for any store without renames."""
    checkpoints = Checkpoints(Folder("memory://bucket/run"), Engine(), keep=1)
    for step in (3, 6):
        save(checkpoints, step)
    assert checkpoints.latest() == 6
    assert same(checkpoints.load(6), STATE)
    assert checkpoints.folder.names() == ["step-00000006"]


def test_rolling_deletion_never_touches_a_kept_one(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Of five saves the last two and the kept one are there."""
    for step in range(1, 6):
        save(checkpoints, step, kept=step == 2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000005"]


def test_what_an_interrupted_save_left_does_not_push_out_a_whole_one(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Half a checkpoint is removed, and does not count among those that are kept."""
    save(checkpoints, 1)
    save(checkpoints, 2)
    (tmp_path / "step-00000002/manifest.json").unlink()
    assert checkpoints.latest() == 1
    save(checkpoints, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_saving_a_step_again_keeps_the_valid_checkpoint(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """It is not written over, not for a moment; a damaged one is replaced."""
    save(checkpoints, 1)
    shard = tmp_path / "step-00000001/__0_0.distcp"
    before = shard.stat().st_mtime_ns
    save(checkpoints, 1)
    assert shard.stat().st_mtime_ns == before
    shard.write_bytes(b"damaged")
    save(checkpoints, 1)
    assert same(checkpoints.load(1), STATE)


def test_any_flipped_byte_is_found(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """In a shard, in the metadata: never loaded, and the file is named."""
    save(checkpoints, 1)
    for name in ("__0_0.distcp", ".metadata"):
        path = tmp_path / "step-00000001" / name
        content = path.read_bytes()
        for position in range(0, len(content), max(1, len(content) // 40)):
            damaged = bytearray(content)
            damaged[position] ^= 16
            path.write_bytes(damaged)
            assert checkpoints.latest() is None
            with pytest.raises(RunError, match=f"damaged checkpoint: {name}"):
                checkpoints.load(1)
        path.write_bytes(content)
    assert checkpoints.latest() == 1


@pytest.mark.parametrize(
    "manifest", [b"", b"{", b"[]", b"null", b'{"format": 2}', b'{"format": 1}', b"\xff\xfe"]
)
def test_a_damaged_manifest_is_no_manifest(
    manifest: bytes, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Torn, of another format, or not JSON at all: the checkpoint before it is taken."""
    save(checkpoints, 1)
    save(checkpoints, 2)
    (tmp_path / "step-00000002/manifest.json").write_bytes(manifest)
    assert checkpoints.latest() == 1


def reseal(folder: Path, **fields: Any) -> None:
    """Changes fields of a manifest, `...` removes one, and makes its checksums right again."""
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **fields}
    manifest.pop("sha256")
    manifest = {key: value for key, value in manifest.items() if value is not ...}
    path.write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))


@pytest.mark.parametrize(
    "fields",
    [
        {"format": True},
        {"step": 1},
        {"step": ...},
        {"kept": "no"},
        {"world_size": "8"},
        {"world_size": 0},
        {"files": []},
        {"files": ...},
        {"files": {}},
        {"files": {".metadata": 3}},
        {"values": []},
        {"values": ...},
    ],
    ids=str,
)
def test_a_manifest_of_another_shape_is_damaged(
    fields: dict[str, Any], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Though its checksum is right: a field of another type, or that of another step."""
    save(checkpoints, 1)
    save(checkpoints, 2)
    reseal(tmp_path / "step-00000002", **fields)
    assert checkpoints.latest() == 1
    with pytest.raises(RunError, match=r"damaged checkpoint: manifest\.json"):
        checkpoints.load(2)


def larger(metadata: Any) -> None:
    next(iter(metadata.state_dict_metadata.values())).size = torch.Size([1 << 50])


def negative(metadata: Any) -> None:
    next(iter(metadata.state_dict_metadata.values())).size = torch.Size([-4])


def without_tensors(metadata: Any) -> None:
    metadata.state_dict_metadata = [1]


def without_files(metadata: Any) -> None:
    metadata.storage_data = {}


def of_numbers(metadata: Any) -> None:
    metadata.storage_data = {1: 2}


@pytest.mark.parametrize("change", [larger, negative, without_tensors, without_files, of_numbers])
def test_metadata_that_tell_another_story_are_damaged(
    change: Callable[[Any], None], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """... though the checksums are right; nothing is allocated for what no file can hold."""
    save(checkpoints, 1)
    folder = tmp_path / "step-00000001"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    content = pickle.dumps(metadata)
    (folder / ".metadata").write_bytes(content)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    reseal(folder, files={**files, ".metadata": hashlib.sha256(content).hexdigest()})
    with pytest.raises(RunError, match="step-00000001: damaged checkpoint: "):
        checkpoints.load(1)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch exploded",)


def test_a_pickle_bomb_does_not_explode(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metadata that names anything but tensor descriptions is refused before it runs."""
    monkeypatch.chdir(tmp_path)
    save(checkpoints, 1)
    folder = tmp_path / "step-00000001"
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"refused (posix|nt|os)\.system"):
        read_tensors(str(folder), is_local=True)
    assert not (tmp_path / "exploded").exists()


class _Member:
    """Pickles as a member of an enumeration does in Python before 3.11.4."""

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name

    def __reduce__(self) -> tuple[Any, tuple[Any, str]]:
        return getattr, (self._owner, self._name)


def test_metadata_of_an_earlier_python_are_read() -> None:
    """It takes the members of enumerations by getattr, which is allowed for these alone."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as FORMATS
    from torch.distributed.checkpoint.metadata import MetadataIndex

    def loads(owner: Any, name: str) -> Any:
        return _MetadataUnpickler(io.BytesIO(pickle.dumps(_Member(owner, name)))).load()

    for member in FORMATS:
        assert loads(FORMATS, member.name) is member
    for owner, name in ((FORMATS, "__class__"), (FORMATS, "mro"), (MetadataIndex, "__init__")):
        with pytest.raises(pickle.UnpicklingError, match="refused"):
            loads(owner, name)


def test_an_entry_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    """DCP would unpickle it."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"a": torch.ones(2), "b": "text"}, checkpoint_id=tmp_path / "x", no_dist=True)
    with pytest.raises(ValueError, match=r"b is not a tensor|refused"):
        read_tensors(str(tmp_path / "x"), is_local=True)


def test_a_file_outside_of_the_checkpoint_is_refused(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """A path in the metadata stays inside the folder."""
    save(checkpoints, 1)
    path = tmp_path / "step-00000001/.metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../secret"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="file outside of the checkpoint"):
        read_tensors(str(path.parent), is_local=True)


def test_a_changed_value_in_the_manifest_is_found(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The step, the scaler and the learning rates live there: they have a checksum too."""
    save(checkpoints, 1)
    path = tmp_path / "step-00000001/manifest.json"
    path.write_text(path.read_text().replace('"progress/step": 3', '"progress/step": 4'))
    assert checkpoints.latest() is None
    with pytest.raises(RunError, match=r"manifest\.json does not match its checksum"):
        checkpoints.load(1)


def test_a_storage_that_fails_for_a_moment_costs_no_checkpoint(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that cannot be read just now may be that of a kept step: it is left alone."""
    save(checkpoints, 1, kept=True)
    read_json = Folder.read_json

    def flaky(self: Folder, name: str) -> Any:
        if "step-00000001" in self.url:
            raise OSError(5, "Input/output error")
        return read_json(self, name)

    monkeypatch.setattr(Folder, "read_json", flaky)
    for step in (2, 3, 4, 5):
        save(checkpoints, step)
    monkeypatch.undo()
    assert same(checkpoints.load(1), STATE)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["__0_0.distcp", "manifest.json"])
def test_a_file_that_cannot_be_read_is_passed_over(
    name: str,
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """... with its checkpoint, like a damaged one; a store that is gone for a moment is not."""
    save(checkpoints, 1)
    save(checkpoints, 2)
    error = OSError(errno.EIO, "Input/output error")

    def failing(original: Any) -> Any:
        def wrapper(self: Folder, file: str) -> Any:
            if "step-00000002" in self.url and file == name:
                raise error
            return original(self, file)

        return wrapper

    for method in ("digest", "read"):
        monkeypatch.setattr(Folder, method, failing(getattr(Folder, method)))
    assert checkpoints.latest() == 1
    printed = capsys.readouterr().out
    assert f"step-00000002: {name} cannot be read: " in printed
    assert "Input/output error" in printed
    with pytest.raises(RunError, match=f"damaged checkpoint: {name} cannot be read"):
        checkpoints.load(2)
    error = StoreError("s3://bucket: no answer")
    with pytest.raises(StoreError, match="no answer"):
        checkpoints.latest()


class Asked(Ranks):
    """Notes how patiently each answer of rank 0 is waited for."""

    def on_main(self, action: Callable[[], T], *, patient: bool = False) -> T:
        self.patience = [*getattr(self, "patience", []), patient]
        return super().on_main(action)


def test_the_other_ranks_wait_while_rank_0_reads_all_files(tmp_path: Path) -> None:
    """Checksums of a large checkpoint take longer than a step may."""
    save(Checkpoints(Folder(tmp_path), ALONE, keep=1), 1)
    ranks = Asked()
    checkpoints = Checkpoints(Folder(tmp_path), ranks, keep=1)
    checkpoints.latest()
    checkpoints.load(1)
    assert ranks.patience == [True, True]


def test_the_newest_is_asked_for_up_to_a_step(checkpoints: Checkpoints) -> None:
    """A phase never begins beyond its own end."""
    for step in (4, 8):
        save(checkpoints, step)
    assert checkpoints.latest(at_most=7) == 4
    assert checkpoints.latest(at_most=3) is None


# Beside the training ---------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_is_the_state_of_that_moment(asynchronous: bool, tmp_path: Path) -> None:
    """Tensors and values that change after the call do not change what is written."""
    checkpoints = Checkpoints(Folder(tmp_path), ALONE, keep=9, asynchronous=asynchronous)
    weight, rates = torch.zeros(100_000), [0.0]
    for step in range(1, 5):
        weight += 1
        rates[0] = float(step)
        checkpoints.save(step, {"weight": weight, "rates": rates})
    weight.zero_()
    rates[0] = 0.0
    for step in range(1, 5):
        loaded = checkpoints.load(step)
        assert (loaded["weight"] == step).all()
        assert loaded["rates"] == [step]


def test_a_save_returns_before_it_is_committed_and_the_next_waits(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One save at a time: the second call blocks until the first is whole."""
    write_json, may_commit, order = Folder.write_json, threading.Event(), []

    def held_back(self: Folder, name: str, document: Any) -> None:
        may_commit.wait(60)
        write_json(self, name, document)
        order.append(document["step"])

    monkeypatch.setattr(Folder, "write_json", held_back)
    checkpoints.save(1, STATE)
    assert not order
    threading.Timer(0.2, may_commit.set).start()
    checkpoints.save(2, STATE)
    assert order[:1] == [1]
    checkpoints.wait()
    assert order == [1, 2]


def test_a_training_that_fails_gives_its_save_time(tmp_path: Path) -> None:
    """A non-finite loss just after a save: the checkpoint is there."""

    def training() -> None:
        with Checkpoints(Folder(tmp_path), ALONE, keep=1) as checkpoints:
            checkpoints.save(1, STATE)
            raise RunError("the loss is not finite")

    with pytest.raises(RunError, match="not finite"):
        training()
    assert (tmp_path / "step-00000001/manifest.json").exists()


def test_a_wait_that_was_interrupted_can_be_repeated() -> None:
    """Ctrl-C while a save is under way: it is not taken for done."""
    background, may_end = Background(), threading.Event()

    def work() -> None:
        may_end.wait(60)

    background.start(work)
    main = threading.main_thread().ident
    assert main is not None
    interruption = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))

    def interrupted() -> None:
        interruption.start()
        background.wait()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not background.wait(0.01)
    may_end.set()
    assert background.wait()


def full_disk_on_one(folder: str, failing_rank: int) -> None:
    """The disk of one rank is full in the first save; all must see it, and save again."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    engine = Engine()
    create_stream = FileSystem.create_stream

    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "shard")

    with Checkpoints(Folder(folder), engine, keep=1) as checkpoints:
        if engine.rank == failing_rank:
            FileSystem.create_stream = full  # type: ignore[method-assign]
        checkpoints.save(1, STATE)
        with pytest.raises(OSError, match="No space left") as caught:
            checkpoints.save(2, STATE)
        assert caught.value.errno == errno.ENOSPC
        assert checkpoints.latest() is None
        FileSystem.create_stream = create_stream  # type: ignore[method-assign]
        checkpoints.save(3, STATE)
    assert Checkpoints(Folder(folder), engine, keep=1).latest() == 3
    engine.close()


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_what_one_rank_meets_is_raised_on_all(failing_rank: int, tmp_path: Path) -> None:
    """... by the next save at the latest, and nobody waits for ever."""
    assert run_ranks(2, full_disk_on_one, str(tmp_path), failing_rank) == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def hangs_on_one(hanging_rank: int, folder: str) -> None:
    """The storage of one rank never answers: each rank ends in one line that says what to do."""
    engine = Engine()
    if engine.rank == hanging_rank:
        Folder.digest = lambda *arguments: threading.Event().wait()  # type: ignore
    checkpoints = Checkpoints(Folder(folder), engine, keep=1, timeout=1.0)
    checkpoints.save(1, STATE)
    remedy = "step-00000001: the save of step 1 hangs.*raise checkpoint.timeout"
    with pytest.raises(RunError, match=f"(?s){remedy}"):
        checkpoints.wait()
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_storage_that_never_answers_ends_the_run(world_size: int, tmp_path: Path) -> None:
    assert run_ranks(world_size, hangs_on_one, world_size - 1, str(tmp_path)) == [0] * world_size


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")
        self.lock = threading.Lock()


def fails_on_main() -> None:
    def action() -> None:
        raise Unpicklable("a", "b")

    engine = Engine()
    for way in (engine.on_main, engine.together):
        with pytest.raises(RunError, match="Unpicklable: a and b"):
            way(action)
    engine.close()


def test_an_error_that_cannot_be_sent_is_told() -> None:
    """... to the other ranks by its text; alone it stays as it is."""
    assert run_ranks(2, fails_on_main) == [0, 0]

    def action() -> None:
        raise Unpicklable("a", "b")

    with pytest.raises(Unpicklable):
        ALONE.on_main(action)


def trained(engine: Engine, *, steps: int) -> TrainState:
    """A small network after that many steps, the same on each rank."""
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    torch.manual_seed(engine.rank)
    return state_of(engine, model, optimizer)


def saves_a_training(folder: str) -> None:
    engine = Engine()
    with Checkpoints(Folder(folder), engine, keep=1) as checkpoints:
        checkpoints.save(3, trained(engine, steps=3).state_dict())
    engine.close()


def loads_a_training(folder: str) -> None:
    """... into a fresh one, which is then as the saved one was, but for the new ranks' RNG."""
    engine = Engine()
    state, expected = trained(engine, steps=0), trained(engine, steps=3)
    state.load_state_dict(Checkpoints(Folder(folder), engine, keep=1).load(3))
    for part in ("model", "optimizer"):
        assert same(state.state_dict()[part], expected.state_dict()[part])
    assert state.state_dict()["optimizer"]["state"]
    engine.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_two_ranks_saved_is_loaded_by(world_size: int, tmp_path: Path) -> None:
    """... one, two or three."""
    assert run_ranks(2, saves_a_training, str(tmp_path)) == [0, 0]
    assert run_ranks(world_size, loads_a_training, str(tmp_path)) == [0] * world_size
