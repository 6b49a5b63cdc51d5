"""docs/formats.md is enough to read a ticket, and the file of a multi-prize ticket.

Its code is run as it stands there.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from binary import content_of, make_prize, opened
from safetensors.torch import load_file
from test_tickets import make_ticket

from data.files import Folder
from pruning.check_images import check_images
from pruning.importing import store_prize
from pruning.masks import Masks
from pruning.prizes import Prize
from pruning.store import TicketStore
from pruning.tickets import Ticket
from train.models import ModelSpec

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


def the_code() -> dict[str, Any]:
    """What the page defines: the canonical form, `read_mask` and `read_mpt`."""
    names: dict[str, Any] = {}
    for block in CODE:
        exec(block, names)
    return names


def hashed(document: object) -> str:
    """The SHA-256 of canonical JSON, by hand."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def test_the_reader_of_the_page_reads_what_was_written(store: tuple[Path, Any]) -> None:
    """Every mask, from the files alone."""
    folder, ticket = store
    read_mask: Callable[[Path, str, str], np.ndarray] = the_code()["read_mask"]
    for name, mask in ticket.masks.items():
        assert np.array_equal(read_mask(folder, ticket.id, name), mask.numpy()), name


def test_the_digests_are_those_that_the_page_describes(store: tuple[Path, Any]) -> None:
    """The index, the id, the masks, the weights and the objects, each by hand."""
    folder, ticket = store
    index = json.loads((folder / f"{ticket.id}.json").read_text())
    assert (
        hashed({key: value for key, value in index.items() if key != "sha256"}) == index["sha256"]
    )
    assert hashed(index["identity"]) == index["id"] == ticket.id
    masks, weights = index["masks"], index["weights"]
    assert hashed(bits_of(masks)) == index["identity"]["masks"]
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


# Multi-prize tickets ---------------------------------------------------------------------

WIDE = ModelSpec("cifar_resnet8", 10, 3, {"width": 16})
PRIZES = {
    "seed": make_prize(WIDE, density=0.2),
    "signs": make_prize(explicit=True),
    "dense": make_prize(density=1.0),
    "sparse": make_prize(density=0.01),
    "most": make_prize(density=0.8),
}
FORMS = pytest.mark.parametrize("prize", PRIZES.values(), ids=PRIZES)


@FORMS
def test_the_reader_of_the_page_reads_the_file_of_a_multi_prize_ticket(
    prize: Prize, tmp_path: Path
) -> None:
    """Every mask, sign, gain and tensor, by NumPy and integers alone."""
    (tmp_path / "x.mpt").write_bytes(content_of(prize))
    document, layers, rest = the_code()["read_mpt"](tmp_path / "x.mpt")
    assert list(layers) == list(prize.layers)
    for name, (mask, signs, gain) in layers.items():
        expected = prize.layers[name]
        assert np.array_equal(mask, expected.mask.numpy())
        assert np.array_equal(signs > 0, expected.signs.numpy())
        assert gain.dtype == np.float32
        assert float(gain) == expected.gain
    assert rest.keys() == prize.rest.keys()
    assert all(np.array_equal(rest[name], value.numpy()) for name, value in prize.rest.items())
    told = document["model"]
    assert ModelSpec(**told) == prize.model


def test_both_codecs_are_read_by_the_page() -> None:
    """The tickets above have masks in either."""
    rows = [row for prize in PRIZES.values() for row in opened(content_of(prize))[0]["layers"]]
    assert {row["codec"] for row in rows} == {"rans", "bits"}


def test_the_reader_of_the_page_notices_damage(tmp_path: Path) -> None:
    """A bit of any part but the lengths: one of its assertions fails, or nothing can be read."""
    content, read = content_of(make_prize(density=0.1)), the_code()["read_mpt"]
    for place in range(8, len(content), 501):
        flipped = bytearray(content)
        flipped[place] ^= 4
        (tmp_path / "x.mpt").write_bytes(flipped)
        with pytest.raises((AssertionError, ValueError, KeyError, IndexError, TypeError)):
            read(tmp_path / "x.mpt")


def test_the_check_images_are_those_that_the_page_describes() -> None:
    words = the_code()["philox"](2 * 3 * 5 * 4, 0, 0, 3)
    images = ((words >> 8) / 2**23 - 1).astype(np.float32).reshape(2, 3, 5, 4)
    assert np.array_equal(images, check_images((3, 5, 4)).numpy())


@pytest.mark.parametrize("explicit", [False, True], ids=["seed", "signs"])
def test_weights_that_are_signs_are_as_the_page_describes(explicit: bool, tmp_path: Path) -> None:
    """Their digest by hand, and the signs of a layer from the seed or the objects."""
    prize, names = make_prize(explicit=explicit), the_code()
    ticket = Ticket.load(store_prize(prize, str(tmp_path), {}))
    index = json.loads((tmp_path / f"{ticket.id}.json").read_text())
    weights = index["weights"]
    rows = {n: [t["dtype"], t["shape"], t["sha256"]] for n, t in weights["tensors"].items()}
    signs = weights["signs"]
    told = {
        "seed": weights["seed"],
        "layers": weights["layers"],
        "signs": None if signs is None else hashed(bits_of(signs)),
        "rest": hashed(rows),
    }
    assert (signs is None, weights["seed"] is None) == (not explicit, explicit)
    assert hashed(told) == index["identity"]["weights"]
    for name, layer in weights["layers"].items():
        expected = prize.layers[name]
        assert (layer["gain"], layer["index"]) == (expected.gain, expected.index)
        if not explicit:
            size = expected.mask.numel()
            drawn = names["philox"](-(-size // 32), weights["seed"], layer["index"], 0)
            bits = np.unpackbits(drawn.view(np.uint8), count=size, bitorder="little")
            assert np.array_equal(bits[expected.mask.flatten().numpy()], expected.signs.numpy())
    parts = [weights, *weights["layers"].values(), *([] if signs is None else [signs])]
    for field in {field for part in parts for field in part} - weights["layers"].keys():
        assert f'"{field}"' in PAGE, field


def bits_of(masks: dict[str, Any]) -> dict[str, Any]:
    """What the digest of masks is of."""
    return {
        name: {"shape": tensor["shape"], "chunks": tensor["chunks"]}
        for name, tensor in masks["tensors"].items()
    }


@FORMS
def test_every_field_of_the_file_stands_on_the_page(prize: Prize) -> None:
    told = {"preprocessing": {"image_shape": [3, 16, 16], "mean": [], "std": [], "resize": 9}}
    about = {"ticket": "ab" * 32, "place": "x", "metrics": {}, "versions": {}}
    body, tensors = opened(content_of(prize, about=about, **told))
    parts = [body, body["layers"][0], body["conventions"], body["preprocessing"], body["about"]]
    for field in {field for part in parts for field in part}:
        assert f'"{field}"' in PAGE, field
    for kind in {name.partition("/")[0] for name in tensors} - {"logits"}:
        assert f"`{kind}/" in PAGE
