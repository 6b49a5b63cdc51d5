"""Configuration files and their mistakes: one line that names the file, the key and the remedy."""

import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest
import tomli_w
from tiny import TOML, write_config

from data.errors import UserError
from data.files import Folder
from launch.config import flat, read_config
from launch.parts import check_stages
from launch.recipes import RECIPES
from pruning.elastic import format_map
from pruning.imp import ImpConfig
from pruning.scores import SCORES
from train.basis import Basis
from train.models import ModelSpec

CONFIGS = sorted((Path(__file__).parent.parent / "launch/configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    """... is named like its file, and begins with its command."""
    config = read_config(str(path))
    assert config.settings.name == path.stem
    assert f"launch/configs/{path.name}" in path.read_text().split("\nname = ")[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_passes_the_checks_before_a_run(
    path: Path, tmp_path: Path
) -> None:
    """Its stages name stages before them, and their networks are of one family."""
    check_stages(read_config(str(path)), Folder(tmp_path))


def test_the_elastic_configurations_have_the_papers_maps() -> None:
    """ResNet-32 to 44 and ResNet-18 to 34 by `append`, ResNet-18 to the paper's ResNet-26."""
    expected = {
        "cifar10-resnet32-to-44": {"to-44": "0:0;1:1,3;2:2,4;3:5;4:6", "to-20": "0:0;1:1;3:2"},
        "imagenet-resnet18-to-34": {
            "to-26": "0:0;1:1|0:0;1:1,2|0:0;1:1,2,3|0:0;1:1,2",
            "to-34": "0:0;1:1,2|0:0;1:1,2,3|0:0;1:1,2,3,4,5|0:0;1:1,2",
        },
    }
    for name, maps in expected.items():
        source, *others = read_config(str(CONFIGS[0].parent / f"{name}.toml")).stages
        for stage in others:
            outlines = [
                ModelSpec.of(one.settings.model, num_classes=10, in_chans=3).outline()
                for one in (source, stage)
            ]
            assert format_map(stage.config.change(*outlines).maps) == maps[stage.name]


def test_the_comparison_has_every_method_and_every_control() -> None:
    """... at two densities; but lines between networks are no tickets."""
    config = read_config(str(CONFIGS[0].parent / "digits-compare.toml"))
    assert config.seeds == (0, 1, 2)
    stages: dict[str, list[Any]] = {}
    for stage in config.stages:
        stages.setdefault(stage.recipe, []).append(stage.config)
    assert stages.keys() == RECIPES.keys() - {"connectivity"}
    for recipe, found in stages.items():
        kind = get_type_hints(RECIPES[recipe].config).get("controls", tuple[Literal[()], ...])
        known = set(get_args(get_args(kind)[0]))
        assert {control for one in found for control in getattr(one, "controls", ())} == known
    assert {one.score for one in stages["initial"]} == {*SCORES, "synflow", "random"}
    assert {one.method for one in stages["dynamic"]} == {"set", "rigl", "gmp"}
    bases = {stage.settings.model.basis or "identity" for stage in config.stages}
    assert bases == set(get_args(Basis))


def test_the_imagenet_configuration_is_the_papers_recipe() -> None:
    """Batch 1024, lr 0.4, wd 1e-4, 5 epochs of warm-up, a tenth at 30, 60 and 80 of 90 epochs."""
    config = read_config(str(CONFIGS[-1].parent / "imagenet-resnet50-imp.toml"))
    settings, stage = config.settings, config.stages[0]
    assert (settings.data.batch_size, settings.optimizer.lr) == (1024, 0.4)
    assert (settings.optimizer.name, settings.optimizer.weight_decay) == ("momentum", 1e-4)
    assert settings.schedule.milestones == ("30ep", "60ep", "80ep")
    assert settings.schedule.warmup == "5ep"
    assert (stage.config.prune_fraction, stage.config.rewind) == (0.2, "5ep")
    assert (1 - stage.config.prune_fraction) ** stage.config.num_rounds == pytest.approx(0.262144)


def test_the_rigl_configuration_is_the_papers_recipe() -> None:
    """Batch 4096, 32,000 steps, lr 1.6 with Nesterov; ERK, dT 100, alpha 0.3, T_end 25,000."""
    config = read_config(str(CONFIGS[-1].parent / "imagenet-resnet50-rigl.toml"))
    settings, stage = config.settings, config.stages[0].config
    assert (settings.data.batch_size, settings.train.total) == (4096, "32000it")
    assert (settings.optimizer.name, settings.optimizer.lr) == ("sgd", 1.6)
    assert settings.schedule.milestones == ("30ep", "70ep", "90ep")
    assert (stage.method, stage.levels, stage.layer_densities) == ("rigl", (0.2,), "erk")
    assert (stage.interval, stage.moved, stage.end) == ("100it", 0.3, "25000it")


def test_the_last_word_wins(tmp_path: Path) -> None:
    """File, then command line, in any of its spellings."""
    words = ["--train.total", "4ep", "--train.total=7ep", "--optimizer.weight-decay", "0"]
    words += ["--stages.imp.controls", "reinit", "random", "--data.augment", "false"]
    words += ["--stages.imp.density", "0.1", "--model.width", "None", "--name", "other"]
    config = read_config(write_config(tmp_path), words)
    assert config.settings.train.total == "7ep"
    assert config.settings.optimizer.weight_decay == 0.0
    assert config.settings.data.augment is False
    assert config.settings.model.width is None
    assert config.settings.name == "other"
    assert config.stages[0].config.controls == ("reinit", "random")
    assert config.stages[0].config.density == 0.1


def test_a_stage_may_have_its_own_settings(tmp_path: Path) -> None:
    """A shared section in a stage's table is that stage's alone."""
    text = TOML + '\n[[stages]]\nname = "longer"\nrecipe = "imp"\ntrain.total = "9ep"\n'
    config = read_config(write_config(tmp_path, text), ["--stages.longer.optimizer.lr", "0.5"])
    first, second = config.stages
    assert (first.settings.train.total, second.settings.train.total) == ("3ep", "9ep")
    assert (first.settings.optimizer.lr, second.settings.optimizer.lr) == (0.1, 0.5)
    assert second.settings.train.evaluate == "13it"
    assert config.settings.train.total == "3ep"


def test_the_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    """config.toml of a run folder is a configuration like any other."""
    text = TOML + '\n[[stages]]\nname = "longer"\nrecipe = "imp"\ntrain.total = "9ep"\n'
    config = read_config(write_config(tmp_path, text), ["--seed", "8"])
    written = tmp_path / "config.toml"
    written.write_text(tomli_w.dumps(config.document()))
    assert read_config(str(written)) == config
    assert flat(tomllib.loads(written.read_text()))["stages.longer.train.total"] == "9ep"


def test_a_stage_may_take_back_what_the_run_has(tmp_path: Path) -> None:
    """As the word, in config.toml too."""
    text = TOML + '\n[[stages]]\nname = "wide"\nrecipe = "imp"\nmodel.width = "None"\n'
    config = read_config(write_config(tmp_path, text))
    assert [stage.settings.model.width for stage in config.stages] == [4, None]
    written = tmp_path / "config.toml"
    written.write_text(tomli_w.dumps(config.document()))
    assert read_config(str(written)) == config


def test_a_file_without_a_name_is_named_by_its_file(tmp_path: Path) -> None:
    path = write_config(tmp_path, TOML.replace('name = "tiny"', "", 1))
    assert read_config(path).settings.name == "tiny"


MISTAKES: list[tuple[list[str], str]] = [
    (
        ["--train.totl", "4ep"],
        "command line: unknown key 'train.totl'; did you mean 'train.total'?",
    ),
    (["--stages.imp.round", "4"], "unknown key 'stages.imp.round'; did you mean 'rounds'?"),
    (["--stages.im.rounds", "4"], "no stage named 'im'; did you mean 'imp'? (stages: imp)"),
    (["--batch_size", "4"], "unknown key 'batch_size'; did you mean 'data.batch_size'?"),
    (
        ["--data.batch_size", "many"],
        "command line: data.batch_size = 'many': must be a whole number",
    ),
    (["--data.batch_size"], "data.batch_size"),
    (["--data.batch_size", "0"], "command line: data.batch_size = '0': must be at least 1"),
    (["--data.source", "cifar11"], "is not known; did you mean 'cifar10'? (known: digits, cifar10"),
    (["--train.total", "ten"], "command line: train.total = 'ten': is not a duration"),
    (["--train.total", "5%"], "train.total = '5%': must be in epochs (90ep) or steps (2000it)"),
    (["--train.precision", "fp8"], "train.precision = 'fp8': is not known; did you mean 'fp32'?"),
    (["--optimizer.lr", "-1"], "optimizer.lr = '-1': must be above 0"),
    (["--optimizer.name", "sdg"], "is no timm optimizer; did you mean"),
    (["--schedule.name", "cosin"], "schedule.name = 'cosin': is not known; did you mean 'cosine'?"),
    (
        ["--model.name", "resnt50"],
        "is no timm model and no CIFAR network; did you mean 'resnet50'?",
    ),
    (["--model.name", "vgg11", "--model.width", "8"], "width is no option of vgg11"),
    (["--stages.imp.density", "1.5"], "stages.imp.density = '1.5': must be above 0 and at most 1"),
    (["--stages.imp.density", "0"], "stages.imp.density = '0': must be above 0 and at most 1"),
    (["--stages.imp.prune_fraction", "1"], "prune_fraction = '1': must be between 0 and 1"),
    (
        ["--stages.imp.mode", "rewind"],
        "stages.imp.mode = 'rewind': is not known (weights, lr, finetune)",
    ),
    (["--stages.imp.rewind", "5"], "stages.imp.rewind = '5': is not a duration"),
    (["--stages.imp.controls", "shuffle"], "stages.imp.controls = 'shuffle': is not known (random"),
    (["--stages.imp.control_levels", "3"], "levels go from 1 to 2"),
    (["--stages.imp.name", "x"], "stages.imp.name can only be set in the file"),
    (["--name", "a/b"], "name = 'a/b': must be a plain folder name"),
    (["--seed", "-1"], "seed = '-1': must not be negative"),
    (["total", "4ep"], "'total': write options as --section.key value"),
    (["--checkpoint.every", "x"], "checkpoint.every = 'x': is not a duration"),
    (["--log.trackers", "mlfow"], "log.trackers = 'mlfow': is not known; did you mean 'mlflow'?"),
    (["--train.ema", "2"], "train.ema = '2': must be between 0 and 1"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_on_the_command_line_is_one_line(
    words: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        read_config(write_config(tmp_path), words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 3", "sed = 3", "unknown key 'sed'; did you mean 'seed'?"),
        ('total = "3ep"', "total = 3", "train.total = '3': is not a duration"),
        (
            "batch_size = 96",
            'batch_size = "big"',
            "data.batch_size = 'big': must be a whole number",
        ),
        ("prune_fraction = 0.4", "prune_fracton = 0.4", "did you mean 'prune_fraction'?"),
        ('recipe = "imp"', 'recipe = "ipm"', "recipe = 'ipm' is not known; did you mean 'imp'?"),
        ('recipe = "imp"', "", "recipe = None is not known"),
        ('\nname = "imp"', "", "stage 1 needs a name"),
        ('\nname = "imp"', '\nname = "a b"', "stage 1 needs a name"),
        ("[[stages]]", "[[stage]]", "has no [[stages]]"),
        ("seed = 3", "seed = ", "not a TOML file"),
        ("rounds = 2", "rounds = 2.5", "stages.imp.rounds = '2.5': must be a whole number"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = write_config(tmp_path, TOML.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_near_one(tmp_path: Path) -> None:
    write_config(tmp_path)
    with pytest.raises(UserError, match=r"tinny.toml: no such .* file; did you mean 'tiny.toml'"):
        read_config(str(tmp_path / "tinny.toml"))


def test_every_option_of_imp_has_a_valid_default() -> None:
    config: Any = ImpConfig()
    assert config.num_rounds == 12
