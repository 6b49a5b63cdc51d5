"""2:4 tickets: two of every four weights are stored, and computed as matrix products."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data.errors import RunError
from launch.cli import run_command
from pruning.importing import Imported, store
from pruning.masks import Masks, prunable_shapes
from pruning.n_of_m import n_of_m, random_n_of_m
from pruning.scores import magnitude
from pruning.semi_structured import as_products, compress, decompress, semi_structured
from pruning.semi_structured_file import from_bytes, load, to_bytes
from train.models import ModelSpec

SPEC = ModelSpec("cifar_resnet8", 10, 4, {"width": 8})


def random_masks(model: nn.Module) -> Masks:
    return random_n_of_m(prunable_shapes(model), 2, 4, 0, misfits="dense")


@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 3), st.integers(1, 3)),
    ),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_what_is_compressed_comes_back_bit_for_bit(
    shape: tuple[int, ...], density: float, seed: int
) -> None:
    """Also where fewer than two of four are kept, a kept weight is zero, or the count is odd."""
    generator = torch.Generator().manual_seed(seed)
    shape = (shape[0], 4 * shape[1], *shape[2:])
    weight = torch.randn(shape, generator=generator).round(decimals=1)
    pattern = random_n_of_m({"w": shape}, 2, 4, seed, misfits="refuse")["w"]
    mask = pattern & (torch.rand(shape, generator=generator) < density)
    assert semi_structured(Masks({"w": mask})) == ["w"]
    values, places = compress(weight, mask)
    assert values.numel() == weight.numel() // 2
    assert places.numel() == -(-weight.numel() // 8)
    assert torch.equal(decompress(values, places, shape), weight * mask + 0.0)


def test_the_format_is_as_written_down() -> None:
    """docs/formats.md: values along the inputs, two groups a byte, the smaller place first."""
    weight = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
    kept = [[1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0]]
    values, places = compress(weight, torch.tensor(kept, dtype=torch.bool))
    assert values.tolist() == [[1, 4, 6, 7, 0, 11]]
    assert places.tolist() == [(0 + 4 * 3) + 16 * (1 + 4 * 2), 0 + 4 * 2]


def test_only_layers_of_the_pattern_are_chosen() -> None:
    three = torch.tensor([[True, True, True, False]])
    odd = torch.ones(2, 3, dtype=torch.bool)
    masks = Masks({"three": three, "two": ~three | (three & (torch.arange(4) == 0)), "odd": odd})
    assert semi_structured(masks) == ["two"]


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "bias": False},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": (3, 5), "stride": (1, 2), "padding": (0, 2)},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": 7, "stride": 4, "padding": (2, 3), "dilation": (1, 2)},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolution_is_a_matrix_product(options: dict[str, Any]) -> None:
    """In either memory format of its images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, **options))
    images = torch.randn(2, 8, 15, 17)
    expected = model(images)
    assert as_products(model, ["0.weight"], kernels=False) == ["0.weight"]
    for form in (torch.contiguous_format, torch.channels_last):
        found = model(images.contiguous(memory_format=form))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "cifar_resnet8"])
@torch.no_grad()
def test_a_network_of_products_gives_the_same_logits(name: str) -> None:
    """timm's and ours; every 2:4 layer of a plain class is computed so."""
    spec = SPEC if name == SPEC.name else ModelSpec(name, 10, 4)
    model = spec.build(1).eval()
    masks = random_masks(model)
    masks.project_(model)
    images = torch.randn(2, 4, 160, 160)
    expected = model(images)
    names = semi_structured(masks)
    assert as_products(model, names, kernels=False) == names
    assert len(names) >= 4
    torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)


def test_other_layers_stay_as_they_are() -> None:
    """In groups, padded with images, of a class of its own, with a padding by name."""

    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        Own(8, 8, 1),
        nn.Conv2d(8, 8, 3, padding="same"),
    )
    assert not as_products(model, [f"{i}.weight" for i in range(4)], kernels=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_kernels_are_nvidias() -> None:
    """Elsewhere torch says so: it is no matter of the shape, which is quietly left dense."""
    model = nn.Sequential(nn.Linear(64, 32))
    with pytest.raises(RuntimeError, match="CUDA"):
        as_products(model, ["0.weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@torch.no_grad()
def test_sparse_kernels_give_the_same_logits() -> None:
    model = ModelSpec("resnet18", 10, 3).build(1).eval()
    masks = random_masks(model)
    masks.project_(model)
    model.to("cuda", torch.float16)
    images = torch.randn(8, 3, 64, 64, device="cuda", dtype=torch.float16)
    expected = model(images)
    assert len(as_products(model, semi_structured(masks))) > 10
    torch.testing.assert_close(model(images), expected, rtol=0.05, atol=0.05)


# ---- files and the command


def write_ticket(folder: Path, spec: ModelSpec = SPEC, *, is_2_4: bool = True) -> str:
    model = spec.build(1)
    ticket = Imported(
        model=spec,
        masks=n_of_m(magnitude(model), 2 if is_2_4 else 3, 4, misfits="dense"),
        weights=model.state_dict(),
        step=3,
        level=0,
        origin="pruning",
        source="a test",
    )
    return store(ticket, str(folder / "tickets"))


def exported(folder: Path, **options: Any) -> Path:
    file = folder / "network.safetensors"
    words = ["export", write_ticket(folder, **options), "--format", "semi-structured", "-o"]
    assert run_command([*words, str(file)]) == 0
    return file


@torch.no_grad()
def test_a_file_holds_the_ticket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every weight bit for bit, in little more than half the bytes; its metadata say what it is."""
    file = exported(tmp_path)
    told = capsys.readouterr().out
    assert "10 of 10 layers are 2:4" in told
    if not torch.cuda.is_available():
        assert "a CUDA machine is needed" in told
    spec, state, names = from_bytes(file.read_bytes())
    model = SPEC.build(1)
    masks = n_of_m(magnitude(model), 2, 4, misfits="dense")
    masks.project_(model)
    assert spec == SPEC
    assert names == semi_structured(masks)
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    dense = len(safetensors.torch.save(model.state_dict()))
    assert file.stat().st_size < 0.65 * dense
    images = torch.randn(2, 4, 16, 16)
    loaded = load(str(file), device="cpu", dtype=torch.float32)
    torch.testing.assert_close(loaded(images), model.eval()(images), rtol=1e-3, atol=1e-4)


def test_a_ticket_of_another_pattern_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = write_ticket(tmp_path, is_2_4=False)
    words = ["export", url, "--format", "semi-structured", "-o", str(tmp_path / "f")]
    assert run_command(words) == 2
    assert 'pattern = "2:4"' in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_a_ticket_in_a_basis_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ModelSpec(SPEC.name, 10, 4, {"width": 8, "basis": "dct"})
    url = write_ticket(tmp_path, spec)
    words = ["export", url, "--format", "semi-structured", "-o", str(tmp_path / "f")]
    assert run_command(words) == 2
    assert "coefficients in the basis 'dct'" in capsys.readouterr().err


def changed(content: bytes, **replaced: Tensor | None) -> bytes:
    """The file with other tensors in it; `None` takes one away."""
    spec, *_ = from_bytes(content)
    tensors = safetensors.torch.load(content) | replaced
    metadata = {"format": "pt", "pattern": "2:4", "model": json.dumps(asdict(spec))}
    return safetensors.torch.save(
        {name: value for name, value in tensors.items() if value is not None}, metadata
    )


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    """Cut, of another kind, of other shapes, with places out of order, with too much or little."""
    content = exported(tmp_path).read_bytes()
    name = from_bytes(content)[2][1]
    tensors = safetensors.torch.load(content)
    values, places = tensors[f"{name}.values"], tensors[f"{name}.places"]
    damaged = {
        "cut": content[:-5],
        "no file": b"",
        "other kind": safetensors.torch.save({"a": torch.zeros(1)}),
        "values": changed(content, **{f"{name}.values": values[:1].contiguous()}),
        "few places": changed(content, **{f"{name}.places": places[:-1].contiguous()}),
        "order": changed(content, **{f"{name}.places": torch.zeros_like(places)}),
        "lacks": changed(content, **{"fc.bias": None}),
        "too much": changed(content, **{"more": torch.zeros(1)}),
    }
    for what, bad in damaged.items():
        file = tmp_path / "bad.safetensors"
        file.write_bytes(bad)
        with pytest.raises(RunError, match=r"bad\.safetensors: damaged: ") as caught:
            load(str(file), device="cpu")
        assert "\n" not in str(caught.value), what


def test_a_file_of_another_network_is_damaged() -> None:
    model = SPEC.build(1)
    masks = random_masks(model)
    facts = {"model": '{"name": "cifar_resnet8", "num_classes": 5, "in_chans": 4, "arguments": {}}'}
    with pytest.raises(ValueError, match="of shape"):
        from_bytes(to_bytes(model.state_dict(), masks, facts))
