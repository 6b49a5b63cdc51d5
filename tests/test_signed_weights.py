"""Weights that are signs, in the index of a ticket: anyone may have written it."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from binary import SPEC, assert_same_prize, make_prize
from stores import refusal, somewhere

from data.errors import RunError
from data.files import Folder
from pruning.importing import store_prize
from pruning.mask_store import write_masks
from pruning.masks import Masks
from pruning.packing import canonical
from pruning.prizes import Prize
from pruning.store import problem_of
from pruning.tickets import Ticket, find_ticket

STORE = somewhere()
PRIZES = {"seed": make_prize(), "signs": make_prize(explicit=True)}
INDEXES: dict[str, dict[str, Any]] = {}
for form, prize in PRIZES.items():
    place = store_prize(prize, STORE, {})
    INDEXES[form] = json.loads(Folder(STORE).read(place.rpartition("/")[2]))


def sha256(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def digest_of(weights: dict[str, Any]) -> str:
    """As docs/formats.md has it."""
    signs, rows = weights["signs"], weights["tensors"]
    told = None
    if signs is not None:
        parts = signs["tensors"].items()
        told = sha256({n: {"shape": t["shape"], "chunks": t["chunks"]} for n, t in parts})
    rest = sha256({n: [t["dtype"], t["shape"], t["sha256"]] for n, t in rows.items()})
    fields = {"seed": weights["seed"], "layers": weights["layers"]}
    return sha256({**fields, "signs": told, "rest": rest})


def written(index: dict[str, Any]) -> str:
    """The place of an index, its digests recomputed, beside the objects of good tickets."""
    index["identity"]["weights"] = digest_of(index["weights"])
    index["id"] = sha256(index["identity"])
    index.pop("sha256", None)
    index["sha256"] = sha256(index)
    Folder(STORE).write_json(f"{index['id']}.json", index)
    return f"{STORE}/{index['id']}.json"


def changed(form: str, change: Callable[[dict[str, Any]], None]) -> str:
    """The place of a good index whose weights are changed."""
    index = copy.deepcopy(INDEXES[form])
    change(index["weights"])
    return written(index)


@pytest.mark.parametrize("form", PRIZES)
def test_what_is_stored_comes_back(form: str) -> None:
    """Signs from the seed or from the objects; all digests are those that the page describes."""
    place = written(copy.deepcopy(INDEXES[form]))
    assert json.loads(Folder(STORE).read(place.rpartition("/")[2])) == INDEXES[form]
    assert problem_of(place) is None
    assert_same_prize(Prize.of(Ticket.load(place)), PRIZES[form])


def test_no_signs_are_stored_where_a_seed_gives_them() -> None:
    """A ticket of a seed has fewer objects, by those of the signs."""
    tickets = [find_ticket(written(copy.deepcopy(INDEXES[form]))) for form in PRIZES]
    seeded, explicit = (ticket.stored_weights for ticket in tickets)
    assert seeded is not None
    assert explicit is not None
    assert seeded.objects.items() < explicit.objects.items()
    assert INDEXES["seed"]["weights"]["signs"] is None


def of_layer(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights["layers"]["conv1.weight"].update({field: value})


def both(weights: dict[str, Any]) -> None:
    weights["signs"] = INDEXES["signs"]["weights"]["signs"]


def twice(weights: dict[str, Any]) -> None:
    weights["layers"]["norm1.bias"] = {"shape": [4], "index": 0, "gain": 1.0}


def fewer(weights: dict[str, Any]) -> None:
    del weights["layers"]["conv1.weight"]


WRONG: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "generator": (
        "seed",
        lambda w: w.update(generator="mt19937"),
        "its signs are of an unknown generator: 'mt19937'",
    ),
    "both": ("seed", both, "its signs must have a seed or be stored, one of both"),
    "neither": ("seed", lambda w: w.update(seed=None), "must have a seed or be stored"),
    "seed": ("seed", lambda w: w.update(seed=1 << 32), "the seed of its signs is 4294967296"),
    "seed of text": ("seed", lambda w: w.update(seed="7"), "the seed of its signs is '7'"),
    "gain 0": ("seed", of_layer("gain", 0), "the gain of conv1.weight is 0.0, not a float32"),
    "gain between": ("seed", of_layer("gain", 0.1), "is 0.1, not a float32 above 0"),
    "gain integer": ("seed", of_layer("gain", (1 << 24) + 1), "not a float32 above 0"),
    "gain large": ("seed", of_layer("gain", 10**30), "not a float32 above 0"),
    "gain huge": ("seed", of_layer("gain", 10**400), "not a number"),
    "gain text": ("seed", of_layer("gain", "1"), "is '1', not a number"),
    "index": ("seed", of_layer("index", -1), "the index of conv1.weight is -1"),
    "shape": ("seed", of_layer("shape", [1 << 30, 1 << 30]), "more than 2^40 weights"),
    "twice": ("seed", twice, "a weight is there twice"),
    "other signs": ("signs", fewer, "its stored signs are not those of its layers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_made_up_is_refused(case: str) -> None:
    """In one line that names the index."""
    form, change, told = WRONG[case]
    place = changed(form, change)
    with pytest.raises(RunError, match="damaged: ") as caught:
        find_ticket(place)
    line = str(caught.value)
    assert told in line
    assert place in line
    assert "\n" not in line
    assert problem_of(place) == line


def test_weights_of_another_network_are_refused() -> None:
    """A layer that is missing, or of another shape."""
    for change in (fewer, of_layer("shape", [3, 4, 3, 3])):
        place = changed("seed", change)
        line = refusal(Ticket.load(place).build_model)
        assert line is not None
        assert line.endswith("its weights are not those of its model")


def test_a_network_is_binary_only_if_each_mask_has_a_gain() -> None:
    """A ticket that someone made may have fewer: its plain network is built, no binary one."""
    ticket = Ticket.load(written(copy.deepcopy(INDEXES["seed"])))
    fewer_masks = Masks({name: mask for name, mask in ticket.masks.items() if name != "fc.weight"})
    other = replace(ticket, stored_masks=write_masks(ticket.objects, fewer_masks))
    assert other.build_model().state_dict()["fc.weight"].all()
    with pytest.raises(RunError, match="its gains are not those of its masks"):
        Prize.of(other)


def test_a_large_network_is_measured_before_its_signs_are_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticket = Ticket.load(written(copy.deepcopy(INDEXES["seed"])))
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    with pytest.raises(RunError, match="take four bytes each of memory; this machine has 100"):
        ticket.weights()


def test_the_weights_are_gain_times_sign_for_pruned_ones_too() -> None:
    """So that masks alone decide; nothing of the magnitudes that were drawn is left."""
    ticket = Ticket.load(written(copy.deepcopy(INDEXES["seed"])))
    weights = ticket.weights()
    assert weights.keys() == SPEC.build().state_dict().keys()
    for name, layer in PRIZES["seed"].layers.items():
        assert torch.equal(weights[name].abs(), torch.full(layer.shape, layer.gain))
        assert torch.equal((weights[name] > 0)[layer.mask], layer.signs)
