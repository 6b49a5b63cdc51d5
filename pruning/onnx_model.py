"""Networks as ONNX models, which are run once before they are handed out."""

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import RunError, UserError

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
"""what `torch.onnx.export` and the check need: the extra `onnx`"""
_LARGEST = 2**31 - 1
"""bytes of a protobuf message"""
_CIFAR_SIZE = 32
_TOLERANCE = 1e-4
"""of the largest logit: float32 sums in another order"""


def to_onnx(
    model: nn.Module, *, in_chans: int, image_size: int | None = None, facts: Mapping[str, str]
) -> bytes:
    """The network in eval mode as an ONNX model; `facts` become its metadata.

    `images: [batch, in_chans, size, size] float32` to `logits: [batch, num_classes]`, for any
    batch. The side is by default that of the timm model's own configuration, and 32 for the CIFAR
    networks. onnxruntime gives the same logits on random images of two batch sizes.
    Raises `UserError` where a package is missing or the network does not allow it, `RunError`
    where the logits differ.
    """
    require_packages()
    size = sum(value.nbytes for value in model.state_dict().values())
    if size > _LARGEST:
        raise UserError(f"{size:,} bytes of weights: an ONNX file holds at most {_LARGEST:,}")
    model = model.eval()
    shape = (in_chans, *image_sides(model, image_size))
    _try(model, shape)
    content = _exported(model, torch.zeros(2, *shape), facts)
    for batch_size in (1, 3):
        generator = torch.Generator().manual_seed(batch_size)
        _compare(model, content, torch.randn(batch_size, *shape, generator=generator))
    return content


def require_packages() -> None:
    """Raises `UserError` unless all of `PACKAGES` are installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX export needs {', '.join(missing)}: pip install 'tombola[onnx]', or choose "
            "another --format"
        )


def image_sides(model: nn.Module, image_size: int | None) -> tuple[int, int]:
    """Height and width: those given, or of the timm model's own configuration, or 32."""
    if image_size is not None:
        return image_size, image_size
    described: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    height, width = described.get("input_size", (_CIFAR_SIZE, _CIFAR_SIZE))[-2:]
    return height, width


def _try(model: nn.Module, shape: tuple[int, ...]) -> None:
    try:
        with torch.no_grad():
            model(torch.zeros(2, *shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the network does not take images of {'x'.join(map(str, shape))}: "
            f"{str(error).partition(chr(10))[0]}; choose another --image-size"
        ) from None


def _exported(model: nn.Module, images: Tensor, facts: Mapping[str, str]) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own functions
            program = torch.onnx.export(
                model,
                (images,),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: "batch"},),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"the network cannot be expressed in ONNX: {reason}") from error
    assert program is not None
    document = program.model_proto
    for key, value in facts.items():
        document.metadata_props.add(key=key, value=value)
    content: bytes = document.SerializeToString()
    return content


def _compare(model: nn.Module, content: bytes, images: Tensor) -> None:
    """Raises `RunError` unless onnxruntime and torch give the same logits."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        expected = model(images)
    largest = float((torch.from_numpy(found) - expected).abs().max())
    allowed = _TOLERANCE * max(1.0, float(expected.abs().max()))
    if not largest <= allowed:
        raise RunError(
            f"the ONNX model's logits differ from torch's by {largest:.1e} on random images, more "
            f"than {allowed:.1e}: nothing was written"
        )
