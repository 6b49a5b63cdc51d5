"""The container image, built from the Dockerfile without a Docker engine, and run."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import Containers, needs_containers
from waiting import PATIENCE

from pruning.tickets import Ticket

REPOSITORY = Path(__file__).parent.parent
DEMO = ("run", "launch/configs/digits-imp.toml", "--root", "/runs", "--stages.imp.rounds", "2")


def test_the_dockerfile_has_nothing_that_a_linter_minds() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("not installed: hadolint")
    subprocess.run(["hadolint", str(REPOSITORY / "Dockerfile")], check=True)


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """The image, from what is in the repository now."""
    made = Containers(tmp_path_factory.mktemp("containers"), REPOSITORY)
    try:
        made.build()
        yield made
    finally:
        made.remove()


@pytest.mark.cluster
@needs_containers
@pytest.mark.timeout(1800)
def test_the_image_runs_the_demo(containers: Containers) -> None:
    """As another user than root; its tickets are whole; a mistake is one line."""
    done = containers.run(*DEMO, "--train.total", "5ep")
    assert not done.returncode, done.stdout + done.stderr
    ticket = Ticket.load(containers.folder / "runs" / "digits-imp" / "imp" / "level-02")
    assert ticket.density == pytest.approx(0.49, abs=0.01)
    assert ticket.metrics["test"]["accuracy"] > 0.9
    assert ticket.masks.density == ticket.density
    wrong = containers.run(*DEMO, "--train.totl", "5ep")
    assert wrong.returncode == 2
    assert "did you mean 'train.total'?" in wrong.stderr
    assert wrong.stderr.count("\n") == 1


@pytest.mark.cluster
@needs_containers
@pytest.mark.timeout(1800)
def test_a_stopped_container_saves_and_another_goes_on(containers: Containers) -> None:
    """SIGTERM reaches the run: 75, and the same command goes on."""
    words = [*DEMO, "--name", "stopped", "--train.total", "20ep", "--checkpoint.every", "20it"]
    running = containers.start(*words)
    saved = containers.folder / "runs" / "stopped" / "imp" / "level-00" / "checkpoints"
    while not list(saved.glob("step-*/manifest.json")):
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.1)
    running.terminate()
    told, _ = running.communicate(timeout=PATIENCE)
    assert running.returncode == 75, told
    step = re.findall(r"interrupted: saved at step (\d+)", told)[0]
    again = containers.run(*words)
    assert not again.returncode, again.stderr
    assert f"goes on at step {step} of" in again.stdout


@pytest.mark.cluster
@needs_containers
@pytest.mark.timeout(1800)
def test_the_image_is_what_clusters_want(containers: Containers) -> None:
    """A user that is not root, or any of group 0; labels, a health check, configurations."""
    writable = "os.access('/runs', os.W_OK), os.access(os.environ['HOME'], os.W_OK)"
    facts = f"import os; print(os.getuid(), {writable})"
    assert containers.python(facts) == "1000 True True"
    assert containers.python(facts, user="4321:0") == "4321 True True"
    image = containers.inspect()
    assert image["User"] == "1000"
    assert image["Labels"]["org.opencontainers.image.title"] == "tombola"
    assert image["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert "import launch.run" in " ".join(image["Healthcheck"]["Test"])
    assert containers.python("import launch.run, nvidia.dali, s3fs, gcsfs, tensorboard") == ""
    assert containers.run("--help").stdout.startswith("usage: tombola")
