"""Files of multi-prize tickets that are damaged or made up: one clear line, and nothing loaded."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from binary import (
    IMAGES,
    SPEC,
    Change,
    Tensors,
    changed,
    closed,
    content_of,
    make_prize,
    opened,
    problem_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import paths, replace
from torch import Tensor

from data.errors import RunError
from data.files import Folder
from pruning import document, mpt
from pruning.packing import canonical, pack_bits
from train.models import ModelSpec

CONTENT = content_of(make_prize(), preprocessing={"image_shape": list(IMAGES)})
SIGNED = content_of(make_prize(explicit=True))
BODY, TENSORS = opened(CONTENT)
FIRST = "conv1.weight"
FOLDER = Folder("memory://hostile")


def refused(content: bytes) -> str:
    """The one line with which the file is refused by whoever reads or verifies it."""
    FOLDER.write("x.mpt", content)
    url = "memory://hostile/x.mpt"
    with pytest.raises(RunError) as caught:
        mpt.read(url)
    line = str(caught.value)
    assert line.startswith(f"{url}: ")
    assert "\n" not in line
    assert line.isprintable()
    assert len(line) < 400
    assert problem_of(url) == line
    return line


def row(body: dict[str, Any], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = body["layers"][number]
    return found


def test_the_file_from_which_they_are_made_is_whole() -> None:
    """... and is still the same when it was taken apart and sealed again."""
    for content in (CONTENT, SIGNED):
        assert closed(*opened(content)) == content
        FOLDER.write("whole.mpt", content)
        assert problem_of("memory://hostile/whole.mpt") is None


# Damage ----------------------------------------------------------------------------------


@given(length=st.integers(0, len(CONTENT) - 1))
@settings(max_examples=100)
def test_no_cut_file_is_loaded(length: int) -> None:
    refused(CONTENT[:length])


def test_no_file_that_goes_on_is_loaded() -> None:
    refused(CONTENT + b"\0")


@given(data=st.data())
@settings(max_examples=400)
def test_no_file_with_a_flipped_bit_is_loaded(data: st.DataObject) -> None:
    """In its header as well as in its tensors, with a seed or with signs."""
    content = bytearray(data.draw(st.sampled_from([CONTENT, SIGNED])))
    header = 8 + int.from_bytes(content[:8], "little")
    part = data.draw(st.sampled_from([range(8), range(8, header), range(header, len(content))]))
    content[data.draw(st.sampled_from(part))] ^= 1 << data.draw(st.integers(0, 7))
    refused(bytes(content))


def test_a_number_that_is_written_otherwise_is_refused() -> None:
    """1E-05 reads as 1e-05 does, and escapes may be large or small: only one form is read."""
    content = content_of(make_prize(), about={"x": 1e-05, "y": "\u00f6"})
    for form, other in ((b"1e-05", b"1E-05"), (b"u00f6", b"u00F6")):
        assert content.count(form) == 1
        assert "not canonical" in refused(content.replace(form, other))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 100,
        b"PK\x03\x04" + b"x" * 100,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 20) + b'{"__metadata__":null}'[:20],
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 17 << 20) + b" " * (17 << 20),
        safetensors.torch.save({"a": torch.ones(2)}),
        safetensors.torch.save({"a": torch.ones(2)}, {"mpt": "x"}),
        safetensors.torch.save({"a": torch.ones(2)}, {"mpt": "[" * 10_000}),
        safetensors.torch.save({"a": torch.ones(2)}, {"mpt": '{"a":1,"a":1}'}),
        safetensors.torch.save({"a": torch.ones(2)}, {"mpt": "{}"}),
        struct.pack("<Q", 32) + b'{"__metadata__":{"mpt":"\\ud800"}}'[:32],
    ],
    ids=range(15),
)
def test_what_was_never_such_a_file_is_refused(content: bytes) -> None:
    refused(content)


# Made up ---------------------------------------------------------------------------------


def of_body(*path: Any, value: Any) -> Change:
    """Another value at a path of the document."""
    return lambda body, tensors: replace(body, path, value)


def of_layer(field: str, value: Any) -> Change:
    """Another value in the row of the first layer."""
    return of_body("layers", 0, field, value=value)


def resealed(change: Callable[[Tensors], None]) -> Change:
    """A change of tensors, and the digests of what is not binary and of logits with it."""

    def apply(body: dict[str, Any], tensors: Tensors) -> None:
        change(tensors)
        rest = {n[5:]: value for n, value in tensors.items() if n.startswith("rest/")}
        body["rest"] = mpt._digest_of(rest)
        if "logits" in tensors:
            body["logits"] = mpt._digest_of({"logits": tensors["logits"]})

    return apply


def of_tensor(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    """Another tensor of that name."""

    def change(tensors: Tensors) -> None:
        tensors[name] = make(tensors[name])

    return resealed(change)


def emptied(body: dict[str, Any], tensors: Tensors) -> None:
    """The first layer keeps nothing, by its own account."""
    nothing = torch.zeros(row(body)["shape"], dtype=torch.bool)
    tensors[f"mask/{FIRST}"] = torch.tensor(list(pack_bits(nothing)), dtype=torch.uint8)
    row(body).update(kept=0, density=0.0, codec="bits")


def fewer_kept(body: dict[str, Any], tensors: Tensors) -> None:
    """One weight less than the mask of bits keeps."""
    size, kept = 108, row(body)["kept"] - 1
    row(body).update(kept=kept, density=kept / size, codec="bits")
    mask = make_prize().layers[FIRST].mask
    tensors[f"mask/{FIRST}"] = torch.tensor(list(pack_bits(mask)), dtype=torch.uint8)


def without(name: str) -> Change:
    return resealed(lambda tensors: tensors.__delitem__(name))


def added(name: str) -> Change:
    return resealed(lambda tensors: tensors.update({name: torch.zeros(2, dtype=torch.uint8)}))


def twice(body: dict[str, Any], tensors: Tensors) -> None:
    body["layers"].append(row(body))


def two_layers(body: dict[str, Any], tensors: Tensors) -> None:
    """One layer's mask in place of another's."""
    tensors["mask/stages.0.0.conv1.weight"] = tensors["mask/stages.0.0.conv2.weight"].clone()


def no_layers(body: dict[str, Any], tensors: Tensors) -> None:
    """All weights dense."""
    for name, value in SPEC.build().state_dict().items():
        tensors[f"rest/{name}"] = value
    for name in [name for name in tensors if name.startswith("mask/")]:
        del tensors[name]
    resealed(lambda tensors: None)(body, tensors)
    body["layers"] = []


BIG: dict[str, Any] = {
    "name": "cifar_resnet8",
    "num_classes": 1 << 36,
    "in_chans": 3,
    "arguments": {"width": 4},
}
MODEL = BODY["model"]
FLOAT8 = torch.float8_e4m3fn
WRONG: dict[str, tuple[Change, str]] = {
    "generator": (of_body("generator", value="mt19937"), "unknown generator of signs: 'mt19937'"),
    "no generator": (of_body("generator", value=None), "unknown generator of signs: None"),
    "conventions": (
        of_body("conventions", "sign_of_zero", value=-1),
        "unknown conventions: {'gain'",
    ),
    "more conventions": (of_body("conventions", "x", value=1), "unknown conventions"),
    "codec": (of_layer("codec", "zip"), "unknown codec 'zip' of conv1.weight"),
    "density 0": (of_layer("density", 0), "keeps 33 of 108 weights at density 0"),
    "density 1.5": (of_layer("density", 1.5), "at density 1.5"),
    "another density": (of_layer("density", 0.3), "at density 0.3"),
    "density is text": (of_layer("density", "0.3"), "a density is '0.3', not a number"),
    "kept of others": (
        lambda b, t: row(b).update(kept=34, density=34 / 108),
        "damaged: ",
    ),
    "kept above all": (
        lambda b, t: row(b).update(kept=109, density=109 / 108),
        "not a number from 0 to 108",
    ),
    "one less kept": (fewer_kept, "the mask of conv1.weight does not keep 32 weights"),
    "kept nothing": (emptied, "conv1.weight keeps 0 of 108 weights"),
    "gain 0": (of_layer("gain", 0.0), "the gain of conv1.weight is 0.0, not a float32 above 0"),
    "gain below 0": (of_layer("gain", -1.0), "not a float32 above 0"),
    "gain beyond float32": (of_layer("gain", 1e39), "not a float32 above 0"),
    "gain between two": (of_layer("gain", 0.1), "is 0.1, not a float32 above 0"),
    "gain too small": (of_layer("gain", 1e-60), "not a float32 above 0"),
    "gain of an integer": (of_layer("gain", (1 << 24) + 1), "not a float32 above 0"),
    "gain of a large integer": (of_layer("gain", 10**30), "not a float32 above 0"),
    "gain of a huge integer": (of_layer("gain", 10**400), "not a number"),
    "gain is true": (of_layer("gain", True), "the gain of conv1.weight is True, not a number"),
    "another index": (of_layer("index", 5), "the signs of conv1.weight do not match their digest"),
    "index below 0": (of_layer("index", -1), "the index of conv1.weight is -1"),
    "index beyond": (of_layer("index", 1 << 32), "the index of conv1.weight is 4294967296"),
    "another seed": (of_body("seed", value=8), "the signs of conv1.weight do not match"),
    "seed below 0": (of_body("seed", value=-1), "the seed of its signs is -1"),
    "seed beyond": (of_body("seed", value=1 << 32), "the seed of its signs is 4294967296"),
    "seed is text": (of_body("seed", value="7"), "the seed of its signs is '7'"),
    "no seed and no signs": (of_body("seed", value=None), "it lacks 'signs/conv1.weight'"),
    "mask digest": (of_layer("mask", "ab" * 32), "the mask of conv1.weight does not match its dig"),
    "mask no digest": (of_layer("mask", "../x"), "conv1.weight is '../x', not a SHA-256"),
    "signs digest": (of_layer("signs", "ab" * 32), "the signs of conv1.weight do not match"),
    "rest digest": (of_body("rest", value="ab" * 32), "what is not binary does not match"),
    "logits digest": (of_body("logits", value="ab" * 32), "the logits do not match their digest"),
    "other logits": (
        lambda b, t: t.update(logits=t["logits"] + 1),
        "the logits do not match their digest",
    ),
    "other rest": (
        lambda b, t: t.update({"rest/norm1.bias": t["rest/norm1.bias"] + 1}),
        "what is not binary does not match its digest",
    ),
    "layers swapped": (two_layers, "damaged: "),
    "layer twice": (twice, "conv1.weight is there twice"),
    "no layers": (no_layers, "its tensors are not those of its model"),
    "layer unknown": (of_layer("name", "conv9.weight"), "it holds unknown 'mask/conv1.weight'"),
    "layer no text": (of_layer("name", "two\nlines"), "not a line of text"),
    "missing mask": (without(f"mask/{FIRST}"), f"it lacks 'mask/{FIRST}'"),
    "missing rest": (without("rest/norm1.bias"), "its tensors are not those of its model"),
    "missing logits": (without("logits"), "it lacks 'logits'"),
    "unknown tensor": (added("x"), "it holds unknown 'x'"),
    "unknown mask": (added("mask/x"), "it holds unknown 'mask/x'"),
    "unknown rest": (added("rest/x"), "its tensors are not those of its model"),
    "seed and signs": (added(f"signs/{FIRST}"), f"it holds unknown 'signs/{FIRST}'"),
    "mask of floats": (
        of_tensor(f"mask/{FIRST}", lambda t: t.float()),
        "mask/conv1.weight is torch.float32 of shape",
    ),
    "mask of bfloat16": (
        of_tensor(f"mask/{FIRST}", lambda t: t.bfloat16()),
        "mask/conv1.weight is torch.bfloat16 of shape",
    ),
    "mask of rows": (
        of_tensor(f"mask/{FIRST}", lambda t: t[None]),
        "mask/conv1.weight is torch.uint8 of shape [1, ",
    ),
    "mask empty": (of_tensor(f"mask/{FIRST}", lambda t: t[:0]), "damaged: "),
    "mask and more": (
        of_tensor(f"mask/{FIRST}", lambda t: torch.cat([t, t])),
        "damaged: ",
    ),
    "NaN": (
        of_tensor("rest/norm1.running_mean", lambda t: t.fill_(torch.nan)),
        "norm1.running_mean is not finite",
    ),
    "infinity": (
        of_tensor("rest/norm1.running_var", lambda t: t.fill_(torch.inf)),
        "norm1.running_var is not finite",
    ),
    "NaN in logits": (
        of_tensor("logits", lambda t: t.fill_(torch.nan)),
        "logits is not finite",
    ),
    "bias before the gain": (
        of_tensor("rest/fc.bias", lambda t: t + 1),
        "the bias of fc.weight is not zero",
    ),
    "rest of float64": (
        of_tensor("rest/norm1.bias", lambda t: t.double()),
        "its tensors are not those of its model",
    ),
    "rest of float8": (
        of_tensor("rest/norm1.bias", lambda t: t.to(FLOAT8)),
        "its tensors are not those of its model",
    ),
    "rest of another shape": (
        of_tensor("rest/norm1.bias", lambda t: t.view(2, 2)),
        "its tensors are not those of its model",
    ),
    "logits of float64": (of_tensor("logits", lambda t: t.double()), "logits of torch.float64"),
    "logits of others": (of_tensor("logits", lambda t: t[:1]), "logits of torch.float32 and sha"),
    "no logits": (
        of_tensor("logits", lambda t: t[:0]),
        "logits of torch.float32 and shape [0, 10]",
    ),
    "another model": (
        of_body("model", "name", value="cifar_resnet14"),
        "its tensors are not those of its model",
    ),
    "wider model": (
        of_body("model", "arguments", "width", value=8),
        "no weights 'conv1.weight' of (4, 3, 3, 3) in its model",
    ),
    "other classes": (
        of_body("model", "num_classes", value=11),
        "no weights 'fc.weight' of (10, 16) in its model",
    ),
    "model unknown": (
        of_body("model", "name", value="no_such_model"),
        "damaged: its model cannot be built: ",
    ),
    "model of a URL": (
        of_body("model", "name", value="hf-hub:someone/model"),
        "is not one that is built here",
    ),
    "model of a file": (
        of_body("model", value={**MODEL, "arguments": {"checkpoint_path": "/tmp/evil.pth"}}),
        "model argument 'checkpoint_path' reads a file",
    ),
    "model pretrained": (
        of_body("model", value={**MODEL, "arguments": {"pretrained": True}}),
        "model argument 'pretrained' reads a file",
    ),
    "model of odd words": (
        of_body("model", "arguments", value={"\ud800": 1}),
        "not a line of text",
    ),
    "model in a basis": (
        of_body("model", "arguments", value={"width": 4, "basis": "dct"}),
        "binary weights in the basis 'dct'",
    ),
    "shape": (of_layer("shape", [4, 27]), "no weights 'conv1.weight' of (4, 27) in its model"),
    "shape huge": (of_layer("shape", [1 << 30, 1 << 30]), "more than 2^40 weights"),
    "shape below 0": (of_layer("shape", [-4, -27]), "not a number from 0"),
    "shape of floats": (of_layer("shape", [4.0, 3, 3, 3]), "not a number from 0"),
    "images": (of_body("image_shape", value=[3, 16]), "images of shape [3, 16]: not of 3 ch"),
    "images of others": (of_body("image_shape", value=[1, 16, 16]), "not of 3 channels"),
    "images of nothing": (of_body("image_shape", value=[3, 0, 16]), "not of 3 channels"),
    "images huge": (of_body("image_shape", value=[3, 1 << 18, 1 << 18]), "larger than 4,194,304"),
    "preprocessing": (of_body("preprocessing", value=[]), "preprocessing is [], not of type dict"),
    "about": (of_body("about", value=3), "about is 3, not of type dict"),
    "layers": (of_body("layers", value={}), "layers is {}, not of type list"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_made_up_is_refused(case: str) -> None:
    """Nothing but that is wrong: checksum and digests are those of the change."""
    change, told = WRONG[case]
    assert told in refused(changed(CONTENT, change))


EXPLICIT: dict[str, tuple[Change, str]] = {
    "signs and seed": (of_body("seed", value=7), "it holds unknown 'signs/conv1.weight'"),
    "other signs": (
        of_tensor(f"signs/{FIRST}", lambda t: t ^ 1),
        "the signs of conv1.weight do not match their digest",
    ),
    "missing signs": (without(f"signs/{FIRST}"), f"it lacks 'signs/{FIRST}'"),
    "fewer signs": (of_tensor(f"signs/{FIRST}", lambda t: t[:-1]), "4 bytes for 33 weights"),
    "stray signs": (
        of_tensor("signs/fc.weight", lambda t: torch.cat([t, t])),
        "bytes for 48 weights",
    ),
    "signs of floats": (
        of_tensor(f"signs/{FIRST}", lambda t: t.float()),
        "signs/conv1.weight is torch.float32",
    ),
}


@pytest.mark.parametrize("case", EXPLICIT)
def test_made_up_signs_are_refused(case: str) -> None:
    change, told = EXPLICIT[case]
    assert told in refused(changed(SIGNED, change))


def test_no_number_of_the_document_is_nan_or_infinite() -> None:
    """JSON knows neither, and so no digest is of one."""
    text = canonical(document.seal(mpt.KIND, BODY)).decode()
    gain = f'"gain":{row(BODY)["gain"]!r}'
    assert text.count(gain) == 1
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        other = text.replace(gain, f'"gain":{number}')
        assert "Out of range float" in refused(safetensors.torch.save(TENSORS, {"mpt": other}))


PLACES = [path for path in paths(BODY) if not any(type(key) is int and key > 1 for key in path)]
VALUES: tuple[Any, ...] = (
    None,
    -1,
    1.5,
    "x",
    [],
    {},
    True,
    10**400,
    1 << 60,
    "\ud800",
    "two\nlines",
    [[1]],
)
FREE = {"preprocessing", "about"}


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:12])
def test_every_field_is_of_its_type(value: Any) -> None:
    """At every place of the document; a gain may be any number, but then the logits differ."""
    for path in PLACES:
        if path[0] in FREE and (len(path) > 1 or isinstance(value, dict)):
            continue
        content = changed(CONTENT, of_body(*path, value=value))
        if path[0] == "layers" and path[-1] == "gain" and value in (1.5, 1 << 60):
            FOLDER.write("x.mpt", content)
            problem = problem_of("memory://hostile/x.mpt")
            assert problem is not None
            assert "its network gives other logits" in problem
        else:
            refused(content)


@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(map(str, path)))
def test_every_field_is_needed(path: tuple[Any, ...]) -> None:
    """... but for what is told in free words."""
    if path[0] in FREE and len(path) > 1:
        return

    def remove(body: dict[str, Any], tensors: Tensors) -> None:
        above: Any = body
        for key in path[:-1]:
            above = above[key]
        del above[path[-1]]

    refused(changed(CONTENT, remove))


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("format", "tombola-ticket", "format 'tombola-ticket': not a tombola-mpt"),
        ("version", 3, "version 3: this Tombola reads only version 2"),
        ("version", True, "version True: this Tombola reads only version 2"),
        ("sha256", "ab" * 32, "its content does not match its checksum"),
        ("sha256", None, "its content does not match its checksum"),
    ],
)
def test_other_versions_are_refused(field: str, value: Any, told: str) -> None:
    sealed = {**document.seal(mpt.KIND, BODY), field: value}
    text = canonical(sealed).decode()
    assert told in refused(safetensors.torch.save(TENSORS, {"mpt": text}))


def test_a_few_bytes_do_not_take_the_memory_they_claim() -> None:
    """2^40 weights that fit their model: refused before anything of that size is made."""

    def claim(body: dict[str, Any], tensors: Tensors) -> None:
        body["model"] = BIG
        layer = body["layers"][-1]
        size = BIG["num_classes"] * 16
        layer.update(shape=[BIG["num_classes"], 16], kept=1, density=1 / size)

    content = changed(CONTENT, claim)
    tracemalloc.start()
    refused(content)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 64 << 20


def test_weights_beyond_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file may tell of many weights, which are measured before they are decoded."""
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    assert "of memory; this machine has" in refused(CONTENT)


def test_images_that_its_network_does_not_take_are_told(tmp_path: Path) -> None:
    """The file is whole by itself; to verify it says what is wrong."""
    prize = make_prize(ModelSpec("test_vit", 5, 3))
    content = mpt.to_bytes(mpt.MptFile.of(prize, (3, 160, 160)))
    path = tmp_path / "x.mpt"
    path.write_bytes(changed(content, of_body("image_shape", value=[3, 50, 50])))
    problem = problem_of(str(path))
    assert problem is not None
    assert problem.startswith(f"{path}: the network does not take images of 3x50x50: ")
    assert "\n" not in problem


def test_nothing_is_fetched_or_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any of the models that would."""
    for owner, name in ((torch, "load"), (torch.hub, "load_state_dict_from_url")):
        monkeypatch.setattr(owner, name, lambda *words, **options: pytest.fail("loads"))
    for name in ("hf-hub:a/b", "hf_hub:a/b", "local-dir:/tmp/a", "../resnet18"):
        refused(changed(CONTENT, of_body("model", "name", value=name)))
    for argument in ("pretrained", "checkpoint_path", "pretrained_cfg", "cache_dir", "x_file"):
        arguments = {"width": 4, argument: "/tmp/x"}
        refused(changed(CONTENT, of_body("model", "arguments", value=arguments)))


def test_the_document_is_one_line_of_json() -> None:
    """As the page says: canonical, and the only entry of the metadata."""
    length = int.from_bytes(CONTENT[:8], "little")
    metadata = json.loads(CONTENT[8 : 8 + length])["__metadata__"]
    assert metadata.keys() == {"mpt"}
    assert canonical(json.loads(metadata["mpt"])).decode() == metadata["mpt"]
