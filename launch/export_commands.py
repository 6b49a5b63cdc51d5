"""The words after `tombola export` and `tombola tickets import`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional


@dataclass
class Export:
    """Writes a ticket's network in a form that other tools read."""

    ticket: Annotated[Positional[str], tyro.conf.arg(metavar="TICKET")]
    """a ticket: RUN/STAGE/LEVEL, STORE/ID, or a run, of which it is the sparsest"""
    form: Annotated[
        Literal["torch", "safetensors", "onnx", "pruning", "mpt", "semi-structured"],
        tyro.conf.arg(name="format"),
    ]
    """torch, safetensors: a state dict with zeros; onnx: the network in eval mode; pruning: a
    state dict with the buffers of torch.nn.utils.prune; mpt: the small file of a multi-prize
    ticket; semi-structured: a 2:4 ticket for torch's sparse kernels"""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """file or URL"""
    trained: bool = False
    """the weights at the end of the level's training (averaged if it averaged), instead of those
    at step k"""
    image_size: int | None = None
    """onnx, mpt: side of the images; by default mpt: of those that it was measured on; onnx:
    that of timm's model, 32 for CIFAR networks"""
    force: bool = False
    """replace a file that is there"""
    root: str = "runs"
    """folder or URL that holds the runs"""

    def __call__(self) -> None:
        from launch.export import export_ticket

        export_ticket(
            self.ticket,
            form=self.form,
            output=self.output,
            trained=self.trained,
            image_size=self.image_size,
            force=self.force,
            root=self.root,
        )


@dataclass
class ImportTicket:
    """Makes a ticket of masks and weights that another tool wrote."""

    source: Annotated[Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """pruning: a state dict with *_orig and *_mask, .safetensors or by torch.save; open-lth: a
    level's folder, with mask.pth and model_ep*_it*.pth; biprop: a state dict with weights and
    scores; mpt: a file that tombola export wrote"""
    origin: Annotated[Literal["pruning", "open-lth", "biprop", "mpt"], tyro.conf.arg(name="from")]
    """torch.nn.utils.prune, open_lth, biprop, or the file of a multi-prize ticket"""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """folder or URL of the store"""
    model: str | None = None
    """any timm model, cifar_resnet{6n+2}, cifar_resnet18/34, cifar_vgg{11,13,16,19} or
    cifar_vgg_small; mpt: the file tells it, and all that follows"""
    num_classes: int | None = None
    """outputs of the network"""
    in_chans: int = 3
    """channels of its images"""
    width: int | None = None
    """channels of the first stage, as model.width: CIFAR networks and timm ResNets; by default 16
    for cifar_resnet{6n+2}, 128 for cifar_vgg_small, else 64"""
    norm: str | None = None
    """batch or group, CIFAR networks only; by default batch"""
    activation: str | None = None
    """relu or sign, as model.activation: CIFAR networks, timm ResNets of basic blocks (default:
    relu)"""
    density: float | None = None
    """biprop: the fraction of each layer's weights that is kept, there called prune rate"""
    step: int | None = None
    """training steps behind the weights; by default what open_lth's file name says, else 0"""
    level: int | None = None
    """rounds of pruning behind the masks; by default what open_lth's folder says, else 0"""

    def __call__(self) -> None:
        from launch.export import import_ticket

        import_ticket(
            self.source,
            origin=self.origin,
            model=self.model,
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            width=self.width,
            norm=self.norm,
            activation=self.activation,
            density=self.density,
            step=self.step,
            level=self.level,
            output=self.output,
        )
