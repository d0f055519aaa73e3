"""The launch files of docs/recipes/machines.md, as far as a machine without Slurm and Kubernetes can read them."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from medxray.cli import app
from medxray.spec import Spec

PAGE = Path(__file__).parents[1] / "docs" / "recipes" / "machines.md"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def recipe(title: str) -> str:
    found = re.search(rf'^```\w+ title="{re.escape(title)}"\n(.*?)^```$', PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert found is not None, title
    return found[1]


def check_fit(words: list[str]) -> Spec:
    """A command of torchrun: its own options and, after them, a spec with settings that it has."""
    from torch.distributed.run import get_args_parser

    assert words[0] == "torchrun"
    parsed = get_args_parser().parse_args(words[1:])
    assert parsed.module and parsed.training_script == "medxray.cli" and parsed.training_script_args[0] == "fit"
    given = COMMANDS["fit"].make_context("fit", parsed.training_script_args[1:]).params
    return Spec.read(given["spec"], given["settings"])


# Of sbatch's own page: what stands in a batch file after #SBATCH.
SBATCH = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue", "output", "partition",
}  # fmt: skip


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_the_sbatch_file(tmp_path: Path) -> None:
    text = recipe("job.sbatch")
    assert text.startswith("#!/bin/bash\n#SBATCH ") and "set -euo pipefail" in text
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, flags=re.M))
    assert asked.keys() <= SBATCH and len(asked) == text.count("#SBATCH")
    (tmp_path / "job.sbatch").write_text(text)
    subprocess.run(["bash", "-n", str(tmp_path / "job.sbatch")], check=True)
    # Slurm's programs, as far as the file needs them; what is launched is told instead.
    for name, does in (("scontrol", 'printf "%s\\n" gpu07 gpu08'), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "42"}
    launched = subprocess.run(["bash", str(tmp_path / "job.sbatch")], env=env, capture_output=True, text=True, check=True)
    words = launched.stdout.splitlines()
    start = words.index("torchrun")
    assert all(word.startswith("--") for word in words[:start])
    assert words[words.index("--rdzv-endpoint") + 1] == "gpu07:29500" and words[words.index("--nnodes") + 1] == asked["nodes"]
    assert words[words.index("--nproc-per-node") + 1] == asked["gpus-per-node"]
    assert check_fit(words[start:]).training.strategy == "fsdp"


# Fields of kubeflow.org/v1 and of the pod's own types, as far as they are used; a field that is none of them is a mistake.
FIELDS: dict[str, set[str]] = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"runPolicy", "elasticPolicy", "pytorchReplicaSpecs", "nprocPerNode"},
    "spec.elasticPolicy": {
        "minReplicas", "maxReplicas", "rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId", "rdzvConf", "standalone", "maxRestarts",
        "metrics",
    },
    "spec.runPolicy": {
        "cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "schedulingPolicy",
    },
    "spec.pytorchReplicaSpecs": {"Master", "Worker"},
    "spec.pytorchReplicaSpecs.Worker": {"replicas", "template", "restartPolicy"},
    "spec.pytorchReplicaSpecs.Worker.template": {"metadata", "spec"},
    "spec.pytorchReplicaSpecs.Worker.template.spec": {"containers", "volumes", "nodeSelector", "tolerations"},
}  # fmt: skip
CONTAINER = {"name", "image", "command", "args", "env", "resources", "volumeMounts", "workingDir", "imagePullPolicy"}


def test_the_pytorch_job() -> None:
    job = yaml.safe_load(recipe("job.yaml"))
    for path, known in FIELDS.items():
        node = job
        for key in path.split(".") if path else ():
            node = node[key]
        assert node.keys() <= known, path
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", job["metadata"]["name"])
    spec, worker = job["spec"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert isinstance(spec["nprocPerNode"], str), "the operator takes text here"
    elastic = spec["elasticPolicy"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"] and elastic["rdzvBackend"] == "c10d"
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch", "the operator sets its variables in the container of this name"
    assert container.keys() <= CONTAINER
    assert all(isinstance(one["value"], str) for one in container["env"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])
    volumes = {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    words = [*container["command"], *container["args"]]
    assert all(isinstance(word, str) for word in words) and shlex.split(shlex.join(words)) == words
    assert check_fit(words).training.strategy == "fsdp"
