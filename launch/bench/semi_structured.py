"""`tombola bench semi-structured`: inference with 2:4 weights on sparse kernels against dense."""

import copy
import statistics
from collections.abc import Collection
from typing import Any

import timm
import torch
from torch import nn

from data.errors import UserError
from launch.bench.measure import interleaved, median_ratio, report
from pruning.masks import prunable_shapes
from pruning.n_of_m import random_n_of_m
from pruning.semi_structured import as_products, semi_structured

_BATCH, _ROUNDS, _DTYPE = 256, 15, torch.bfloat16


def bench_semi_structured(*, as_json: bool) -> None:
    """Inference of ViT-B/16 and ResNet-50 at 224 px in bf16, two of every four weights at random.

    Raises `UserError` without a CUDA machine.
    """
    if not torch.cuda.is_available():
        raise UserError("bench semi-structured: needs a CUDA machine, 2:4 kernels are NVIDIA's")
    result: dict[str, Any] = {"work": f"inference, 224 px, batch {_BATCH}, bf16"}
    for name in ("vit_base_patch16_224", "resnet50"):
        model = timm.create_model(name)
        masks = random_n_of_m(prunable_shapes(model), 2, 4, 0, misfits="dense")
        masks.project_(model)
        result[name] = measure_inference(model, semi_structured(masks), (3, 224, 224))
    report(result, as_json=as_json)


@torch.no_grad()
def measure_inference(
    model: nn.Module, names: Collection[str], shape: tuple[int, ...]
) -> dict[str, Any]:
    """Seconds of a batch through `model` on CUDA, dense and with the 2:4 weights `names` on sparse
    kernels; the median of their ratios; and the largest difference of a logit, over the largest.

    `shape`: of an image, `[C, H, W]`.
    """
    dense = copy.deepcopy(model).eval().to("cuda", _DTYPE).to(memory_format=torch.channels_last)
    sparse = copy.deepcopy(dense)
    taken = as_products(sparse, names)
    images = torch.randn(_BATCH, *shape, device="cuda", dtype=_DTYPE)
    images = images.to(memory_format=torch.channels_last)
    expected, found = dense(images).float(), sparse(images).float()
    dense_seconds, sparse_seconds = interleaved(
        lambda: dense(images), lambda: sparse(images), rounds=_ROUNDS
    )
    return {
        "layers on sparse kernels": f"{len(taken)} of {len(names)}",
        "dense seconds": statistics.median(dense_seconds),
        "2:4 seconds": statistics.median(sparse_seconds),
        "2:4 / dense": median_ratio(sparse_seconds, dense_seconds),
        "difference": float((found - expected).abs().max() / expected.abs().max()),
    }
