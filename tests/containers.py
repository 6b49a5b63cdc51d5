"""An image built from the Dockerfile and run without a Docker engine, in a storage of its own."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_TOOLS = ("buildah", "podman", "runc", "debootstrap")
_BASE, _IMAGE = "localhost/base:bookworm", "localhost/tombola:test"
_CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"


def why_no_containers() -> str | None:
    """Why this machine cannot build and run one; `None` where it can."""
    if os.geteuid() != 0:
        return "building an image without an engine needs root"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


needs_containers = pytest.mark.skipif(
    why_no_containers() is not None, reason=str(why_no_containers())
)


class Containers:
    """Builds the image, and runs commands in it."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder, self.repository = folder, repository
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\n'
            f'runroot = "{folder}/run"\n'
        )
        self.environment = os.environ | {"CONTAINERS_STORAGE_CONF": str(folder / "storage.conf")}

    def build(self) -> None:
        """Makes a base of this machine's certificates, and the image upon it."""
        base = self.folder / "base"
        packages = "--include=ca-certificates"
        self._run("debootstrap", "--variant=minbase", packages, "bookworm", str(base))
        shutil.copy(f"/{_CERTIFICATES}", base / _CERTIFICATES)
        archive = self.folder / "base.tar"
        self._run("tar", "-C", str(base), "-cf", str(archive), ".")
        trusted = f"ENV PIP_CERT=/{_CERTIFICATES}"
        self._run("podman", "import", "--change", trusted, str(archive), _BASE)
        self._run(
            *("buildah", "bud", "--isolation", "chroot", "--network", "host", "--pull-never"),
            *("--format", "docker", "--build-arg", f"BASE={_BASE}", "-t", _IMAGE),
            str(self.repository),
        )

    def command(self, *words: str, user: str | None = None) -> list[str]:
        """How a command is run in the image, with `runs` of the folder mounted at /runs."""
        runs = self.folder / "runs"
        runs.mkdir(mode=0o777, exist_ok=True)
        runs.chmod(0o777)
        return [
            *("podman", "--runtime", "runc", "run", "--rm", "--network", "host"),
            *("--no-healthcheck", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"),
            *(() if user is None else ("--user", user)),
            *("--volume", f"{runs}:/runs", "--env", "OMP_NUM_THREADS=1"),
            *words,
        ]

    def run(self, *words: str, user: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs `tombola WORDS...` in the image, as its user or another."""
        command = self.command(_IMAGE, *words, user=user)
        return subprocess.run(command, env=self.environment, capture_output=True, text=True)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """The same, without waiting for its end."""
        command = self.command(_IMAGE, *words)
        return subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def python(self, code: str, *, user: str | None = None) -> str:
        """What a line of Python prints in the image."""
        command = self.command("--entrypoint", "python", _IMAGE, "-c", code, user=user)
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return done.stdout.strip()

    def inspect(self) -> dict[str, Any]:
        """What the image tells of itself."""
        words = ["podman", "image", "inspect", _IMAGE]
        done = subprocess.run(words, env=self.environment, capture_output=True, check=True)
        (image,) = json.loads(done.stdout)
        return image

    def remove(self) -> None:
        """Removes the images."""
        subprocess.run(["podman", "rmi", "--all", "--force"], env=self.environment, check=False)

    def _run(self, *words: str) -> None:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        assert not done.returncode, f"{words[:2]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
