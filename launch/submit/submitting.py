"""From a configuration to files on the disk, and to the scheduler."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data.errors import RunError, UserError
from data.files import Folder, read_content
from launch.config import RunConfig, read_config
from launch.parts import controls_of, needs
from launch.submit.jobs import Work, waves
from launch.submit.kubernetes import kubernetes_files
from launch.submit.options import Submit
from launch.submit.skypilot import skypilot_files
from launch.submit.slurm import slurm_files

_RENDERERS = {"slurm": slurm_files, "kubernetes": kubernetes_files, "skypilot": skypilot_files}


def submit(options: Submit, overrides: Sequence[str]) -> None:
    """Writes the files, and hands them over unless it is a dry run.

    Raises `UserError` for a configuration that is known to fail, or options that do not go with
    it; `RunError` where the scheduler refuses.
    """
    config = read_config(options.config, overrides)
    # A root that only the nodes reach is taken for an empty one: then nothing is finished yet.
    root = "/nowhere" if "://" in options.root else options.root
    needed = needs(config, Folder(root) / config.settings.name)
    folder = Path(options.output) / config.settings.name
    copy = folder / Path(options.config).name
    text = read_content(options.config).decode()
    work = Work(str(copy), text, tuple(overrides), waves(config, needed, options.split))
    files, commands = _RENDERERS[options.to](options, work, folder)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    folder.mkdir(parents=True, exist_ok=True)
    copy.write_text(text)
    for path, content in files.items():
        path.write_text(content)
        path.chmod(0o755 if path.suffix == ".sbatch" else 0o644)
        console.print(str(path))
    for hint in _hints(config, options):
        console.print(hint)
    _hand_over(commands, options, console)


def _hints(config: RunConfig, options: Submit) -> list[str]:
    """What could be jobs of their own, and is not."""
    if options.split:
        return []
    found = []
    if len(config.seeds) > 1:
        found.append(f"{len(config.seeds)} seeds one after the other: --split seeds")
    if len(config.stages) > 1:
        found.append(f"{len(config.stages)} stages one after the other: --split stages")
    num_controls = sum(len(controls_of(stage)) for stage in config.stages)
    if num_controls:
        plural = "" if num_controls == 1 else "s"
        found.append(f"{num_controls} control{plural} beside the tickets: --split controls")
    return ["one job does all: " + "; ".join(found)] if found else []


def _hand_over(commands: Sequence[Sequence[str]], options: Submit, console: Console) -> None:
    """Runs what can be run now, and prints what is to be typed.

    A word with `{}` has the id in its place that the command before it printed.
    """
    tool = commands[0][0]
    missing = shutil.which(tool) is None
    now = [] if options.dry_run or missing else _at_once(commands)
    told = ""
    for command in now:
        words = [word.replace("{}", told) for word in command]
        console.print(f"$ {shlex.join(words)}")
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            problem = " ".join((done.stderr or done.stdout).split())
            raise RunError(f"{shlex.join(words)}: {problem}")
        told = done.stdout.strip().partition(";")[0]
        console.print(done.stdout.strip())
    left = commands[len(now) :]
    for command, after in zip(left, [*left, []][1:], strict=True):
        typed = command[0] if command[0].startswith("#") else shlex.join(command)
        typed = typed.replace("'--dependency=afterok:{}'", "--dependency=afterok:$job")
        takes_id = any("{}" in word for word in after)
        console.print(f"job=$({typed})" if takes_id else typed)
    if missing and not options.dry_run:
        raise UserError(f"{tool} is not here: run the commands above where it is")


def _at_once(commands: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
    """The commands before the first that a person, or another command, has to wait for."""
    waits = [index for index, words in enumerate(commands) if words[0][0] == "#" or "wait" in words]
    return commands[: waits[0]] if waits else commands
