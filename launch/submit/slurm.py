"""SLURM: a batch script for each wave of jobs, an array where a wave has several."""

from collections.abc import Sequence
from pathlib import Path

from launch.submit.jobs import Job, Work, label
from launch.submit.options import Submit
from launch.submit.rendering import render


def slurm_files(
    options: Submit, work: Work, folder: Path
) -> tuple[dict[Path, str], list[list[str]]]:
    """The scripts by their paths, and the commands that submit them, one wave after the other."""
    files: dict[Path, str] = {}
    commands: list[list[str]] = []
    for wave, jobs in enumerate(work.waves):
        several = len(work.waves) > 1
        path = folder / (f"{folder.name}-{wave + 1}.sbatch" if several else f"{folder.name}.sbatch")
        files[path] = _script(options, work, jobs, path)
        after = ["--dependency=afterok:{}"] if wave else []
        commands.append(["sbatch", "--parsable", *after, str(path)])
    return files, commands


def _script(options: Submit, work: Work, jobs: Sequence[Job], path: Path) -> str:
    whole_run = len(jobs) == 1
    before = ["run", work.config, *options.run_words, *work.overrides]
    tasks = [{"name": job.name, "words": [*before, *job.words]} for job in jobs]
    pattern = "%x-%j.log" if whole_run else "%x-%A_%a.log"
    return render(
        "slurm.sbatch.j2",
        options=options,
        path=str(path),
        name=jobs[0].name if whole_run else label(path.stem),
        log=str(path.parent / pattern),
        tasks=tasks,
    )
