# %% [markdown]
# # From one ResNet to a family
#
# Finding a ticket takes many trainings. An *elastic* ticket (Chen et al. 2021,
# [2103.16547](https://arxiv.org/abs/2103.16547)) takes one: the ticket of one network becomes one
# of a deeper or shallower network of its family, block by block, and is trained once, from step k.
#
# This script finds one ticket, of a ResNet-20 on scikit-learn's digits; stretches and squeezes it
# to a family of depths; trains each member beside random masks of the same densities and beside
# the dense network; says what each costs; and takes one of them away, to run it in plain torch
# where tombola is not. What it concludes is computed and printed.
#
#     python docs/examples/resnet_family.py                 # minutes
#     python docs/examples/resnet_family.py --quick         # seconds, too little to conclude from
#
# It is also a notebook: VS Code and Jupytext open it as one. Run again, it trains nothing twice.

# %%
import contextlib
import importlib.util
import inspect
import itertools
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.arrays import digits
from launch.cli import run_command
from pruning.cost import cost_of
from pruning.elastic import Order, format_map, index_map
from pruning.tickets import Ticket
from pruning.trained import trained_model

# %% [markdown]
# ## How much to train


# %%
@dataclass(frozen=True)
class Options:
    """From one ResNet to a family."""

    quick: bool = False
    """networks and trainings too small to conclude from: to see that all works"""
    folder: Path = Path("resnet-family")
    """where everything is written"""


class Setting(NamedTuple):
    """How much is trained."""

    width: int
    total: str
    step: str
    warmup: str
    rounds: int
    seeds: tuple[int, ...]


FULL = Setting(8, "12ep", "40it", "2ep", 5, (0, 1))
QUICK = Setting(4, "12it", "4it", "4it", 1, (0,))

in_notebook = "ipykernel" in sys.modules  # whose command line is none of ours
options = tyro.cli(Options, args=[] if in_notebook else sys.argv[1:])
setting = QUICK if options.quick else FULL
folder = options.folder.resolve() / ("quick" if options.quick else "full")
folder.mkdir(parents=True, exist_ok=True)
torch.set_num_threads(1)  # networks as small as these are slower on several

# %% [markdown]
# Two small functions for what follows: one runs a `tombola` command in this process, which loads
# torch once; the other prints a table.


# %%
def tombola(*words: str) -> None:
    """Runs a command; what it prints goes to FOLDER/tombola.log.

    Ends the script where it fails; the command has said why.
    """
    print(f"tombola {' '.join(words)}", flush=True)
    with (folder / "tombola.log").open("a") as file, contextlib.redirect_stdout(file):
        code = run_command(list(words))
    if code:
        sys.exit(f"tombola {words[0]} ended with {code}")


def show(title: str, columns: str, rows: Iterable[Sequence[str]]) -> None:
    """Prints a table, its columns parted by two spaces."""
    cells = [columns.split("  "), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


# %% [markdown]
# ## 1. Who belongs to the family
#
# A ResNet-20 has three stages of three blocks. The first block of a stage changes sizes, and goes
# onto the first and nowhere else; the others, 1 and 2, are repeated or left out. The method knows
# two orders: `append` repeats the group (or, squeezing, keeps the first ones), `interpolate`
# repeats each block in place (or leaves some out evenly). Often both come to the same.

# %%
SOURCE, SOURCE_BLOCKS = "cifar_resnet20", 3
DEPTHS = (8, 14, 26, 32)
ORDERS: tuple[Order, ...] = ("append", "interpolate")


class Member(NamedTuple):
    """A network of the family, and how the ticket comes to it."""

    name: str
    blocks: tuple[int, ...]
    choice: str
    """the option of the recipe `elastic` that says how"""
    how: str

    @property
    def dense(self) -> str:
        """The stage that trains the same network dense."""
        return f"dense-{'-'.join(map(str, self.blocks))}"


members: list[Member] = []
for depth in DEPTHS:
    num_blocks = (depth - 2) // 6
    maps = {order: format_map([index_map(SOURCE_BLOCKS, num_blocks, order)]) for order in ORDERS}
    for order, found in maps.items():
        print(f"ResNet-{depth}, {order}: {found}")
    for found in dict.fromkeys(maps.values()):  # one map, one member
        orders = [order for order in ORDERS if maps[order] == found]
        name = f"to-{depth}" if len(orders) > 1 else f"to-{depth}-{orders[0]}"
        how = "either order" if len(orders) > 1 else orders[0]
        members.append(Member(name, (num_blocks,) * 3, f'order = "{orders[0]}"', how))

# %% [markdown]
# There are more choices. `map` says for each source block where it goes, in place of an order: here
# a ResNet-14 that keeps the last block in place of the first. And `model.blocks` gives each stage
# its own number of blocks: here 2, 3 and 5, so that one stage is squeezed, one copied and one
# stretched. (Another data set, `transfer`, and the controls `reinit`, `permuted` and `snip` are in
# docs/methods/elastic.md.)

# %%
members.append(Member("to-14-last", (2, 2, 2), 'map = "0:0;2:1"', "by a map"))
members.append(Member("to-2-3-5", (2, 3, 5), 'order = "append"', "append"))
members.sort(key=lambda member: sum(member.blocks))

# %% [markdown]
# ## 2. One search, and a training for each member
#
# The settings are those of launch/configs/digits-elastic.toml but for a lower learning rate and a
# warm-up: without these a dense ResNet-32 of this width does not train in so few steps.

# %%
SHARED = f"""
name = "family"
seeds = {list(setting.seeds)}

[data]
source = "digits"
batch_size = 64
augment = false

[model]
name = "{SOURCE}"
width = {setting.width}

[train]
total = "{setting.total}"
evaluate = "{setting.total}"

[optimizer]
lr = 0.2

[schedule]
name = "linear"
warmup = "{setting.warmup}"

[[stages]]
name = "source"
recipe = "imp"
rounds = {setting.rounds}
prune_fraction = 0.5
rewind = "{setting.step}"
controls = ["random"]
control_levels = [{setting.rounds}]
"""
ELASTIC = """
[[stages]]
name = "{name}"
recipe = "elastic"
ticket = "source"
model.blocks = {blocks}
{choice}
controls = ["random"]
"""
DENSE = """
[[stages]]
name = "{name}"
recipe = "imp"
rounds = 0
model.blocks = {blocks}
"""

stages = [ELASTIC.format(name=m.name, blocks=list(m.blocks), choice=m.choice) for m in members]
networks = {member.dense: list(member.blocks) for member in members}
stages += [DENSE.format(name=name, blocks=blocks) for name, blocks in networks.items()]
config = folder / "family.toml"
config.write_text(SHARED + "".join(stages))
print(f"\n1 search and {len(members)} members, each of {len(setting.seeds)} seeds:")
tombola("run", str(config), "--root", str(folder))

# %% [markdown]
# ## 3. What they cost
#
# For one image of 8x8 pixels, a multiplication and its addition being two FLOPs. Sparse FLOPs are
# what is left where zeros are skipped; whether a machine can do that is another question. Bytes
# are those of the dense parameters in float32.

# %%
runs = [folder / f"family/seed-{seed}" for seed in setting.seeds]
level = f"level-{setting.rounds:02d}"


class Reached(NamedTuple):
    """A network of the family with each of the seeds: its ticket, random masks, dense."""

    name: str
    how: str
    tickets: list[Ticket]
    random: list[Ticket]
    dense: list[Ticket]


def reached(name: str, how: str, dense: str) -> Reached:
    """What a stage of the run came to."""
    tickets = [Ticket.load(run / name / level) for run in runs]
    random = [Ticket.load(run / name / f"{level}-random") for run in runs]
    return Reached(name, how, tickets, random, [Ticket.load(run / dense) for run in runs])


family = [reached(m.name, m.how, f"{m.dense}/level-00") for m in members]
source = reached("source", "found by IMP", "source/level-00")
costs = {}
for one in (source, *family):
    ticket = one.tickets[0]
    costs[one.name] = cost_of(ticket.model, ticket.masks, ticket.config["image_shape"])
show(
    f"Cost, seed {setting.seeds[0]}",
    "member  map  density  parameters  kept  FLOPs  sparse FLOPs  bytes",
    [
        (
            one.name,
            one.tickets[0].config.get("map", "-"),
            f"{one.tickets[0].density:.2%}",
            f"{costs[one.name].parameters:,}",
            f"{costs[one.name].kept_parameters:,}",
            f"{costs[one.name].flops:,}",
            f"{costs[one.name].sparse_flops:,}",
            f"{costs[one.name].bytes:,}",
        )
        for one in (source, *family)
    ],
)

# %% [markdown]
# ## 4. What they reach
#
# The mean over the seeds. Random masks keep as many weights in each layer as the ticket, and start
# from the same weights of step k. The dense network is trained from its own initial weights.


# %%
def accuracy(tickets: Sequence[Ticket]) -> float:
    """The mean over the seeds."""
    return statistics.mean(ticket.accuracy for ticket in tickets)


show(
    f"Test accuracy, mean of {len(setting.seeds)} seeds",
    "member  how  density  ticket  random  dense",
    [
        (
            one.name,
            one.how,
            f"{statistics.mean(ticket.density for ticket in one.tickets):.2%}",
            *(f"{accuracy(tickets):.4f}" for tickets in (one.tickets, one.random, one.dense)),
        )
        for one in (source, *family)
    ],
)

# %% [markdown]
# How far apart must two accuracies be? Twice the standard error of a difference, as the choice of
# the test images alone would make it, is a first measure. Two networks on the same images differ
# less by that; what the seeds add comes on top.

# %%
test = digits("").test
mean = statistics.mean(accuracy(one.tickets) for one in family)
margin = 2 * math.sqrt(2 * mean * (1 - mean) / len(test.labels))


def compare(what: str, one: Sequence[Ticket], other: Sequence[Ticket]) -> None:
    """Prints how far the accuracies of some tickets lie above those of others, pair by pair."""
    gaps = [a.accuracy - b.accuracy for a, b in zip(one, other, strict=True)]
    above = sum(gap > 0 for gap in gaps)
    print(f"{what}: {statistics.mean(gaps):+.4f} on the mean, above in {above} of {len(gaps)}")


def all_of(*groups: Sequence[Ticket]) -> list[Ticket]:
    """The tickets of all groups, one after the other."""
    return list(itertools.chain.from_iterable(groups))


print(f"\non {len(test.labels)} images two standard errors of one difference are {margin:.4f}")
elastic = all_of(*(one.tickets for one in family))
compare("elastic tickets over random masks", elastic, all_of(*(one.random for one in family)))
compare("elastic tickets over dense networks", elastic, all_of(*(one.dense for one in family)))
by_network: dict[str, list[Reached]] = {}
for member, one in zip(members, family, strict=True):
    by_network.setdefault(member.dense.removeprefix("dense-"), []).append(one)
for blocks, choices in by_network.items():
    for first, second in itertools.combinations(choices, 2):
        what = f"blocks {blocks}: {first.name} over {second.name}"
        compare(what, first.tickets, second.tickets)

# %% [markdown]
# ## 5. The picture
#
# Left the accuracy at each depth, right the same against what an image costs: the sparse FLOPs of
# tickets and random masks, the FLOPs of dense networks.

# %%
figure, axes = plt.subplots(ncols=2, sharey=True, figsize=(9.5, 3.8), layout="constrained")
TICKET, RANDOM = "#1a5fb4", "#c64600"
MARKERS = {"found by IMP": "*", "either order": "o", "append": "^", "interpolate": "v"}
num_blocks_of = {"source": 3 * SOURCE_BLOCKS, **{m.name: sum(m.blocks) for m in members}}
for one in (source, *family):
    cost, num = costs[one.name], num_blocks_of[one.name]
    marker = MARKERS.get(one.how, "s")
    for place, sparse, dense in ((axes[0], num, num), (axes[1], cost.sparse_flops, cost.flops)):
        place.plot(dense, accuracy(one.dense), "k_", label="dense")
        place.plot(sparse, accuracy(one.random), marker, color=RANDOM, mfc="white", label="random")
        place.plot(sparse, accuracy(one.tickets), marker, color=TICKET, label=f"ticket, {one.how}")
for place in axes:
    place.grid(alpha=0.25)
axes[0].set_xlabel("residual blocks")
axes[0].set_ylabel("test accuracy")
axes[1].set_xlabel("FLOPs of an image, zeros skipped")
axes[1].set_xscale("log")
in_flops = sorted(cost.flops for cost in costs.values())
axes[1].set_xticks([in_flops[0] / 4, in_flops[0], in_flops[-1]])
axes[1].minorticks_off()
axes[1].xaxis.set_major_formatter(lambda flops, _: f"{flops / 1000:,.0f}k")
handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))  # each once
figure.legend(handles.values(), handles, loc="outside right upper", frameon=False)
figure.savefig(folder / "resnet_family.png", dpi=100)
print(f"\n{folder}/resnet_family.png")

# %% [markdown]
# ## 6. One of them, in plain torch
#
# `tombola export` writes what a ticket was trained to as safetensors, pruned weights zero, and as
# ONNX. To run the first, all that is needed is a network whose tensors have the same names. This
# is one, which knows torch alone; it reads its sizes off the file.


# %%
class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut, which is a 1x1 convolution where sizes change."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            convolution = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class PlainResNet(nn.Module):
    """`images: [N, C, H, W]` to `logits: [N, classes]`, of the sizes that a state dict has."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        width, in_channels = state["conv1.weight"].shape[:2]
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.stages = nn.Sequential()
        channels = width
        for name, weight in state.items():
            if name.endswith(".conv1.weight"):  # stages.STAGE.BLOCK.conv1.weight
                _, stage, block, *_ = name.split(".")
                if block == "0":
                    self.stages.append(nn.Sequential())
                stride = 2 if block == "0" and stage != "0" else 1
                last = self.stages[int(stage)]
                assert isinstance(last, nn.Sequential)
                last.append(Block(channels, len(weight), stride))
                channels = len(weight)
        self.fc = nn.Linear(channels, len(state["fc.weight"]))
        self.load_state_dict(state)

    def forward(self, images: Tensor) -> Tensor:
        out = self.stages(torch.relu(self.norm1(self.conv1(images))))
        logits: Tensor = self.fc(out.mean((2, 3)))
        return logits


# %% [markdown]
# To be sure that nothing of tombola helps, the two classes go into a file of their own, which an
# isolated Python (`-I`) runs.

# %%
PROGRAM = '''"""Runs an exported network: python plain.py NETWORK IMAGES LOGITS, all safetensors."""

import sys

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


{classes}

torch.set_num_threads(1)
network, images, logits = sys.argv[1:]
with torch.no_grad():
    found = PlainResNet(load_file(network)).eval()(load_file(images)["images"])
save_file({{"logits": found}}, logits)
print("loaded of tombola:", sorted({{"data", "train", "pruning", "launch"}} & set(sys.modules)))
'''
classes = "\n\n".join(inspect.getsource(one) for one in (Block, PlainResNet))
(folder / "plain.py").write_text(PROGRAM.format(classes=classes))

chosen = family[0]  # the smallest
place = f"{runs[0]}/{chosen.name}/{level}"
name = str(folder / chosen.name)
tombola(
    "export", place, "--format", "safetensors", "--trained", "--force", "-o", f"{name}.safetensors"
)
normalise = digits("").normalisation
save_file({"images": normalise(torch.from_numpy(test.images))}, folder / "images.safetensors")
images = load_file(folder / "images.safetensors")["images"]
files = [f"{name}.safetensors", str(folder / "images.safetensors"), f"{name}.logits.safetensors"]
print(
    subprocess.run(
        [sys.executable, "-I", str(folder / "plain.py"), *files],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout.strip()
)

# %% [markdown]
# Its logits on the test images must be those of the network here, and its accuracy the ticket's.

# %%
with torch.no_grad():
    expected = trained_model(place)(images)
plain = load_file(f"{name}.logits.safetensors")["logits"]
torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)
right = (plain.argmax(1) == torch.from_numpy(test.labels)).float().mean().item()
assert math.isclose(right, chosen.tickets[0].accuracy, abs_tol=1e-6)
print(f"\nplain torch: the member {chosen.name}")
print(f"plain torch: largest difference of a logit {(plain - expected).abs().max():.1e}")
print(f"plain torch: accuracy {right:.4f}, as the ticket's {chosen.tickets[0].accuracy:.4f}")

# %% [markdown]
# The same as ONNX, where its packages are installed (`pip install 'tombola[onnx]'`).

# %%
if all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript"))):
    import onnxruntime

    side = str(images.shape[-1])
    onnx = ["--format", "onnx", "--image-size", side, "--trained", "--force", "-o", f"{name}.onnx"]
    tombola("export", place, *onnx)
    session = onnxruntime.InferenceSession(f"{name}.onnx")
    (found,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)
    difference = (torch.from_numpy(found) - expected).abs().max()
    print(f"onnxruntime: largest difference of a logit {difference:.1e}")
else:
    print("onnxruntime: not tried, its packages are missing")

# %% [markdown]
# ## On your own networks
#
# 1. `tombola tickets stages MODEL --to OTHER` says which blocks go where, and whether a ticket of
#    one fits the other, before anything is trained.
# 2. `ticket = "runs/NAME/STAGE"` in a stage of recipe `elastic` starts from a ticket that you
#    have; it needs weights of step k, which learning-rate rewinding and fine-tuning do not keep.
# 3. Beside an elastic ticket put IMP on the target (a stage `imp` with its `model`): only that says
#    what the search that you saved would have brought. `tombola report` sets the two side by side.
# 4. launch/configs/ has the paper's pairs: ResNet-32 to 44 and 20, and ResNet-18 to 26 and 34.
