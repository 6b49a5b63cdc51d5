"""`tombola bench masks`: what enforcing a 5 % mask adds to a step of ResNet-50."""

import statistics

import timm
import torch
import torch.nn.functional as F

from launch.bench.measure import interleaved, median_ratio, report
from pruning.allocate import keep_top
from pruning.fixed import FixedMasks
from pruning.scores import magnitude


def bench_masks(*, as_json: bool) -> None:
    """Times `FixedMasks` against a bare step of the same network.

    ResNet-50 at 224 px: batch 32 in fp32 on the CPU, batch 256 in bf16 and channels_last on CUDA,
    compiled there. The masks are those of a training under way: the first update zeroes more.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    batch_size, rounds = (256, 15) if cuda else (32, 3)
    layout = torch.channels_last if cuda else torch.contiguous_format
    model = timm.create_model("resnet50").to(device).to(memory_format=layout)
    if cuda:
        model.compile()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(batch_size, 3, 224, 224, device=device).to(memory_format=layout)
    labels = torch.randint(0, 1000, (batch_size,), device=device)
    masks = keep_top(magnitude(model), 0.05)
    enforcement = FixedMasks(masks.to(device), model, optimizer)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    def enforce() -> None:
        enforcement.before_update(0)
        enforcement.after_update(0)

    step_seconds, enforce_seconds = interleaved(step, enforce, rounds=rounds)
    report(
        {
            "work": f"resnet50, 224 px, batch {batch_size}, density {masks.density:.4f}",
            "step seconds": statistics.median(step_seconds),
            "mask seconds": statistics.median(enforce_seconds),
            "added to a step": median_ratio(enforce_seconds, step_seconds),
        },
        as_json=as_json,
    )
