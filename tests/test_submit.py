"""What `tombola submit` writes: read by people, by shells, and by the real schemas.

The golden files are written anew with `TOMBOLA_GOLDEN=1 pytest tests/test_submit.py`.
"""

import copy
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from test_parts import GROWS, TREE
from tiny import write_config
from waiting import PATIENCE

from data.files import Folder
from launch.cli import run_command
from launch.config import read_config
from launch.parts import needs
from launch.submit.jobs import Job, label, waves
from launch.submit.options import Split

GOLDEN = Path(__file__).parent / "golden" / "submit"
IMAGENET = "launch/configs/imagenet-resnet50-imp.toml"
ELASTIC = "launch/configs/digits-elastic.toml"
KUBERNETES = ("--to", "kubernetes", "--image", "registry.example/tombola:0.1")
CASES = {
    "slurm": (IMAGENET, "--to", "slurm", "--nodes", "4", "--root", "/scratch/runs"),
    "slurm-array": (
        *(ELASTIC, "--to", "slurm", "--gpus-per-node", "1", "--cpus-per-node", "8"),
        *("--partition", "gpu", "--account", "lab", "--qos", "long", "--time", "2-00:00:00"),
        *("--grace", "600", "--setup", "source venv/bin/activate"),
        *("--split", "stages", "controls", "--store", "s3://lab/tickets", "--seed", "4"),
    ),
    "kubernetes": (
        *(IMAGENET, *KUBERNETES, "--nodes", "4", "--root", "/runs", "--runs-claim", "runs"),
        *("--data-claim", "imagenet", "--namespace", "vision"),
    ),
    "kubernetes-cpu": (ELASTIC, *KUBERNETES, "--gpus-per-node", "0", "--split", "stages"),
    "skypilot": (
        *(IMAGENET, "--to", "skypilot", "--nodes", "4", "--root", "s3://lab/runs"),
        *("--image", "registry.example/tombola:0.1", "--cloud", "aws/us-east-1"),
    ),
    "skypilot-setup": (
        *(ELASTIC, "--to", "skypilot", "--gpus-per-node", "0", "--no-spot"),
        *("--setup", "pip install tombola", "--store", "s3://lab/tickets"),
    ),
}


def rendered(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """What a case writes, by the names of the files, and what it prints."""
    for name in ("sbatch", "kubectl", "sky"):
        assert name not in CASES[case]
    repository = Path(__file__).parent.parent
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "configs").symlink_to(repository / "launch" / "configs")
    monkeypatch.chdir(tmp_path)
    config, *words = CASES[case]
    assert run_command(["submit", config, *words, "--dry-run"]) == 0
    return {str(path): path.read_text() for path in sorted(Path("jobs").glob("*/*"))}


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_as_they_were_read(
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Word for word; and what is printed names them, and what to type."""
    files = rendered(case, monkeypatch, tmp_path)
    told = capsys.readouterr().out
    text = "".join(
        f"===== {name}\n{content}" for name, content in files.items() if not name.endswith(".toml")
    )
    golden = GOLDEN / f"{case}.txt"
    if os.environ.get("TOMBOLA_GOLDEN"):
        golden.write_text(f"{text}===== printed\n{told}")
    assert golden.read_text() == f"{text}===== printed\n{told}"


def test_the_example_is_what_its_command_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(__file__).parent.parent / "launch" / "submit" / "examples"
    written = rendered("slurm", monkeypatch, tmp_path)
    script = written["jobs/imagenet-resnet50-imp/imagenet-resnet50-imp.sbatch"]
    assert (folder / "imagenet-resnet50-imp.sbatch").read_text() == script
    assert f"tombola submit {shlex.join(CASES['slurm'])}" in (folder / "README.md").read_text()


@pytest.mark.parametrize("case", [case for case in CASES if "slurm" in case])
def test_the_scripts_have_nothing_that_a_linter_minds(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripts = [name for name in rendered(case, monkeypatch, tmp_path) if name.endswith(".sbatch")]
    assert scripts
    subprocess.run(["shellcheck", "--shell=bash", "--exclude=SC1091", *scripts], check=True)


# The real schemas ------------------------------------------------------------------------


def schema_of(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(
        (Path(__file__).parent / "schemas" / f"{name}.json").read_text()
    )
    return schema


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raises where Kubernetes or JobSet would refuse a manifest."""
    if manifest["kind"] != "JobSet":
        kubernetes_validate.validate(manifest, "1.34", strict=True)
        return
    jsonschema.validate(manifest, schema_of("jobset"))
    for replicated in manifest["spec"]["replicatedJobs"]:
        last = replicated["template"]["spec"]["completions"] - 1
        pod = f"{manifest['metadata']['name']}-{replicated['name']}-0-{last}-abcde"
        # As JobSet's own webhook asks: what follows from the names is not in its schema.
        jsonschema.validate(pod, {"pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63})
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": replicated["name"]},
            **replicated["template"],
        }
        kubernetes_validate.validate(job, "1.34", strict=True)


def manifests(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    files = rendered(case, monkeypatch, tmp_path)
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text)]


@pytest.mark.parametrize("case", [case for case in CASES if "kubernetes" in case])
def test_kubernetes_and_jobset_take_the_manifests(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the configuration in them is the file, to the letter."""
    found = manifests(case, monkeypatch, tmp_path)
    assert {one["kind"] for one in found} == {"ConfigMap", "JobSet"}
    for one in found:
        check_manifest(one)
    config = Path(CASES[case][0])
    assert found[0]["data"] == {config.name: config.read_text()}


def _pod(jobset: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"][
        "spec"
    ]
    return pod


@pytest.mark.parametrize(
    "harm",
    [
        lambda one: one["spec"].update(failurPolicy={}),
        lambda one: one["spec"]["failurePolicy"].update(maxRestarts="many"),
        lambda one: one["spec"]["failurePolicy"]["rules"][0].update(action="GiveUp"),
        lambda one: one["metadata"].update(name="2nd-run"),
        lambda one: one["metadata"].update(name="a" * 50),
        lambda one: _pod(one).update(restartPolice="Never"),
        lambda one: _pod(one)["containers"][0].update(command="tombola launch"),
        lambda one: _pod(one)["containers"][0]["volumeMounts"][0].pop("mountPath"),
    ],
)
def test_the_schemas_see_what_is_wrong(
    harm: Callable[[dict[str, Any]], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobset = manifests("kubernetes", monkeypatch, tmp_path)[1]
    harmed = copy.deepcopy(jobset)
    harm(harmed)
    assert harmed != jobset
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_manifest(harmed)


def check_task(task: dict[str, Any]) -> None:
    """Raises where SkyPilot would refuse a task."""
    schema = schema_of("skypilot")
    jsonschema.validate(task, schema["task"])
    jsonschema.validate(task["resources"], schema["resources"])


def tasks(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    files = rendered(case, monkeypatch, tmp_path)
    found = [yaml.safe_load(text) for name, text in files.items() if name.endswith(".yaml")]
    assert found
    return found


@pytest.mark.parametrize("case", [case for case in CASES if "skypilot" in case])
def test_the_tasks_are_as_skypilots_schema_has_them(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for task in tasks(case, monkeypatch, tmp_path):
        check_task(task)


@pytest.mark.parametrize(
    "harm",
    [
        lambda one: one.update(num_node=2),
        lambda one: one.update(num_nodes="four"),
        lambda one: one.update(run=["tombola"]),
        lambda one: one["resources"].update(use_spots=True),
        lambda one: one["resources"].update(use_spot="yes"),
        lambda one: one["resources"]["job_recovery"].update(recover_on_exit_codes=[750]),
    ],
)
def test_skypilots_schema_sees_what_is_wrong(
    harm: Callable[[dict[str, Any]], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (task,) = tasks("skypilot", monkeypatch, tmp_path)
    harm(task)
    with pytest.raises(jsonschema.ValidationError):
        check_task(task)


@pytest.mark.skipif(
    importlib.util.find_spec("sky") is None, reason="not installed: skypilot (pip install skypilot)"
)
@pytest.mark.parametrize("case", [case for case in CASES if "skypilot" in case])
def test_skypilot_takes_the_tasks(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And refuses them with one key wrong."""
    import sky

    for task in tasks(case, monkeypatch, tmp_path):
        assert sky.Task.from_yaml_config({**task}).num_nodes == task["num_nodes"]
        with pytest.raises(ValueError, match="num_node"):
            sky.Task.from_yaml_config({**task, "num_node": 2})


# Words that are hard to quote ------------------------------------------------------------


def test_words_come_through_the_shell_as_they_were_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Spaces, quotes, dollars and backticks in the root and in overrides, for all targets."""
    root = '/my runs/it\'s $HOME `x` "q"'
    override = ("--data.root", "/data sets/$USER")
    words = ["submit", str(Path(IMAGENET).resolve()), "--root", root, *override, "--dry-run"]
    monkeypatch.chdir(tmp_path)
    stub = tmp_path / "tombola"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > words.txt\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SKYPILOT_NODE_IPS", "10.0.0.1")
    monkeypatch.setenv("SKYPILOT_NUM_NODES", "1")
    folder = Path("jobs/imagenet-resnet50-imp")

    assert run_command([*words, "--to", "skypilot"]) == 0
    task = yaml.safe_load((folder / "imagenet-resnet50-imp.yaml").read_text())
    subprocess.run(["bash", "-euc", task["run"]], check=True)
    assert Path("words.txt").read_text().splitlines()[-4:] == ["--root", root, *override]

    assert run_command([*words, *KUBERNETES]) == 0
    jobset = list(yaml.safe_load_all((folder / "imagenet-resnet50-imp.yaml").read_text()))[1]
    assert _pod(jobset)["containers"][0]["command"][-4:] == ["--root", root, *override]

    assert run_command([*words, "--to", "slurm"]) == 0
    script = (folder / "imagenet-resnet50-imp.sbatch").read_text()
    line = next(line for line in script.splitlines() if line.startswith("command=("))
    told = subprocess.run(
        ["bash", "-c", f'{line}; printf "%s\\n" "${{command[@]}}"'], capture_output=True, text=True
    )
    assert told.stdout.splitlines()[-4:] == ["--root", root, *override]
    assert shlex.split(line.removeprefix("command=(").removesuffix(")"))[0] == "run"


def test_a_configuration_with_a_hard_name_comes_through(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the file and of the run: SLURM and Kubernetes allow fewer letters than file systems."""
    config = tmp_path / "it's mine.toml"
    config.write_text(Path(ELASTIC).read_text())
    monkeypatch.chdir(tmp_path)
    words = ["submit", str(config), "--name", "my 1st", "--split", "stages", "--dry-run"]
    assert run_command([*words, "--to", "slurm"]) == 0
    script = Path("jobs/my 1st/my 1st-1.sbatch").read_text()
    assert "#SBATCH --job-name=my-1st-1\n" in script
    subprocess.run(["bash", "-n", "jobs/my 1st/my 1st-1.sbatch"], check=True)

    assert run_command([*words, *KUBERNETES]) == 0
    config_map, jobset, *_ = yaml.safe_load_all(Path("jobs/my 1st/my 1st-1.yaml").read_text())
    check_manifest(jobset)
    (key,) = config_map["data"]
    assert re.fullmatch(r"[-._a-zA-Z0-9]+", key)
    (mounted,) = (one["configMap"] for one in _pod(jobset)["volumes"] if "configMap" in one)
    assert mounted["items"] == [{"key": key, "path": config.name}]
    assert f"/config/{config.name}" in _pod(jobset)["containers"][0]["command"]


# A script that runs ----------------------------------------------------------------------


@pytest.mark.parametrize(("code", "turns"), [(75, "requeue 7\n"), (0, ""), (2, "")])
def test_a_step_that_ends_while_a_notice_is_passed_on_keeps_its_code(
    code: int, turns: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Saved and not requeued, a run would stay half done; done and failed, nothing follows it.

    SLURM is four stubs: `scancel` returns once the step that it signals has ended.
    """
    stubs = {
        "srun": f"trap 'exit {code}' TERM\necho $$ > step\nwhile :; do /bin/sleep 0.05; done",
        "scancel": "kill $(cat step)\nwhile kill -0 $(cat step); do /bin/sleep 0.05; done",
        "scontrol": 'case "$*" in\n*hostnames*) echo n0 ;;\n*"show node"*) echo NodeAddr=n0 ;;\n'
        '*"show job"*) echo JobState=RUNNING ;;\n*) echo "$@" >> turns ;;\nesac',
        "sleep": "",
    }
    config = str(Path(IMAGENET).resolve())
    monkeypatch.chdir(tmp_path)
    assert run_command(["submit", config, "--to", "slurm", "--dry-run"]) == 0
    Path("turns").touch()
    for name, body in stubs.items():
        Path(name).write_text(f"#!/bin/bash\n{body}\n")
        Path(name).chmod(0o755)
    facts = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0", "SLURM_NNODES": "1"}
    environment = os.environ | facts | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = "jobs/imagenet-resnet50-imp/imagenet-resnet50-imp.sbatch"
    batch = subprocess.Popen(["bash", script], env=environment)
    while not Path("step").exists() or not Path("step").read_text():
        time.sleep(0.05)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(PATIENCE) == code
    assert Path("turns").read_text() == turns


# Jobs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "seeds", "expected"),
    [
        ((), (), [["tiny:"]]),
        (("seeds",), ("1", "2"), [["tiny-seed-1:--seeds 1", "tiny-seed-2:--seeds 2"]]),
        (
            ("stages",),
            (),
            [
                ["tiny-imp:--only imp", "tiny-grows:--only grows"],
                ["tiny-deeper:--only deeper", "tiny-shallower:--only shallower"],
            ],
        ),
        (
            ("controls",),
            (),
            [
                ["tiny-tickets:--only imp:tickets deeper:tickets shallower grows"],
                [
                    "tiny-imp-random:--only imp:random",
                    "tiny-imp-reinit:--only imp:reinit",
                    "tiny-deeper-random:--only deeper:random",
                ],
            ],
        ),
        (
            ("stages", "controls"),
            (),
            [
                ["tiny-imp-tickets:--only imp:tickets", "tiny-grows:--only grows"],
                [
                    "tiny-imp-random:--only imp:random",
                    "tiny-imp-reinit:--only imp:reinit",
                    "tiny-deeper-tickets:--only deeper:tickets",
                    "tiny-shallower:--only shallower",
                ],
                ["tiny-deeper-random:--only deeper:random"],
            ],
        ),
    ],
)
def test_a_run_splits_into_jobs(
    split: tuple[Split, ...], seeds: tuple[str, ...], expected: list[list[str]], tmp_path: Path
) -> None:
    """Those of a wave need only what the waves before it have made."""
    text = TREE + GROWS
    overrides = ["--seeds", *seeds] if seeds else []
    config = read_config(write_config(tmp_path, text), overrides)
    found = waves(config, needs(config, Folder(tmp_path / "none")), split)

    def told(job: Job) -> str:
        return f"{job.name}:{' '.join(job.words)}"

    assert [list(map(told, wave)) for wave in found] == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits-imp", "digits-imp"),
        ("Digits IMP_2", "digits-imp-2"),
        ("2nd-run", "run-2nd-run"),
        ("--", "run"),
        ("a" * 40, "a" * 40),
        ("a" * 20 + "-" + "b" * 20, "a" * 16 + "-" + "b" * 16 + "-fe0dc7"),
    ],
)
def test_a_job_has_a_name_that_every_scheduler_takes(name: str, expected: str) -> None:
    assert label(name) == expected
    assert len(expected) <= 40


def test_no_two_jobs_of_a_run_have_one_name(tmp_path: Path) -> None:
    """However long or alike their stages are named; one would take the other's place."""
    text = TREE.replace('"deeper"', '"imp-random"').replace('"shallower"', '"imp_random"')
    long = f"{'a-run-that-somebody-likes-well-' * 3}indeed"
    for name in ("tiny", long):
        config = read_config(write_config(tmp_path, text), ["--name", name, "--seeds", "1", "2"])
        needed = needs(config, Folder(tmp_path / "none"))
        found = waves(config, needed, ("seeds", "stages", "controls"))
        jobs = [job for wave in found for job in wave]
        assert len({job.name for job in jobs}) == len(jobs) == 12
        assert max(len(job.name) for job in jobs) <= 40


def test_a_root_that_only_the_nodes_can_read_is_taken_for_an_empty_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bucket, on a machine without credentials."""
    config = str(Path(ELASTIC).resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    words = ["--to", "skypilot", "--root", "s3://lab/runs", "--split", "stages", "--dry-run"]
    assert run_command(["submit", config, *words]) == 0
    assert len(list(Path("jobs/digits-elastic").glob("*.yaml"))) == 7


# Mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--to", "slrum"), "slrum"),
        ((), "--to"),
        (("--to", "slurm", "--nodes", "0"), "--nodes 0: must be at least 1"),
        (("--to", "slurm", "--gpus-per-node", "-1"), "--gpus-per-node -1: must be at least 0"),
        (("--to", "slurm", "--cpus-per-node", "0"), "--cpus-per-node 0: must be at least 1"),
        (("--to", "slurm", "--grace", "1"), "--grace 1: must be at least 10"),
        (
            ("--to", "slurm", "--time", "00:05:00"),
            "--time 00:05:00: must be --grace 300 and at least",
        ),
        (("--to", "slurm", "--time", "9:59"), "--time 9:59: must be --grace 300 and"),
        (("--to", "slurm", "--time", "1h"), "--time 1h: must be HH:MM:SS or D-HH:MM:SS"),
        (("--to", "slurm", "--image", "x"), "--image: is for --to kubernetes or skypilot"),
        (("--to", "slurm", "--no-spot"), "--spot: is for --to skypilot, not slurm"),
        (("--to", "skypilot", "--partition", "x"), "--partition: is for --to slurm, not skypilot"),
        ((*KUBERNETES, "--setup", "x"), "--setup: is for --to slurm or skypilot, not kubernetes"),
        (("--to", "kubernetes"), "--to kubernetes needs --image"),
        (("--to", "slurm", "--split", "seeds"), "--split seeds: the run has one seed"),
        (("--to", "slurm", "--split", "stages"), "--split stages: the run has one stage"),
        (("--to", "slurm", "--split", "controls"), "--split controls: no stage has controls"),
        (("--to", "slurm", "--split", "seed"), "seed"),
        (("--to", "slurm", "--train.totl", "1ep"), "did you mean 'train.total'?"),
        (("--to", "slurm", "--stages.imp.rewind", "90ep2"), "stages.imp.rewind = '90ep2'"),
        (("--to", "slurm", "--nodess", "2"), "nodess"),
    ],
)
def test_a_wrong_option_is_one_clear_line(
    words: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And nothing is written."""
    config = str(Path(IMAGENET).resolve())
    monkeypatch.chdir(tmp_path)
    assert run_command(["submit", config, *words, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_its_scheduler_the_files_are_written_and_the_commands_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(Path(IMAGENET).resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_command(["submit", config, "--to", "slurm"]) == 2
    told = capsys.readouterr()
    script = "jobs/imagenet-resnet50-imp/imagenet-resnet50-imp.sbatch"
    assert told.out.splitlines()[-1] == f"sbatch --parsable {script}"
    assert told.err == "error: sbatch is not here: run the commands above where it is\n"
    assert Path(script).exists()
