"""Devices, ranks and precision: what makes one update the same on one process and on many.

On `accelerate` for the process group, the device and DDP. The engine knows nothing of epochs,
evaluation or files. One update goes: micro-batches, gradients synchronised on the last only ->
unscale -> `before_update` -> clip -> optimizer -> `after_update`.
"""

import contextlib
import os
import warnings
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from data.errors import UserError
from data.loader import Batch
from train.compiling import compile_in_place
from train.network import choose_interface
from train.objective import Objective
from train.ranks import Ranks
from train.reduction import ReduceDtype, Reduction
from train.rng import kept_generators
from train.state import Network, TrainState

Precision = Literal["fp32", "bf16", "fp16"]


class Engine(Ranks):
    """One rank of a training on one process or many (torchrun), on CPU (gloo) or CUDA (NCCL)."""

    def __init__(
        self,
        *,
        precision: Precision = "fp32",
        channels_last: bool = False,
        compile: bool = False,
        cuda_graphs: bool = False,
        sync_batchnorm: bool = False,
        clip: float | None = None,
        micro_batch: int | None = None,
        timeout: float = 300.0,
        pack_below: float = 0.4,
        reduce_dtype: ReduceDtype = "fp32",
    ) -> None:
        cuda = torch.cuda.is_available()
        handlers: list[Any] = [
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ]
        if "LOCAL_RANK" in os.environ:  # under torchrun
            choose_interface()
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            limit = timedelta(seconds=timeout)
            handlers.append(InitProcessGroupKwargs(backend=backend, timeout=limit))
        # Autocast and the scaler are ours: a stage may choose another precision than the last.
        self.accelerator = Accelerator(cpu=not cuda, mixed_precision="no", kwargs_handlers=handlers)
        self.device = self.accelerator.device
        torch.backends.cudnn.benchmark = True  # shapes repeat; the first steps choose kernels
        super().__init__(self.accelerator.process_index, self.accelerator.num_processes)
        self.clip, self.micro_batch = clip, micro_batch
        self._pack_below, self._reduce_dtype = pack_below, reduce_dtype
        self._compile, self._cuda_graphs = compile, cuda_graphs
        self._sync_batchnorm = sync_batchnorm
        self.channels_last = channels_last
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        if sync_batchnorm and not cuda:
            raise UserError("train.sync_batchnorm = true needs CUDA; leave it out on the CPU")

    # Models ------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, example: Tensor) -> Network:
        """Moves a model to the device and makes it ready for distributed updates.

        `example: [N, C, H, W]` has the shape of a micro-batch. Parameter names stay as they are.
        """
        self.accelerator.free_memory()
        if self._sync_batchnorm and self.world_size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = model.to(self.device).to(memory_format=self._memory_format)
        if self._compile:
            compile_in_place(model, cuda_graphs=self.replays)
        with warnings.catch_warnings():
            # torch 2.15 renames the option; its new name is not in 2.11.
            warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")
            wrapped = self.accelerator.prepare_model(model)
        if self.world_size == 1:
            return Network(model, wrapped)
        reduction = Reduction(model, pack_below=self._pack_below, reduce_dtype=self._reduce_dtype)
        wrapped.register_comm_hook(reduction, Reduction.sum)
        network = Network(model, wrapped, reduction)
        self._settle(network, example)
        return network

    def _settle(self, network: Network, example: Tensor) -> None:
        """Two backward passes that leave no trace, after which DDP keeps its buckets.

        DDP rebuilds its gradient buckets once, after the first backward pass; a resumed run would
        do so at another step than the uninterrupted one, and on three or more ranks sum the
        gradients of that step in another order.
        """
        before = {name: value.clone() for name, value in network.module.state_dict().items()}
        with kept_generators(self.device):
            for _ in range(2):
                self.forward(network.wrapped, example).mean().backward()
        network.module.load_state_dict(before)
        network.module.zero_grad(set_to_none=True)

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """The logits of images `[N, C, H, W]`: `[N, classes]` in float32.

        With CUDA graphs they are overwritten by the next call, which the backward pass of this one
        must come before.
        """
        if self.replays:
            torch.compiler.cudagraph_mark_step_begin()
        with self.autocast():
            logits: Tensor = model(self.place(images))
        return logits.float()

    @property
    def replays(self) -> bool:
        """Whether CUDA graphs are used: gradients that are accumulated would lie in the memory that
        the next replay overwrites."""
        return self._compile and self._cuda_graphs and self.micro_batch is None

    def autocast(self) -> torch.autocast:
        """The context in which forward passes run."""
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None)

    @property
    def dtype(self) -> torch.dtype:
        """What forward passes compute in."""
        return self._dtype or torch.float32

    def make_scaler(self) -> torch.amp.GradScaler:
        """The loss scaler of a training that begins: it does nothing but for fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self._dtype is torch.float16)

    def num_micro_batches(self, batch_size: int) -> int:
        """Into how many parts each rank cuts its share of a global batch: the same on all ranks."""
        largest_share = -(-batch_size // self.world_size)
        return -(-largest_share // (self.micro_batch or largest_share))

    def example(self, image_shape: tuple[int, int, int], batch_size: int) -> Tensor:
        """Zeros of the shape of this rank's micro-batches: `[N, C, H, W]`, N at least 2."""
        share = batch_size // self.world_size // self.num_micro_batches(batch_size)
        return torch.zeros(max(2, share), *image_shape, device=self.device)

    # One update --------------------------------------------------------------------------

    def backward(self, state: TrainState, batch: Batch, objective: Objective) -> Tensor:
        """Gradients of the mean loss over the *global* batch; `batch` is this rank's share.

        Each rank's loss is a sum over its share, divided by the global batch size, so that
        unequal shares and micro-batches weigh every image alike. On several ranks a gradient that
        the sparsity has no use for may be zero. Returns this rank's part of the mean loss,
        detached: the sum over ranks is the loss of the step.
        """
        batch_size, wrapped = state.loader.batch_size, state.network.wrapped
        images, targets = objective.mix(batch, state.step)
        num_parts = self.num_micro_batches(batch_size)
        if state.network.reduction is not None:
            state.network.reduction.need(state.sparsity.gradient_masks(state.step))
        state.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        parts = zip(images.tensor_split(num_parts), targets.tensor_split(num_parts), strict=True)
        for index, (part, target) in enumerate(parts):
            last = index == num_parts - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(wrapped):
                logits = self.forward(wrapped, part)
                loss = objective.loss_sum(logits, target) / batch_size
                state.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def place(self, images: Tensor) -> Tensor:
        """`images` in the memory format of the model."""
        return images.contiguous(memory_format=self._memory_format)

    def update(self, state: TrainState) -> None:
        """One optimizer step on the gradients of all ranks, unless the sparsity vetoes it."""
        state.scaler.unscale_(state.optimizer)
        if state.sparsity.before_update(state.step):
            if self.clip is not None:
                parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(parameters, self.clip)
            state.scaler.step(state.optimizer)
        state.scaler.update()
        state.sparsity.after_update(state.step)

    # Ranks -------------------------------------------------------------------------------

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Gives every rank the buffers of rank 0: before an evaluation and before a checkpoint.

        Training never reads running statistics, so rank 0's are the run's, whenever this happens.
        Only what is in the state dict: other buffers are a function of what every rank has.
        """
        if self.world_size > 1:
            saved = model.state_dict()
            for name, buffer in model.named_buffers():
                if name in saved:
                    dist.broadcast(buffer, 0)

    def close(self) -> None:
        """Leaves the process group, once what holds a reference to it is collected."""
        self.accelerator.free_memory()
        if dist.is_initialized():
            dist.destroy_process_group()
