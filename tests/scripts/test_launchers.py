"""The launch scripts, as dry runs and with stub launchers: folders, file names, flags, failures."""

import importlib
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from support.processes import ROOT
from support.shell import SCRIPTS, run, stub

from clever.methods import METHODS

SHELL_FILES = sorted([*SCRIPTS.glob("*.sh"), SCRIPTS / "slurm.sbatch", ROOT / ".ci" / "run"])
ENTRY_POINTS = {
    "pretrain.sh": "main_dino", "linear_probe.sh": "eval_linear", "perturbation.sh": "eval_linear",
    "downstream.sh": "eval_linear_ds", "equivariance.sh": "eval_equivariance",
}  # fmt: skip
TRIAL = "CLeVER_vit_small_128_0.8_65536_1.0_reg0.001"
RUN = f"IN100_ep200/CLeVER_vit_small/aug1_2/128/0.8/{TRIAL}"  # folder of the default run, below Result_dir

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


class Launch(NamedTuple):
    start: list[str]  # words of the command before the script
    script: str
    arguments: list[str]
    logs: list[str]

    @property
    def log(self) -> str:
        (log,) = self.logs
        return log

    @property
    def flags(self) -> dict[str, str | None]:
        """{flag: its values, or None if it has none}."""
        values: dict[str, list[str]] = {}
        for word in self.arguments:
            if word.startswith("--"):
                flag = word
                values[flag] = []
            else:
                values[flag].append(word)
        return {flag: " ".join(words) if words else None for flag, words in values.items()}

    def parse(self):
        """The arguments as the entry point parses them."""
        return importlib.import_module(Path(self.script).stem).get_args_parser().parse_args(self.arguments)


def dry_run(name, cwd=ROOT, path=(), **variables) -> list[Launch]:
    result = run(SCRIPTS / name, cwd, path, DRY_RUN="1", **variables)
    assert result.returncode == 0, result.stderr
    title, *lines = result.stdout.splitlines()
    assert title.startswith(("pretrain: ", "linear probe: ", "perturbation: ", "downstream: ", "equivariance: "))
    launches: list[Launch] = []
    for line in lines:
        if line.startswith("log: "):
            launches[-1].logs.append(line.removeprefix("log: "))
        else:
            words = shlex.split(line)
            script = next(i for i, word in enumerate(words) if word.endswith(".py"))
            launches.append(Launch(words[:script], words[script], words[script + 1 :], []))
    return launches


@pytest.mark.parametrize("file", SHELL_FILES, ids=lambda file: file.name)
def test_syntax(file):
    assert subprocess.run(["bash", "-n", file], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck():
    result = subprocess.run(["shellcheck", "-x", *SHELL_FILES], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_entry_points_accept_every_flag(script):
    launch = dry_run(script)[-1]
    assert launch.script == f"{ROOT}/{ENTRY_POINTS[script]}.py"
    args = vars(launch.parse())
    assert {name.removeprefix("--") for name in launch.flags} <= set(args)
    assert (args["net"], args["arch"], args["hp1"]) == ("CLeVER", "vit_small", 0.8)


# --- pretraining -----------------------------------------------------------------------------------------------------


def test_pretrain_defaults():
    [launch] = dry_run("pretrain.sh", OMP_NUM_THREADS="3")
    folder = f"{ROOT}/results/{RUN}"
    assert launch.log == f"{folder}/result_pretrain_{TRIAL}.txt"
    assert launch.start == [
        "env", "PYTHONUNBUFFERED=1", "OMP_NUM_THREADS=3", "CUDA_VISIBLE_DEVICES=0,1,2,3",
        "python", "-m", "torch.distributed.launch", "--nproc_per_node=4", "--master_port=29500",
    ]  # fmt: skip
    assert launch.flags["--data_path"] == f"{ROOT}/data/IN100/train" and launch.flags["--output_dir"] == folder


def test_pretrain_overrides_from_another_folder(tmp_path):
    [launch] = dry_run(
        "pretrain.sh", cwd=tmp_path, net_name="dino", backbone_name="resnet18", EPOCH="7", DATASET="digits",
        DATASET_PATH="my data", Result_dir="out", HP1="0.75", BATCH="32", AUG_TYPE="aug1", SEP_LAMBD="0.5",
        DVR_out_dim="256", reg="", GPU_num="2", DEVICES="", PORT_NUM="30001", LAUNCHER="torchrun", PATCH="8",
        PRETRAIN_FLAGS="--out_dim 1024\n --warmup_epochs 1",
    )  # fmt: skip
    trial = "dino_resnet18_32_0.75_256_0.5"
    folder = f"out/digits_ep7/dino_resnet18/aug1/32/0.75/{trial}"
    assert launch.log == f"{folder}/result_pretrain_{trial}.txt"
    assert launch.start[3:] == ["torchrun", "--nproc_per_node=2", "--master_port=30001"]  # no CUDA_VISIBLE_DEVICES
    expected = {
        "--reg_lambd": "", "--data_path": "my data/train", "--output_dir": folder, "--patch_size": "8",
        "--arch": "resnet18", "--net": "dino",
    }  # fmt: skip
    assert expected.items() <= launch.flags.items()
    assert launch.arguments[-4:] == ["--out_dim", "1024", "--warmup_epochs", "1"]
    assert list(tmp_path.iterdir()) == []


def test_slurm_starts_one_torchrun_per_node(tmp_path):
    stub(tmp_path, "scontrol", 'echo "node7"; echo "node8"')
    copy = shutil.copy(SCRIPTS / "slurm.sbatch", tmp_path / "slurm_script")
    result = run(
        copy, cwd=tmp_path, path=[tmp_path], DRY_RUN="1", SLURM_SUBMIT_DIR=str(ROOT), SLURM_NNODES="2",
        SLURM_JOB_ID="123456", SLURM_JOB_NODELIST="node[7-8]", SLURM_CPUS_PER_TASK="48", CUDA_VISIBLE_DEVICES="0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout.splitlines()[1])
    assert words[:13] == [
        "env", "PYTHONUNBUFFERED=1", "OMP_NUM_THREADS=12", "srun", "--kill-on-bad-exit=1", "torchrun", "--nnodes=2",
        "--rdzv_backend=c10d", "--rdzv_endpoint=node7:23456", "--rdzv_id=123456", "--nproc_per_node=4",
        "--master_port=23456", f"{ROOT}/main_dino.py",
    ]  # fmt: skip
    assert words[words.index("--batch_size_per_gpu") + 1] == "64"


# --- linear probe and perturbations ----------------------------------------------------------------------------------

PROBE_NAMES = {"ALL": "linear", "main_part": "linear_hp0.8", "else_part": "linear_hp0.8_else"}


def test_perturbation_evaluates_every_part_on_every_perturbation():
    augs = ("basic", "aug1", "aug1_2", "aug1_4_2")
    [launch] = dry_run("perturbation.sh")
    assert launch.parse().test_aug_type == list(augs) and launch.parse().else_part == list(PROBE_NAMES)
    assert "--evaluate" in launch.flags and "--nproc_per_node=1" in launch.start
    assert [Path(log).name for log in launch.logs] == [
        f"only_eval_{aug}_{name}_0.001_100_{TRIAL}.txt" for aug in augs for name in PROBE_NAMES.values()
    ]
    [launch] = dry_run("perturbation.sh", TEST_AUGS="aug1_3", PARTS="main_part", GPU_num_EVAL="2")
    assert launch.flags["--test_aug_type"] == "aug1_3" and "--nproc_per_node=2" in launch.start
    assert Path(launch.log).name == f"only_eval_aug1_3_linear_hp0.8_0.001_100_{TRIAL}.txt"


def test_shell_scripts_know_the_networks_and_their_parts():
    command = f"source {SCRIPTS}/nets.sh; echo $ALL_NETS; echo $TOLD_NETS; for net in $ALL_NETS; do parts_of $net; done"
    command += "; parts_of dino '--equiv_part EF'"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    names, told, *parts, told_ef = result.stdout.splitlines()
    splits = {net: part == "ALL main_part else_part" for net, part in zip(names.split(), parts, strict=True)}
    assert splits == {net: method.is_split(method.term and method.term.part) for net, method in METHODS.items()}
    assert told_ef == "ALL main_part else_part"
    assert told.split() == [net for net, method in METHODS.items() if method.term and method.term.is_told]


def test_refuses_an_unknown_part():
    result = run(SCRIPTS / "linear_probe.sh", PARTS="ALL DIR", LAUNCHER="false", DRY_RUN="1")
    assert result.returncode == 2 and "eval_linear.py" not in result.stdout
    assert result.stderr == "linear_probe.sh: PARTS: unknown part 'DIR': must be one of ALL, main_part, else_part\n"


def test_refuses_a_run_without_a_pretrained_network(tmp_path):
    result = run(SCRIPTS / "linear_probe.sh", Result_dir=str(tmp_path / "none"), LAUNCHER="false")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert f"{tmp_path}/none/{RUN}" in result.stderr and "pretrain.sh first" in result.stderr


# --- output and failures ---------------------------------------------------------------------------------------------


def test_refuses_a_port_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        result = run(SCRIPTS / "pretrain.sh", DATASET_PATH=str(tmp_path), Result_dir=str(tmp_path / "results"), PORT_NUM=port)
    assert result.returncode != 0 and f"PORT_NUM={port} is in use" in result.stderr
    assert not (tmp_path / "results").exists()


def test_numbers_of_processes_are_checked(tmp_path):
    result = run(SCRIPTS / "pretrain.sh", DATASET_PATH=str(tmp_path), Result_dir=str(tmp_path / "results"), GPU_num="0")
    assert result.returncode == 2 and "GPU_num=0: must be a number of processes" in result.stderr
    assert not (tmp_path / "results").exists()


def test_output_is_shown_and_appended_to_the_log(tmp_path):
    launcher = stub(tmp_path, "launcher", "echo to stdout; echo to stderr >&2; echo threads $OMP_NUM_THREADS")
    for _ in range(2):
        result = run(SCRIPTS / "pretrain.sh", LAUNCHER=str(launcher), Result_dir=str(tmp_path), OMP_NUM_THREADS="5")
        assert result.returncode == 0 and "to stdout\nto stderr\nthreads 5\n" in result.stdout
    [log] = tmp_path.rglob("result_pretrain_*.txt")
    assert log.read_text() == "to stdout\nto stderr\nthreads 5\n" * 2


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_a_failure_stops_the_script(script, tmp_path):
    logs = dry_run(script, Result_dir=str(tmp_path))[0].logs
    (tmp_path / RUN).mkdir(parents=True)
    (tmp_path / RUN / "checkpoint.pth").touch()
    launcher = stub(tmp_path, "launcher", f"echo started >> {tmp_path}/count; echo boom; exit 7")
    result = run(SCRIPTS / script, LAUNCHER=str(launcher), Result_dir=str(tmp_path))
    assert result.returncode == 7 and "boom" in result.stdout
    assert (tmp_path / "count").read_text() == "started\n"
    assert [Path(log).read_text() for log in logs] == ["boom\n"] * len(logs)
