"""torch.distributed.checkpoint without its two ways to run foreign code.

DCP unpickles its `.metadata`, and any entry that is not a tensor. Here the metadata may name the
few classes that describe tensors and nothing else, files lie inside the folder, and only tensors
are read, which DCP itself loads with `weights_only=True`.
"""

import contextlib
import math
import pathlib
import pickle
import warnings
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from data.errors import RunError, StoreError
from data.files import Folder
from train.ranks import Ranks

try:
    from torch.distributed.checkpoint.fsspec_filesystem import FsspecReader, FsspecWriter
except ImportError:  # before torch 2.15
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

_READ_AHEAD = 10_000_000
"""bytes that are copied from a GPU beyond what is being written"""

# Each process of one rank is warned that it is alone: it knows. For good, since a thread saves.
warnings.filterwarnings("ignore", message="(?s).*assuming the intent is to.*")

_ALLOWED = {
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member  # as Python before 3.11.4 pickles the member of an enumeration
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("pathlib") and name in {"PosixPath", "WindowsPath", "PurePosixPath"}:
            return pathlib.PurePosixPath  # the saved location, which is not used
        raise pickle.UnpicklingError(f"refused {module}.{name}")


def _member(owner: Any, name: str) -> _MEM_FORMAT_ENCODING:
    """A member of the one enumeration that metadata have. Raises `UnpicklingError` for others."""
    if owner is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"refused {name} of {owner!r}")
    return _MEM_FORMAT_ENCODING[name]


def read_metadata(file: IO[bytes]) -> Metadata:
    """The description of a checkpoint's tensors. Raises `ValueError` where it is not one."""
    try:
        metadata = _MetadataUnpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"unreadable metadata: {error}") from error
    if not isinstance(metadata, Metadata):
        raise ValueError("unreadable metadata: not a checkpoint's")
    for info in (metadata.storage_data or {}).values():
        path = getattr(info, "relative_path", None)
        if not isinstance(path, str) or path == ".." or PurePosixPath(path).name != path:
            raise ValueError(f"file outside of the checkpoint: {path}")
    return metadata


class _SafeMetadata:
    """Mixed in before a DCP reader."""

    fs: Any
    path: Any
    load_id: str

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as file:
            metadata = read_metadata(file)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _LocalReader(_SafeMetadata, dcp.FileSystemReader):
    pass


class _RemoteReader(_SafeMetadata, FsspecReader):
    pass


class _RemoteWriter(FsspecWriter):
    """Of its errors every rank can be told: those of a store's client may not survive pickling."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        with _told(self.path):
            return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with _told(self.path):
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with _told(self.path):
            super().finish(metadata, results)


@contextlib.contextmanager
def _told(path: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RunError(f"{path}: cannot be written: {type(error).__name__}: {error}") from error


def write_tensors(tensors: dict[str, Tensor], url: str, ranks: Ranks, *, is_local: bool) -> None:
    """Writes tensors into a fresh folder; called by all `ranks` together.

    What several ranks hold under the same name is written once. Raises what went wrong on the
    first rank that failed, `RunError` on an object store; a file that is there already is never
    overwritten.
    """
    # Read ahead from a GPU only: a thread that asks for a stream would settle on the first one.
    ahead = _READ_AHEAD if any(tensor.is_cuda for tensor in tensors.values()) else 0
    options: dict[str, Any] = {"overwrite": False, "per_thread_copy_ahead": ahead}
    if is_local:
        writer: dcp.StorageWriter = dcp.FileSystemWriter(url, **options)
    else:
        writer = _RemoteWriter(url, sync_files=False, use_listings_cache=False, **options)
    try:
        dcp.save(
            tensors,
            storage_writer=writer,
            process_group=ranks.group,
            no_dist=ranks.world_size == 1,
        )
    except dcp.CheckpointException as error:
        cause = error.failures[min(error.failures)][0]
        vars(cause)["met_by_all"] = True  # DCP tells every rank what one rank met
        raise cause from error


def read_tensors(url: str, *, is_local: bool, skip: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """All tensors of a checkpoint on the CPU, but those whose name starts with one of `skip`.

    Raises `ValueError` where the checkpoint is damaged or holds anything but tensors.
    """
    try:
        return _read_tensors(url, is_local, skip)
    except (ValueError, StoreError, MemoryError):
        raise
    except dcp.CheckpointException as error:
        cause = error.failures[min(error.failures)][0]
        raise ValueError(f"cannot be read: {cause}") from error
    except Exception as error:  # what DCP meets in a foreign description may be anything
        raise ValueError(f"cannot be read: {type(error).__name__}: {error}") from error


def _read_tensors(url: str, is_local: bool, skip: tuple[str, ...]) -> dict[str, Tensor]:
    reader = _LocalReader(url) if is_local else _RemoteReader(url, use_listings_cache=False)
    described: dict[str, Any] = reader.read_metadata().state_dict_metadata
    _require_room(described, Folder(url))
    wanted = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in described.items()
        if not name.startswith(skip)
    }
    dcp.load(wanted, storage_reader=reader, no_dist=True)
    return wanted


def _require_room(described: dict[str, Any], folder: Folder) -> None:
    """Raises `ValueError` unless all are tensors, and the files large enough to hold them."""
    num_bytes = 0
    for name, item in described.items():
        if not isinstance(item, TensorStorageMetadata):
            raise ValueError(f"{name} is not a tensor")
        if any(length < 0 for length in item.size):
            raise ValueError(f"{name} is of shape {tuple(item.size)}")
        num_bytes += math.prod(item.size) * item.properties.dtype.itemsize
    available = sum(folder.size(name) for name in folder.names())
    if num_bytes > available:
        raise ValueError(f"tensors of {num_bytes} bytes in files of {available} bytes")
