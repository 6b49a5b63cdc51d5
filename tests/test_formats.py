"""docs/formats.md is enough to read a ticket: its code is run as it stands there."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_tickets import make_ticket

from data.files import Folder
from pruning.masks import Masks
from pruning.store import TicketStore

PAGE = (Path(__file__).parent.parent / "docs/formats.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A store with a ticket whose masks fill ten chunks."""
    folder = tmp_path_factory.mktemp("formats")
    generator = torch.Generator().manual_seed(0)
    shapes = {"z": (3, 1000, 1001), "a": (7_000_003,), "k": (5, 3)}
    masks = {n: torch.rand(s, generator=generator) < 0.2 for n, s in shapes.items()}
    ticket = make_ticket(folder / "run", masks=Masks(masks))
    TicketStore(Folder(folder / "store")).add(ticket)
    return folder / "store", ticket


def test_the_reader_of_the_page_reads_what_was_written(store: tuple[Path, Any]) -> None:
    """Every mask, from the files alone."""
    folder, ticket = store
    names: dict[str, Any] = {}
    for block in CODE:
        exec(block, names)  # the canonical form, and `read_mask`
    read_mask: Callable[[Path, str, str], np.ndarray] = names["read_mask"]
    for name, mask in ticket.masks.items():
        assert np.array_equal(read_mask(folder, ticket.id, name), mask.numpy()), name


def test_the_digests_are_those_that_the_page_describes(store: tuple[Path, Any]) -> None:
    """The index, the id, the masks, the weights and the objects, each by hand."""

    def hashed(document: object) -> str:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    folder, ticket = store
    index = json.loads((folder / f"{ticket.id}.json").read_text())
    assert (
        hashed({key: value for key, value in index.items() if key != "sha256"}) == index["sha256"]
    )
    assert hashed(index["identity"]) == index["id"] == ticket.id
    masks, weights = index["masks"], index["weights"]
    bits = {
        name: {"shape": tensor["shape"], "chunks": tensor["chunks"]}
        for name, tensor in masks["tensors"].items()
    }
    assert hashed(bits) == index["identity"]["masks"]
    rows = {n: [t["dtype"], t["shape"], t["sha256"]] for n, t in weights["tensors"].items()}
    assert hashed(rows) == index["identity"]["weights"]
    for part in (*masks["shards"], *weights["files"]):
        content = (folder / f"objects/{part['sha256']}.safetensors").read_bytes()
        assert hashlib.sha256(content).hexdigest() == part["sha256"]
        assert len(content) == part["num_bytes"]
    for file in weights["files"]:
        tensors = load_file(folder / f"objects/{file['sha256']}.safetensors")
        for name, tensor in tensors.items():
            told = weights["tensors"][name]
            content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            assert hashlib.sha256(content).hexdigest() == told["sha256"]


def test_every_field_of_the_index_stands_on_the_page(store: tuple[Path, Any]) -> None:
    folder, ticket = store
    index = json.loads((folder / f"{ticket.id}.json").read_text())
    parts = [index, index["identity"], index["masks"], index["weights"], index["about"]]
    parts += [
        index["masks"]["shards"][0],
        index["weights"]["files"][0],
        index["about"]["lineage"][0],
    ]
    parts += [index["identity"]["model"], index["masks"]["tensors"]["k"]]
    parts.append(index["weights"]["tensors"]["fc.bias"])
    for field in {field for part in parts for field in part}:
        assert f'"{field}"' in PAGE, field
