# %% [markdown]
# # Is my ticket stable?
#
# A ticket is a mask and the weights at step k, from which it is trained. Train it twice, with the
# data in another order: do both trainings end in the same valley? Frankle et al. (2020,
# [1912.05671](https://arxiv.org/abs/1912.05671)) measure the error on the straight line between
# them. The *barrier* is the highest error on the line less the mean of its ends; below 2 %, on
# training and on test images, the two are connected, and the ticket is called stable. In the paper
# sparse networks that are stable reach the accuracy of the dense one, and those that are not, do
# not.
#
# This script finds tickets by iterative magnitude pruning (IMP), rewound to the initial weights and
# to step k, with two seeds; measures which of them are stable; sets that beside their accuracy over
# random masks; and compares the masks of the two seeds. What it concludes is computed and printed.
#
#     python docs/examples/stable_ticket.py                 # minutes
#     python docs/examples/stable_ticket.py --quick         # seconds, too little to conclude from
#
# It is also a notebook: VS Code and Jupytext open it as one. Run again, it trains nothing twice.

# %%
import contextlib
import itertools
import json
import statistics
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import tomli_w
import torch
import tyro

from launch.cli import run_command
from pruning.connectivity import STABLE, Connectivity, all_results
from pruning.overlap import Overlap, overlaps, total
from pruning.store import open_tickets
from pruning.tickets import Ticket

# %% [markdown]
# ## What to look at
#
# Set `RUN` to a stage of a run of yours, such as `"runs/digits-imp/imp"`, and the script looks at
# its tickets in place of its own.

# %%
RUN: str | None = None
LEVELS: tuple[int, ...] = ()  # of them; none: the dense network, the middle and the sparsest


@dataclass(frozen=True)
class Options:
    """Is my ticket stable?"""

    run: str | None = RUN
    """a stage of a run of yours, as runs/digits-imp/imp (default: tickets are found here)"""
    levels: tuple[int, ...] = LEVELS
    """with --run: which levels (default: the dense network, the middle and the sparsest)"""
    quick: bool = False
    """networks and trainings too small to conclude from: to see that all works"""
    folder: Path = Path("stable-ticket")
    """where everything is written"""


class Setting(NamedTuple):
    """How much is trained, and how finely the lines are measured."""

    model: str
    width: int
    total: str
    step: str
    rounds: int
    prune_fraction: float
    levels: tuple[int, ...]
    points: int
    num_batches: int


FULL = Setting("cifar_resnet20", 8, "12ep", "20it", 4, 0.6, (0, 2, 4), 30, 16)
QUICK = Setting("cifar_resnet8", 4, "25it", "5it", 2, 0.6, (0, 2), 4, 4)

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
def tombola(*words: str) -> str:
    """Runs a command and gives what it printed, which also goes to FOLDER/tombola.log.

    Ends the script where it fails; the command has said why.
    """
    log = folder / "tombola.log"
    begun = log.stat().st_size if log.exists() else 0
    with log.open("a") as file, contextlib.redirect_stdout(file):
        code = run_command(list(words))
    if code:
        sys.exit(f"tombola {' '.join(words)} ended with {code}")
    return log.read_bytes()[begun:].decode()


def show(title: str, columns: str, rows: Iterable[Sequence[str]]) -> None:
    """Prints a table, its columns parted by two spaces."""
    cells = [columns.split("  "), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


# %% [markdown]
# ## 1. Find tickets
#
# A stage of IMP for each rewinding point. Beside the tickets at the levels that are measured later
# stand random masks that keep as many weights in each layer. The two seeds differ in everything:
# initial weights, order of the data, and so masks.

# %%
REWINDS, SEEDS = ("init", setting.step), (0, 1)
SHARED = f"""
[data]
source = "digits"
batch_size = 64
augment = false

[model]
name = "{setting.model}"
width = {setting.width}

[train]
total = "{setting.total}"
evaluate = "{setting.total}"

[optimizer]
lr = 0.3

[schedule]
name = "linear"
"""
STAGE = f"""
[[stages]]
name = "rewound-to-{{rewind}}"
recipe = "imp"
rounds = {setting.rounds}
prune_fraction = {setting.prune_fraction}
rewind = "{{rewind}}"
controls = ["random"]
control_levels = {[level for level in setting.levels if level]}
"""


def find_tickets() -> list[str]:
    """Trains them, and gives where they are: RUN/STAGE for each seed and rewinding point."""
    config = folder / "tickets.toml"
    config.write_text(SHARED + "".join(STAGE.format(rewind=rewind) for rewind in REWINDS))
    for seed in SEEDS:
        words = ["run", str(config), "--root", str(folder), "--name", f"seed-{seed}"]
        print(f"tombola {' '.join(words)} --seed {seed}", flush=True)
        tombola(*words, "--seed", str(seed))
    return [f"{folder}/seed-{seed}/rewound-to-{rewind}" for seed in SEEDS for rewind in REWINDS]


places = [options.run.rstrip("/")] if options.run else find_tickets()
runs: dict[str, list[str]] = {}
for run, _, stage in (place.rpartition("/") for place in places):
    runs.setdefault(run, []).append(stage)
for run, stages in runs.items():
    found = {ticket.stage for ticket in open_tickets(run).all()}
    if not found.issuperset(stages):
        sys.exit(f"{run}: no tickets of {', '.join(stages)} there, but of {', '.join(found)}")
    print(f"{run}: {', '.join(stages)}")

# %% [markdown]
# ## 2. Train two copies of each, and measure the line between them
#
# That is a stage of its own, `recipe = "connectivity"`. Both copies start from the ticket's weights
# of step k and its masks, and see the data in an order of their own. It could be added to the run's
# configuration, and the run go on with it. Here it is a run of its own, with the same settings, so
# that yours stays as it is.
#
# Statistics of batch normalisation fit no network on the line but its ends, and are taken anew at
# each point from training batches (`batchnorm = "recalibrate"`, the default). Chapter 5 shows what
# happens otherwise.


# %%
def tickets_of(run: str, stage: str) -> list[Ticket]:
    """The tickets of a stage by level, without its controls."""
    found = [t for t in open_tickets(run).all() if t.stage == stage and not t.control]
    return sorted(found, key=lambda ticket: ticket.level)


def chosen_levels(run: str, stage: str) -> list[int]:
    """The levels to measure."""
    if options.run is None:
        return list(setting.levels)
    known = [ticket.level for ticket in tickets_of(run, stage)]
    return list(options.levels) or sorted({known[0], known[len(known) // 2], known[-1]})


def analysis_of(run: str, stages: Sequence[str]) -> tuple[Path, str]:
    """A configuration that measures stages of a run with the settings they had, and its name."""
    document: dict[str, Any] = tomllib.loads(Path(run, "config.toml").read_text())
    document["name"] = "-".join(["lines-of", Path(run).name, *map(str, options.levels)])
    measured = []
    for stage in stages:
        (made,) = (one for one in document["stages"] if one["name"] == stage)
        own = {key: value for key, value in made.items() if isinstance(value, dict)}
        line = {"points": setting.points, "num_batches": setting.num_batches}
        ticket = {"ticket": f"{Path(run).resolve()}/{stage}", "levels": chosen_levels(run, stage)}
        measured.append({"name": stage, "recipe": "connectivity", **ticket, **line, **own})
    path = folder / f"{document['name']}.toml"
    path.write_text(tomli_w.dumps({**document, "stages": measured}))
    return path, document["name"]


analyses = {run: analysis_of(run, stages) for run, stages in runs.items()}
for path, _ in analyses.values():
    print(f"tombola run {path} --root {folder}", flush=True)
    tombola("run", str(path), "--root", str(folder))

# %% [markdown]
# ## 3. Which level is stable?


# %%
class Measured(NamedTuple):
    """A ticket, the line between two trainings of it, and what it is compared with."""

    run: str
    ticket: Ticket
    line: Connectivity
    random: Ticket | None

    @property
    def barrier(self) -> float:
        """The higher one of training and test images: the one that decides."""
        return max(curve.barrier for curve in self.line.curves.values())


def measured_in(run: str) -> list[Measured]:
    """All lines of a run's tickets, by stage and level."""
    tickets = open_tickets(run).all()
    found = []
    for line in all_results(folder / analyses[run][1]):
        (ticket,) = (t for t in tickets if t.place == f"{line.stage}/{line.name}")
        beside = (t for t in tickets if t.method == "random" and t.parent == ticket.id)
        found.append(Measured(run, ticket, line, next(beside, None)))
    return sorted(found, key=lambda one: (places.index(f"{run}/{one.ticket.stage}"), one.line.name))


measured = [one for run in runs for one in measured_in(run)]
show(
    f"Barriers (stable: below {STABLE:.0%} on both)",
    "run  stage  level  density  on train  on test  stable",
    [
        (
            Path(one.run).name,
            one.ticket.stage,
            str(one.ticket.level),
            f"{one.ticket.density:.2%}",
            *(f"{one.line.curves[split].barrier:.2%}" for split in ("train", "test")),
            "yes" if one.line.is_connected else "no",
        )
        for one in measured
    ],
)
print(f"BatchNorm: {', '.join(sorted({one.line.batchnorm for one in measured}))}\n")

# %% [markdown]
# One pair of trainings is one draw. A level counts as stable here if it is with every seed.

# %%
by_stage: dict[str, dict[int, list[Measured]]] = {}
for one in measured:
    by_stage.setdefault(one.ticket.stage, {}).setdefault(one.ticket.level, []).append(one)
for stage, levels in by_stage.items():
    verdicts = []
    for group in levels.values():
        num_stable = sum(one.line.is_connected for one in group)
        verdicts.append(f"{num_stable} of {len(group)} at {group[0].ticket.density:.2%}")
    print(f"{stage}: stable {', '.join(verdicts)}")

# %% [markdown]
# ## 4. Does it go with accuracy?
#
# What a ticket is worth is its accuracy over random masks that keep as many weights in each layer,
# from the same weights. The dense network has none beside it.

# %%
compared = [(one, one.random) for one in measured if one.random is not None]
gains = {(one.run, one.ticket.place): one.ticket.accuracy - r.accuracy for one, r in compared}
show(
    "Test accuracy",
    "run  stage  level  density  ticket  random  gain  stable",
    [
        (
            Path(one.run).name,
            one.ticket.stage,
            str(one.ticket.level),
            f"{one.ticket.density:.2%}",
            f"{one.ticket.accuracy:.4f}",
            f"{random.accuracy:.4f}",
            f"{gains[one.run, one.ticket.place]:+.4f}",
            "yes" if one.line.is_connected else "no",
        )
        for one, random in compared
    ],
)
for word, stable in (("stable", True), ("not stable", False)):
    here = [one for one, _ in compared if one.line.is_connected is stable]
    if here:
        gain = statistics.mean(gains[one.run, one.ticket.place] for one in here)
        reached = statistics.mean(one.ticket.accuracy for one in here)
        print(f"{word}, {len(here)} tickets: accuracy {reached:.4f}, over random masks {gain:+.4f}")
    else:
        print(f"{word}, 0 tickets with a random mask beside them: nothing to compare")
dense = [one.ticket.accuracy for one in measured if one.ticket.density == 1]
if dense:
    print(f"dense networks: accuracy {statistics.mean(dense):.4f}")

# %% [markdown]
# The comparison mixes densities: where the two groups have other densities, so do the accuracies
# differ. Read it beside the table, and take differences of a few test images for noise.

# %% [markdown]
# ## 5. A trap: batch normalisation on the line
#
# The highest barrier once more, between the same two trainings, but with statistics that lie on the
# line like the weights. `tombola report --barrier` measures any two levels, also of two runs.

# %%
highest = max(measured, key=lambda one: one.barrier)
ends = [
    f"{folder / analyses[highest.run][1]}/{end}"
    for end in (highest.line.first, highest.line.second)
]
how = ["--points", str(setting.points), "--num-batches", str(setting.num_batches)]
told = tombola("report", *ends, "--barrier", "--batchnorm", "interpolate", "--json", *how)
(interpolated,) = json.loads(told)
print(f"\n{Path(highest.run).name}, {highest.ticket.place}: barrier on test images")
print(f"  {highest.line.curves['test'].barrier:8.2%}  {highest.line.batchnorm}")
print(f"  {interpolated['barriers']['test']:8.2%}  {interpolated['batchnorm']}")

# %% [markdown]
# ## 6. Do two seeds find the same mask?
#
# The overlap of two masks is what both keep of what either keeps (IoU). By chance it is that of
# random masks that keep as many weights in each layer.


# %%
class Pair(NamedTuple):
    """Two tickets of one network, and how far their masks agree."""

    first: Measured
    second: Measured
    overlap: Overlap

    @property
    def kind(self) -> str:
        """What the two differ in."""
        if self.first.run == self.second.run:
            return "same seed, other rewinding"
        same = self.first.ticket.stage == self.second.ticket.stage
        return f"other seed, {self.first.ticket.stage if same else 'other rewinding'}"


pairs = [
    Pair(one, other, total(overlaps(one.ticket.masks, other.ticket.masks)))
    for one, other in itertools.combinations(measured, 2)
    if one.ticket.level == other.ticket.level > 0
]
kinds = sorted({(pair.kind, pair.first.ticket.level) for pair in pairs})
rows = []
for kind, level in kinds:
    alike = [pair for pair in pairs if (pair.kind, pair.first.ticket.level) == (kind, level)]
    iou = statistics.mean(pair.overlap.iou for pair in alike)
    chance = statistics.mean(pair.overlap.chance for pair in alike)
    density = alike[0].first.ticket.density
    rows.append((kind, f"{density:.2%}", f"{iou:.4f}", f"{chance:.4f}", f"{iou / chance:.2f}"))
if rows:
    show("Overlap of masks", "masks of  density  IoU  by chance  ratio", rows)

# %% [markdown]
# Two seeds have other initial weights, and no weight of one is the counterpart of the same place in
# the other: units can be permuted. So little more than chance is to be expected there, however good
# both tickets are. Rewinding points of one seed share their initial weights.

# %% [markdown]
# ## 7. The picture
#
# Left the barrier at each density, a dot a seed, the threshold dashed. Right the accuracy, the
# rewinding points side by side. At 100 % stands the dense network, the same for all of them.

# %%
figure, (left, right) = plt.subplots(ncols=2, figsize=(9.5, 3.8), layout="constrained")
styles = zip(("#1a5fb4", "#c64600"), (1.06, 0.94), strict=True)  # colours, and shifts to the side
for (stage, levels), (colour, shift) in zip(by_stage.items(), styles, strict=False):
    densities = [group[0].ticket.density for group in levels.values()]
    means = [statistics.mean(one.barrier for one in group) for group in levels.values()]
    left.plot(densities, [100 * mean for mean in means], color=colour, label=stage)
    for one in itertools.chain.from_iterable(levels.values()):
        density, face = one.ticket.density, colour if one.line.is_connected else "white"
        left.plot(density, 100 * one.barrier, "o", color=colour, markerfacecolor=face)
        right.plot(shift * density, one.ticket.accuracy, "o", color=colour, markerfacecolor=face)
        if one.random is not None:
            right.plot(shift * density, one.random.accuracy, "x", color=colour)
for label, marker, face in (("stable", "o", "0.5"), ("not stable", "o", "w"), ("random", "x", "w")):
    right.plot([], [], marker, color="0.5", markerfacecolor=face, label=label)
left.axhline(100 * STABLE, color="0.5", linestyle="--", linewidth=1)
left.set_yscale("symlog", linthresh=1)
left.set_ylim(0, 150 * max(STABLE, *(one.barrier for one in measured)))
left.yaxis.set_major_formatter(lambda barrier, _: f"{barrier:g}")
left.set_ylabel("barrier, % of images")
right.set_ylabel("test accuracy")
left.legend(frameon=False)
right.legend(frameon=False)
for axes in (left, right):
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(sorted({one.ticket.density for one in measured}))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda density, _: f"{100 * density:.3g} %")
    axes.set_xlabel("density: weights kept")
    axes.grid(alpha=0.25)
figure.savefig(folder / "stable_ticket.png", dpi=100)
print(f"\n{folder}/stable_ticket.png")

# %% [markdown]
# ## On your own run
#
# 1. Set `RUN` above, or give `--run runs/NAME/STAGE`, and `--levels` for others than the three.
# 2. Where a level is not stable, rewind later (`rewind = "500it"`, `"2ep"`): the paper's networks
#    on CIFAR-10 and ImageNet become stable only some way into the training.
# 3. Where it is stable and no better than random masks, the network is too wide for the task or the
#    density too high: prune further before you conclude anything about tickets.
# 4. Near the threshold take more pairs: run IMP with further seeds (`--seeds 0 1 2`).
# 5. Tickets of learning-rate rewinding and fine-tuning have no weights of step k: for these compare
#    what two seeds or orders came to, with `tombola report A B --barrier`.
