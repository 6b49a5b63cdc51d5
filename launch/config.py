"""Configuration files: a TOML file is a saved command line, and tyro the one parser of both.

A file holds the shared sections (`Settings`) and then `[[stages]]`, each with a `name`, a
`recipe`, that recipe's options, and any shared section that it wants different for itself.
On the command line the same keys read `--train.total 30ep` and `--stages.imp.rounds 4`; the last
one wins.
"""

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from data.errors import UserError, did_you_mean
from launch.given import Given, explain
from launch.parsing import ParseError, parse
from launch.recipes import RECIPES
from launch.sweep import SweepConfig, seed_name
from train.settings import Settings

C = TypeVar("C")
COMMAND_LINE = "command line"
OF_A_RUN = ("name", "seed")
"""the settings that tell runs apart, and that no stage has for itself"""
_TAKEN = ("tickets", "manifests", "tensorboard")  # folders of a run beside those of its stages


@dataclass(frozen=True)
class Stage:
    """A stage of a run: a recipe with its options, and the settings that it sees."""

    name: str
    recipe: str
    config: Any
    settings: Settings
    own: dict[str, Any]
    """the shared sections that this stage has different, as far as they were given"""


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    settings: Settings
    stages: tuple[Stage, ...]
    seeds: tuple[int, ...] = ()
    """with which all of it is run, once each; none: with the seed of the settings"""

    def named(self, name: str) -> "RunConfig":
        """The same under another name."""
        return self._changed(name=name)

    def with_seed(self, seed: int) -> "RunConfig":
        """The run of one seed among several."""
        return self._changed(name=seed_name(seed), seed=seed)

    def _changed(self, **facts: Any) -> "RunConfig":
        stages = tuple(
            dataclasses.replace(stage, settings=dataclasses.replace(stage.settings, **facts))
            for stage in self.stages
        )
        return RunConfig(dataclasses.replace(self.settings, **facts), stages)

    def document(self) -> dict[str, Any]:
        """The resolved configuration of one seed as a TOML document that is read again."""
        stages = [
            {"name": s.name, "recipe": s.recipe, **_plain(s.config), **s.own} for s in self.stages
        ]
        return {**_plain(self.settings), "stages": stages}


def read_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a file and a command line describe together.

    Raises `UserError`, one line that names the file and the key, for an unreadable file, an
    unknown key, a wrong type or an impossible value.
    """
    return parse_document(_read_toml(path), path, overrides)


def parse_document(document: dict[str, Any], path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The same for a TOML document that was read from `path`."""
    document = dict(document)
    tables = document.pop("stages", [])
    document.setdefault("name", Path(path).stem)
    if not isinstance(tables, list) or not tables:
        raise UserError(f"{path}: has no [[stages]]: each needs a name and a recipe")
    shared = _flatten(document, path)
    staged = {_stage_name(t, path, i): _flatten(t, path) for i, t in enumerate(tables)}
    if len(staged) < len(tables):
        raise UserError(f"{path}: two stages have the same name")
    for given in read_command_line(overrides):
        if given.key.startswith("stages."):
            stage, key = _split_stage_key(given, staged)
            staged[stage].append(dataclasses.replace(given, key=key))
        else:
            shared.append(given)
    _check_keys(shared, [*known_keys(Settings), *known_keys(SweepConfig)])
    seeds, shared = _read_seeds(shared)
    stages = tuple(_read_stage(name, given, shared, path) for name, given in staged.items())
    return RunConfig(_parse(Settings, shared), stages, seeds)


def flat(document: dict[str, Any]) -> dict[str, Any]:
    """A document as `{"train.total": ..., "stages.imp.rounds": ...}`, to compare two."""
    found: dict[str, Any] = {}

    def walk(table: dict[str, Any], prefix: str) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                found[f"{prefix}{key}"] = value

    walk({k: v for k, v in document.items() if k != "stages"}, "")
    for stage in document.get("stages", []):
        walk(stage, f"stages.{stage['name']}.")
    return found


# Reading ---------------------------------------------------------------------------------


def _read_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        folder = Path(path).parent
        near = did_you_mean(Path(path).name, [p.name for p in folder.glob("*.toml")])
        raise UserError(f"{path}: no such configuration file{near}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None


def _flatten(document: dict[str, Any], origin: str) -> list[Given]:
    return [
        Given(key, tuple(map(str, value)) if isinstance(value, list) else (str(value),), origin)
        for key, value in flat(document).items()
    ]


def read_command_line(words: Sequence[str]) -> list[Given]:
    """What the options after a configuration say. Raises `UserError` for a word without one."""
    found: list[Given] = []
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            given = Given(key.replace("-", "_"), (value,) if equals else (), COMMAND_LINE)
            found.append(given)
        elif found:
            word = {"true": "True", "false": "False"}.get(word, word)  # as TOML spells them
            found[-1] = dataclasses.replace(found[-1], words=(*found[-1].words, word))
        else:
            raise UserError(f"{word!r}: write options as --section.key value")
    return found


def _stage_name(table: dict[str, Any], path: str, index: int) -> str:
    name = table.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or name in _TAKEN:
        taken = ", ".join(map(repr, _TAKEN))
        raise UserError(
            f"{path}: stage {index + 1} needs a name of letters, digits, '-' and '_' "
            f"(other than {taken})"
        )
    return name


def _split_stage_key(given: Given, staged: dict[str, list[Given]]) -> tuple[str, str]:
    _, _, rest = given.key.partition(".")
    stage, _, key = rest.partition(".")
    for name in staged:
        if stage == name.replace("-", "_"):
            return name, key
    near = did_you_mean(stage, staged)
    raise UserError(f"{given.origin}: no stage named {stage!r}{near} (stages: {', '.join(staged)})")


def _read_seeds(shared: list[Given]) -> tuple[tuple[int, ...], list[Given]]:
    """The seeds of a run over several, and what else was given.

    Those of the command line take the place of a file's seed, as the last one does of any key.
    """
    own = [one for one in shared if one.key == "seeds"]
    rest = [one for one in shared if one.key != "seeds"]
    seeds = _parse(SweepConfig, own).seeds
    if own and own[-1].origin == COMMAND_LINE:
        if not seeds:
            raise UserError(f"{COMMAND_LINE}: seeds: name at least one: --seeds 0 1 2")
        rest = [one for one in rest if one.key != "seed" or one.origin == COMMAND_LINE]
    single = [one for one in rest if one.key == "seed"]
    if seeds and single:
        raise UserError(
            f"{single[-1].origin}: seed and seeds are both set: for one run of several set "
            "--seeds N, and leave seed out"
        )
    return seeds, rest


def _read_stage(name: str, given: list[Given], shared: list[Given], path: str) -> Stage:
    recipe = next((g.words[0] for g in given if g.key == "recipe" and g.origin == path), None)
    if recipe not in RECIPES:
        near = did_you_mean(str(recipe), RECIPES)
        raise UserError(
            f"{path}: stages.{name}.recipe = {recipe!r} is not known{near} "
            f"(recipes: {', '.join(RECIPES)})"
        )
    kind = RECIPES[recipe].config
    shared_keys = [key for key in known_keys(Settings) if key not in OF_A_RUN]
    own_keys = known_keys(kind)
    options = [g for g in given if g.origin == COMMAND_LINE or g.key not in ("name", "recipe")]
    _check_keys(options, [*own_keys, *shared_keys, "name", "recipe"], f"stages.{name}.")
    own = [g for g in options if g.key in shared_keys]
    own = [*_defaults(recipe, [*shared, *own]), *own]
    _refuse_renaming(options, name)
    config = _parse(kind, [g for g in options if g.key in own_keys], f"stages.{name}.")
    try:
        settings = _parse(Settings, [*shared, *own], "")
    except UserError as error:
        if not own:
            raise
        own_text = ", ".join(one.key for one in own)
        raise UserError(f"{error} (in stage {name!r}, which sets {own_text})") from None
    return Stage(name, recipe, config, settings, _picked(settings, [g.key for g in own]))


def _defaults(recipe: str, given: Iterable[Given]) -> list[Given]:
    """What a recipe wants of the sections of which nobody says anything."""
    chosen = {one.key.partition(".")[0] for one in given}
    return [
        Given(key, (value,), f"recipe {recipe}")
        for key, value in RECIPES[recipe].defaults.items()
        if key.partition(".")[0] not in chosen
    ]


def _refuse_renaming(options: Iterable[Given], stage: str) -> None:
    for one in options:
        if one.key in ("name", "recipe"):
            raise UserError(f"{one.origin}: stages.{stage}.{one.key} can only be set in the file")


# Checking --------------------------------------------------------------------------------


def known_keys(kind: type[Any], prefix: str = "") -> list[str]:
    """The keys of a configuration class, those of its sections dotted."""
    keys: list[str] = []
    for field in dataclasses.fields(kind):
        section = field.default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            keys += known_keys(section, f"{prefix}{field.name}.")
        else:
            keys.append(f"{prefix}{field.name}")
    return keys


def _check_keys(given: Iterable[Given], known: Sequence[str], prefix: str = "") -> None:
    for one in given:
        if one.key not in known:
            near = did_you_mean(one.key, known)
            raise UserError(f"{one.origin}: unknown key {prefix + one.key!r}{near}")


def _parse(kind: type[C], given: Sequence[Given], prefix: str = "") -> C:
    """A configuration class from what was given, the last of each key."""
    last = {one.key: one for one in given}
    words = [word for one in last.values() for word in (f"--{one.key}", *one.words)]
    try:
        parsed: C = parse(kind, words, config=(tyro.conf.FlagConversionOff,))
    except ParseError as error:
        raise UserError(explain(str(error), last, prefix)) from None
    return parsed


# Writing ---------------------------------------------------------------------------------


def _picked(settings: Settings, keys: Iterable[str]) -> dict[str, Any]:
    """The sections of `settings`, as far as `keys` name them."""
    document: dict[str, Any] = {}
    for key in keys:
        section, _, leaf = key.partition(".")
        value = _plain(getattr(settings, section)).get(leaf, "None")  # in place of the run's
        document.setdefault(section, {})[leaf] = value
    return document


def _plain(config: Any) -> dict[str, Any]:
    """A configuration as a TOML table, which has neither null nor tuples.

    What is `None` by default is left out; what was set to `None` is written as the word.
    """
    table: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            table[field.name] = _plain(value)
        elif isinstance(value, tuple):
            table[field.name] = list(value)
        elif value is not None:
            table[field.name] = value
        elif field.default is not None:
            table[field.name] = "None"
    return table
