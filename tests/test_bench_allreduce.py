"""`tombola bench allreduce` measures what it says, on ranks that are there or on two nodes."""

import json
import os
from pathlib import Path

import pytest
import timm
from nodes import needs_nodes
from processes import run_ranks

from data.errors import UserError
from launch.bench import allreduce, gradients
from launch.cli import run_command


def measured(folder: str) -> None:
    """With a small network, of whose gradients the buckets are noted."""
    from train.reduction import Reduction

    packed: dict[int, int] = {}
    find = Reduction._places_in
    with pytest.MonkeyPatch.context() as patch:

        def noted(self: Reduction, bucket: object) -> object:
            places = find(self, bucket)  # type: ignore[arg-type]
            if places is not None:
                packed[id(self)] = packed.get(id(self), 0) + 1
            return places

        small = timm.create_model
        patch.setattr(Reduction, "_places_in", noted)
        patch.setattr(gradients.timm, "create_model", lambda name: small("test_resnet"))
        patch.setattr(gradients, "_ROUNDS", 1)
        result = gradients.measure_gradients()
    counts = {"result": result, "packed": sorted(packed.values())}
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(counts))


def test_steps_are_timed_plain_and_packed(tmp_path: Path) -> None:
    """Each density in each round once, and none of them but the dense one as it is."""
    assert run_ranks(2, measured, str(tmp_path)) == [0, 0]
    told = json.loads((tmp_path / "0.json").read_text())
    result, rounds = told["result"], 2 + 2  # in which buckets settle, uncounted, counted
    ratios = {name for name in result if name.endswith("of plain DDP")}
    assert ratios == {f"{d:.0%}, of plain DDP" for d in gradients.DENSITIES}
    assert all(value > 0 for value in result.values())
    assert len(told["packed"]) == len(gradients.DENSITIES) - 1
    assert min(told["packed"]) >= rounds


def test_without_two_nodes_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(allreduce, "why_no_nodes", lambda: "network namespaces need root")
    assert run_command(["bench", "allreduce"]) == 2
    told = capsys.readouterr().err
    assert "network namespaces need root; to measure links that you have: torchrun" in told
    assert told.count("\n") == 1
    with pytest.raises(UserError):
        allreduce.bench_allreduce(as_json=True)


@pytest.mark.cluster
@needs_nodes
def test_two_nodes_are_made_and_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One link here, and a level of a small network."""
    level = allreduce._LEVEL.replace("cifar_resnet18", "cifar_resnet8").replace("40it", "6it")
    monkeypatch.setattr(allreduce, "_LEVEL", level)
    monkeypatch.setattr(allreduce, "_LINKS", {"unshaped": None})
    assert run_command(["bench", "allreduce", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["unshaped"]["5%, of plain DDP"] > 0
    (level_told,) = (value for key, value in told.items() if "at 5 %" in key)
    assert level_told["weights"] == "equal, bit for bit"
    assert level_told["packed, images/s"] > 0
