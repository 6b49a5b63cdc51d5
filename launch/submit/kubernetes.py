"""Kubernetes: a JobSet for each job, which starts all nodes anew when one of them is lost."""

import re
from pathlib import Path

from launch.submit.jobs import Job, Work
from launch.submit.options import Submit
from launch.submit.rendering import render

_CONFIG = "/config"


def kubernetes_files(
    options: Submit, work: Work, folder: Path
) -> tuple[dict[Path, str], list[list[str]]]:
    """A file of manifests for each wave, and the commands: apply, wait, apply the next."""
    files: dict[Path, str] = {}
    commands: list[list[str]] = []
    ours = ["--namespace", options.namespace]
    for wave, jobs in enumerate(work.waves):
        several = len(work.waves) > 1
        path = folder / (f"{folder.name}-{wave + 1}.yaml" if several else f"{folder.name}.yaml")
        files[path] = _manifests(options, work, jobs, path)
        if wave:
            before = [f"jobset/{job.name}" for job in work.waves[wave - 1]]
            condition = "--for=condition=Completed"
            commands.append(["kubectl", "wait", *ours, condition, "--timeout=-1s", *before])
        commands.append(["kubectl", "apply", "-f", str(path)])
    return files, commands


def _manifests(options: Submit, work: Work, jobs: list[Job], path: Path) -> str:
    file = Path(work.config).name
    return render(
        "kubernetes.yaml.j2",
        options=options,
        path=str(path),
        file=file,
        key=re.sub(r"[^A-Za-z0-9._-]", "-", file),
        config_map=f"{jobs[0].name}-config",
        folder=_CONFIG,
        text=work.text,
        jobs=[{"name": job.name, "command": _command(options, work, job)} for job in jobs],
    )


def _command(options: Submit, work: Work, job: Job) -> list[str]:
    """What the container of each node runs; the first pod of the JobSet is where they meet."""
    return [
        *("tombola", "launch", "--nnodes", str(options.nodes)),
        *("--nproc-per-node", str(options.num_processes)),
        *("--rdzv-endpoint", f"{job.name}-node-0-0.{job.name}:29400"),
        *("run", f"{_CONFIG}/{Path(work.config).name}", *options.run_words),
        *work.overrides,
        *job.words,
    ]
