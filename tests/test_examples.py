"""The files in examples/ start what they say: each is run as its scheduler would, by a `preftune` that takes notes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from preftune.cli.launch import check_launch, is_sharded, machines_of
from preftune.errors import UserError

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SHELL = [EXAMPLES / "launch.sh", *sorted((EXAMPLES / "slurm").glob("*.sbatch"))]
NOTES = """\
printf "%s\\n" "$@" >"$SEEN/words"
for each; do
  [ "$before" = --launch ] && cp "$each" "$SEEN/config.yaml"
  before="$each"
done
exit "${CODE:-0}"
"""
TOOLS = {
    "preftune": NOTES,
    "srun": 'exec "$@"',
    "scontrol": 'echo "$*" >>"$SEEN/scontrol"; [ "$1" = show ] && printf "node7\\nnode8\\n"',
}
"""Stands for the programs of that name: ours leaves its words and its config, Slurm's start one task and name hosts."""


class Started(NamedTuple):
    words: list[str]
    config: Path
    code: int


@pytest.fixture
def started(tmp_path: Path):
    """Runs a command with these variables and nothing else, and says how it started preftune."""
    for name, body in TOOLS.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)

    def run(command: list[str], **variables: str) -> Started:
        environment = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "SEEN": str(tmp_path)} | variables
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        assert (tmp_path / "words").is_file(), done.stderr
        words = (tmp_path / "words").read_text().splitlines()
        (tmp_path / "words").unlink()
        return Started(words, tmp_path / "config.yaml", done.returncode)

    return run


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text(encoding="utf-8")))


def pod_of(job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod's spec and its one container."""
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


def several(name: str, machine: int) -> tuple[list[str], dict[str, str], str]:
    """(command, variables that its scheduler sets on that machine of two, address of machine 0)."""
    launch = str(EXAMPLES / "launch.sh")
    if name == "slurm":
        variables = {"SLURM_NNODES": "2", "SLURM_NODEID": str(machine), "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "71"}
        script = str(EXAMPLES / "slurm/several_nodes.sbatch")
        return ["bash", script, "my.yaml", "/shared/my"], {**variables, "SLURM_JOB_NODELIST": "node[7-8]"}, "node7"
    if name == "skypilot":
        (task,) = documents("skypilot/several_nodes.yaml")
        variables = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(machine), "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
        variables |= {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "RECIPE": "my.yaml", "RUN": "/shared/my"}
        return ["bash", "-c", task["run"]], variables, "10.0.0.7"
    if name == "job":
        container = pod_of(documents("kubernetes/job.yaml")[1])[1]
        variables = {each["name"]: each.get("value", str(machine)) for each in container["env"]}
        command = [launch if word == "/launch/launch.sh" else word for word in container["command"] + container["args"]]
        return command, variables, "preftune-0.preftune"
    trainer = documents("kubernetes/trainjob.yaml")[0]["spec"]["trainer"]
    variables = {"PET_NNODES": "2", "PET_NODE_RANK": str(machine), "PET_MASTER_ADDR": "preftune-node-0-0.preftune"}
    variables |= {"PET_MASTER_PORT": "29400", "PET_NPROC_PER_NODE": "8"}
    command = [word.replace("/launch/launch.sh", launch) for word in trainer["command"] + trainer["args"]]
    return command, variables, variables["PET_MASTER_ADDR"]


@pytest.mark.parametrize("name", ["slurm", "skypilot", "job", "trainjob"])
def test_machine_0_leads_and_the_others_join(started, name: str):
    for machine in (0, 1):
        command, variables, address = several(name, machine)
        words, config, code = started(command, **variables)
        assert code == 0
        check_launch(config, ["ppo"])
        asked = machines_of(config, joins=machine > 0)
        assert (asked.count, asked.rank, asked.processes) == (2, machine, 16) and is_sharded(config)
        found: Any = load_config_from_file(str(config))
        assert found.main_process_ip == address and found.main_process_port > 1024
        run = words[words.index("--output-dir") + 1] if machine == 0 else words[1]
        if machine == 0:
            assert words[0] == "run" and words[1].endswith("my.yaml")
        else:
            assert words == ["join", run, "--launch", words[3]]
        assert run.startswith("/shared/")


def test_overrides_and_another_engine_are_handed_on(started):
    where = {"MACHINES": "2", "MACHINE": "0", "ADDRESS": "a", "GPUS": "4", "ENGINE": "ddp", "PORT": "30000"}
    command = [str(EXAMPLES / "launch.sh"), "my.yaml", "/shared/my", "stages.ppo.kl.coef=0.1"]
    words, config, _ = started(command, **where)
    assert words[:4] == ["run", "my.yaml", "stages.ppo.kl.coef=0.1", "--output-dir"]
    assert not is_sharded(config) and machines_of(config, joins=False).processes == 8
    with pytest.raises(AssertionError, match="ENGINE: zero3, expected fsdp2 or ddp"):
        started(command, **where | {"ENGINE": "zero3"})
    with pytest.raises(UserError, match="machine_rank is 0"):
        machines_of(config, joins=True)


def test_one_node_needs_no_config_and_goes_on_after_its_time(started, tmp_path: Path):
    script = str(EXAMPLES / "slurm/one_node.sbatch")
    words, _, code = started(["bash", script, "my.yaml", "/shared/my"], SLURM_JOB_ID="71", CODE="138")
    assert words == ["run", "my.yaml", "--output-dir", "/shared/my", "--launch", "fsdp2"]
    assert code == 138 and (tmp_path / "scontrol").read_text() == "requeue 71\n"
    (tmp_path / "scontrol").unlink()
    assert started(["bash", script, "my.yaml", "/shared/my"], SLURM_JOB_ID="71", CODE="2").code == 2
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_scripts_are_sound(file: Path):
    subprocess.run(["bash", "-n", str(file)], check=True)
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if checker:
        assert subprocess.run([checker, str(file)], check=False, capture_output=True, text=True).stdout == ""
    lines = file.read_text(encoding="utf-8").splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert not directives or directives[-1] < commands[0], "Slurm reads nothing after the first command"
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", lines[number]) for number in directives)
    assert file.suffix != ".sbatch" or "#SBATCH --signal=USR1@120" in lines


def test_the_job_says_everything_twice_alike():
    service, job = documents("kubernetes/job.yaml")
    spec, container = pod_of(job)
    environment = {each["name"]: each.get("value") for each in container["env"]}
    machines = int(environment["MACHINES"])
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == machines
    assert environment["ADDRESS"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert spec["subdomain"] == service["metadata"]["name"]
    assert (
        service["spec"]["selector"] == {"job-name": job["metadata"]["name"]} and service["spec"]["clusterIP"] == "None"
    )
    assert int(environment["GPUS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in spec["volumes"]}
    (wrong, gone) = job["spec"]["podFailurePolicy"]["rules"]
    assert wrong["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert (wrong["action"], gone["action"], spec["restartPolicy"]) == ("FailJob", "Ignore", "Never")


def test_the_trainjob_patches_the_runtimes_own_containers():
    (job,) = documents("kubernetes/trainjob.yaml")
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # the names in the runtime torch-distributed
    assert (replicated["name"], container["name"]) == ("node", "node")
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    assert (
        job["spec"]["trainer"]["numProcPerNode"]
        == job["spec"]["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    )


def test_the_job_is_what_kubernetes_takes():
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents("kubernetes/job.yaml"):
        validate.validate(document, "1.37", strict=True)


def test_the_trainjob_is_what_kubeflow_trainer_takes():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    (job,) = documents("kubernetes/trainjob.yaml")
    # what it does not know it leaves out
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job


def test_the_task_is_what_skypilot_takes(monkeypatch: pytest.MonkeyPatch):
    sky = pytest.importorskip("sky")
    monkeypatch.chdir(ROOT)
    assert sky.Task.from_yaml(str(EXAMPLES / "skypilot/several_nodes.yaml")).num_nodes == 2
