"""SkyPilot: a managed job for each job of the run, on the machines of any cloud."""

from pathlib import Path

from launch.submit.jobs import Job, Work
from launch.submit.options import Submit
from launch.submit.rendering import render, words

_CONFIG = "/tmp/tombola"


def skypilot_files(
    options: Submit, work: Work, folder: Path
) -> tuple[dict[Path, str], list[list[str]]]:
    """A task for each job, and the commands that launch them; later waves are to be waited for."""
    files: dict[Path, str] = {}
    commands: list[list[str]] = []
    for wave, jobs in enumerate(work.waves):
        if wave:
            names = ", ".join(job.name for job in work.waves[wave - 1])
            commands.append([f"# once these have succeeded (sky jobs queue): {names}"])
        for job in jobs:
            path = folder / f"{job.name}.yaml"
            files[path] = _task(options, work, job, path)
            launch = ["sky", "jobs", "launch", "--yes", "--async", "--name", job.name, str(path)]
            commands.append(launch)
    return files, commands


def _task(options: Submit, work: Work, job: Job, path: Path) -> str:
    config = f"{_CONFIG}/{Path(work.config).name}"
    run = ["run", config, *options.run_words, *work.overrides, *job.words]
    return render(
        "skypilot.yaml.j2",
        options=options,
        path=str(path),
        name=job.name,
        config=config,
        source=work.config,
        run=words(run),
        accelerators=f"{options.accelerator}:{options.gpus_per_node}",
    )
