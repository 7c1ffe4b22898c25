"""The launch scripts, dry and with stub launchers, and the set-up with a stub Python: names, flags, failures."""

import importlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from support.processes import ROOT

SCRIPTS = ROOT / "scripts"
SHELL_FILES = sorted([*SCRIPTS.glob("*.sh"), SCRIPTS / "slurm.sbatch", ROOT / ".ci" / "run"])
TRIAL = "CLeVER_vit_small_128_0.8_65536_1.0_reg0.001"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def run(script, cwd=ROOT, path=(), **variables):
    """Run a script in a clean environment; `path` holds folders that come first in PATH."""
    env = {"PATH": os.pathsep.join([*map(str, path), os.environ["PATH"]]), "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        ["bash", str(script)], cwd=cwd, env=env | variables, capture_output=True, text=True, timeout=60, check=False
    )


def dry_run(name, cwd=ROOT, **variables):
    """[(words of the command, log file)] of a script's launches."""
    result = run(SCRIPTS / name, cwd, DRY_RUN="1", **variables)
    assert result.returncode == 0, result.stderr
    settings, *lines = result.stdout.splitlines()
    assert settings.startswith(("pretrain: ", "linear probe: ", "perturbation: "))
    assert len(lines) % 2 == 0
    pairs = zip(lines[::2], lines[1::2], strict=True)
    return [(shlex.split(command), log.removeprefix("log: ")) for command, log in pairs]


def flags(words):
    """--name value pairs of a command, after the script; a flag without a value counts as None."""
    words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 :]
    pairs = {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            value = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else None
            pairs[word] = value
    return pairs


def stub(folder, name, text):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("#!/usr/bin/env bash\n" + text)
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("file", SHELL_FILES, ids=lambda file: file.name)
def test_bash_can_read_it_and_it_opens_with_a_command(file):
    assert subprocess.run(["bash", "-n", file], capture_output=True, check=False).returncode == 0
    lines = file.read_text().splitlines()
    comment = lines[1] if lines[0].startswith("#!") else lines[0]
    assert comment.startswith("# ") and file.name in comment


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck():
    result = subprocess.run(["shellcheck", "-x", *SHELL_FILES], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_pretrain_defaults_are_the_designs():
    [(words, log)] = dry_run("pretrain.sh", OMP_NUM_THREADS="3")
    folder = f"{ROOT}/results/IN100_ep200/CLeVER_vit_small/aug1_2/128/0.8/{TRIAL}"
    assert log == f"{folder}/result_pretrain_{TRIAL}.txt"
    assert words[:9] == [
        "env", "PYTHONUNBUFFERED=1", "OMP_NUM_THREADS=3", "CUDA_VISIBLE_DEVICES=0,1,2,3",
        "python", "-m", "torch.distributed.launch", "--nproc_per_node=4", "--master_port=29500",
    ]  # fmt: skip
    assert words[9] == f"{ROOT}/main_dino.py"
    assert flags(words) == {
        "--net": "CLeVER", "--arch": "vit_small", "--patch_size": "16", "--aug": "aug1_2", "--hp1": "0.8",
        "--sep_lambd": "1.0", "--reg_lambd": "_reg0.001", "--DVR_out_dim": "65536", "--epochs": "200",
        "--batch_size_per_gpu": "128", "--saveckp_freq": "100",
        "--data_path": f"{ROOT}/data/IN100/train", "--output_dir": folder,
    }  # fmt: skip


def test_pretrain_overrides_from_another_folder(tmp_path):
    [(words, log)] = dry_run(
        "pretrain.sh", cwd=tmp_path, net_name="dino", backbone_name="resnet18", EPOCH="7", DATASET="digits",
        DATASET_PATH="my data", Result_dir="out", HP1="0.75", BATCH="32", AUG_TYPE="aug1", SEP_LAMBD="0.5",
        DVR_out_dim="256", reg="", GPU_num="2", DEVICES="", PORT_NUM="30001", LAUNCHER="torchrun", PATCH="8",
        PRETRAIN_FLAGS="--out_dim 1024\n --warmup_epochs 1",
    )  # fmt: skip
    trial = "dino_resnet18_32_0.75_256_0.5"
    folder = f"out/digits_ep7/dino_resnet18/aug1/32/0.75/{trial}"
    assert log == f"{folder}/result_pretrain_{trial}.txt"
    assert not any(word.startswith("CUDA_VISIBLE_DEVICES") for word in words)
    assert words[words.index("torchrun") :][:4] == [
        "torchrun", "--nproc_per_node=2", "--master_port=30001", f"{ROOT}/main_dino.py",
    ]  # fmt: skip
    given = flags(words)
    assert given["--reg_lambd"] == "" and given["--data_path"] == "my data/train" and given["--output_dir"] == folder
    assert given["--patch_size"] == "8" and given["--arch"] == "resnet18" and given["--net"] == "dino"
    assert words[-4:] == ["--out_dim", "1024", "--warmup_epochs", "1"]
    assert list(tmp_path.iterdir()) == []


def test_batch_keeps_512_images_in_all_and_devices_of_the_caller_count():
    [(words, log)] = dry_run("pretrain.sh", GPU_num="2", CUDA_VISIBLE_DEVICES="6,7")
    assert flags(words)["--batch_size_per_gpu"] == "256" and "/256/0.8/CLeVER_vit_small_256_" in log
    assert "CUDA_VISIBLE_DEVICES=6,7" in words
    [(words, _)] = dry_run("pretrain.sh", CUDA_VISIBLE_DEVICES="6,7", DEVICES="1")
    assert "CUDA_VISIBLE_DEVICES=1" in words


def test_threads_are_the_cores_divided_among_the_processes(tmp_path):
    stub(tmp_path, "nproc", "echo 32")
    for gpus, threads in (("4", "8"), ("64", "1")):
        result = run(SCRIPTS / "pretrain.sh", path=[tmp_path], DRY_RUN="1", GPU_num=gpus)
        assert f" OMP_NUM_THREADS={threads} " in result.stdout


def test_linear_probe_has_three_parts():
    launches = dry_run("linear_probe.sh")
    folder = f"{ROOT}/results/IN100_ep200/CLeVER_vit_small/aug1_2/128/0.8/{TRIAL}"
    assert [(flags(words)["--else_part"], log) for words, log in launches] == [
        ("ALL", f"{folder}/result_linear_0.001_100_{TRIAL}.txt"),
        ("main_part", f"{folder}/result_linear_hp0.8_0.001_100_{TRIAL}.txt"),
        ("else_part", f"{folder}/result_linear_hp0.8_else_0.001_100_{TRIAL}.txt"),
    ]
    words = launches[0][0]
    assert "--nproc_per_node=2" in words and f"{ROOT}/eval_linear.py" in words
    assert flags(words) == {
        "--pretrained_weights": f"{folder}/checkpoint.pth", "--data_path": f"{ROOT}/data/IN100",
        "--dataset_type": "IN100", "--output_dir": folder, "--trial_name": TRIAL, "--net": "CLeVER", "--hp1": "0.8",
        "--arch": "vit_small", "--patch_size": "16", "--lr": "0.001", "--epochs": "100",
        "--batch_size_per_gpu": "128", "--n_last_blocks": "4", "--else_part": "ALL",
    }  # fmt: skip


def test_linear_probe_overrides():
    launches = dry_run(
        "linear_probe.sh", DATASET="digits", HP1="0.50", lr="1e-1", EPOCH_LN="5", BATCH_LN="16", n_last_blocks="1",
        GPU_num_LN="1", PARTS="else_part", PROBE_FLAGS="--seed 3 --num_workers 0",
    )  # fmt: skip
    [(words, log)] = launches
    assert Path(log).name == "result_linear_hp0.50_else_1e-1_5_CLeVER_vit_small_128_0.50_65536_1.0_reg0.001.txt"
    given = flags(words)
    assert "--dataset_type" not in given
    assert (given["--lr"], given["--epochs"], given["--batch_size_per_gpu"]) == ("1e-1", "5", "16")
    assert (given["--n_last_blocks"], given["--hp1"]) == ("1", "0.50")
    assert words[-4:] == ["--seed", "3", "--num_workers", "0"] and "--nproc_per_node=1" in words


@pytest.mark.parametrize("script", ["pretrain.sh", "linear_probe.sh", "perturbation.sh"])
def test_the_entry_points_know_every_flag(script):
    words, _ = dry_run(script)[-1]
    entry = importlib.import_module("main_dino" if script == "pretrain.sh" else "eval_linear")
    arguments = words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 :]
    args = vars(entry.get_args_parser().parse_args(arguments))
    assert {name.removeprefix("--") for name in flags(words)} <= set(args)
    assert (args["net"], args["arch"], args["hp1"]) == ("CLeVER", "vit_small", 0.8)


def test_dino_has_no_parts():
    [(words, log)] = dry_run("linear_probe.sh", net_name="dino")
    assert flags(words)["--else_part"] == "ALL" and "result_linear_0.001_100_dino_" in log
    assert len(dry_run("perturbation.sh", net_name="dino")) == 4


def test_perturbation_loops_over_perturbations_and_parts():
    launches = dry_run("perturbation.sh")
    names = {"ALL": "linear", "main_part": "linear_hp0.8", "else_part": "linear_hp0.8_else"}
    expected = [(aug, part) for aug in ("basic", "aug1", "aug1_2", "aug1_4_2") for part in names]
    assert [(flags(words)["--test_aug_type"], flags(words)["--else_part"]) for words, _ in launches] == expected
    for (words, log), (aug, part) in zip(launches, expected, strict=True):
        assert Path(log).name == f"only_eval_{aug}_{names[part]}_0.001_100_{TRIAL}.txt"
        assert "--evaluate" in flags(words) and "--nproc_per_node=1" in words
    [(words, _)] = dry_run("perturbation.sh", TEST_AUGS="aug1_3", PARTS="main_part", GPU_num_EVAL="2")
    assert flags(words)["--test_aug_type"] == "aug1_3" and "--nproc_per_node=2" in words


def test_plain_python_is_for_one_process():
    [(words, _)] = dry_run("pretrain.sh", LAUNCHER="python", GPU_num="1", DEVICES="")
    assert words[3:5] == ["python", f"{ROOT}/main_dino.py"]
    result = run(SCRIPTS / "pretrain.sh", LAUNCHER="python", GPU_num="2", DRY_RUN="1")
    assert result.returncode == 2 and "starts one process, not 2" in result.stderr


def test_output_is_shown_and_appended_to_the_log(tmp_path):
    launcher = stub(tmp_path, "launcher", "echo to stdout; echo to stderr >&2; echo threads $OMP_NUM_THREADS")
    for _ in range(2):
        result = run(SCRIPTS / "pretrain.sh", LAUNCHER=str(launcher), Result_dir=str(tmp_path), OMP_NUM_THREADS="5")
        assert result.returncode == 0 and "to stdout\nto stderr\nthreads 5\n" in result.stdout
    [log] = tmp_path.rglob("result_pretrain_*.txt")
    assert log.read_text() == "to stdout\nto stderr\nthreads 5\n" * 2


@pytest.mark.parametrize("script", ["pretrain.sh", "linear_probe.sh", "perturbation.sh"])
def test_a_failure_stops_the_script(script, tmp_path):
    [(_, log), *_] = dry_run(script, Result_dir=str(tmp_path))
    Path(log).parent.mkdir(parents=True)
    (Path(log).parent / "checkpoint.pth").touch()
    launcher = stub(tmp_path, "launcher", f"echo started >> {tmp_path}/count; echo boom; exit 7")
    result = run(SCRIPTS / script, LAUNCHER=str(launcher), Result_dir=str(tmp_path))
    assert result.returncode == 7 and "boom" in result.stdout
    assert (tmp_path / "count").read_text() == "started\n"
    assert Path(log).read_text() == "boom\n"


def test_probe_without_a_pretrained_network_or_with_an_unknown_part(tmp_path):
    result = run(SCRIPTS / "linear_probe.sh", Result_dir=str(tmp_path / "none"), LAUNCHER="false")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert f"{tmp_path}/none/IN100_ep200/" in result.stderr and "pretrain.sh first" in result.stderr
    result = run(SCRIPTS / "linear_probe.sh", PARTS="ALL IR", LAUNCHER="false", DRY_RUN="1")
    assert result.returncode == 2 and "PARTS: unknown part 'IR': must be one of ALL, main_part, else_part" in result.stderr
    assert "eval_linear.py" not in result.stdout


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
    assert flags(words)["--batch_size_per_gpu"] == "64"


# A Python without the packages, for setup.sh; the copy of it in a virtual environment has them once pip has run. Files
# in the folder $STUB switch it: `no_ensurepip`, `old` (Python 3.9), `pip_fails`. `calls` lists venv and pip install.
STUB_PYTHON = r"""
case "$*" in
  "- "*) cat > /dev/null; [[ $0 == */.venv/* && -e $STUB/installed ]] || { echo "no torch"; exit 1; } ;;
  *"print(sys.executable)"*) echo "$0" ;;
  *"version_info"*) [[ ! -e $STUB/old ]] ;;
  *"import ensurepip"*) [[ ! -e $STUB/no_ensurepip ]] ;;
  "-m venv "*) echo venv >> "$STUB/calls"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install "*) echo install >> "$STUB/calls"; [[ ! -e $STUB/pip_fails ]] || exit 1; touch "$STUB/installed" ;;
  *) echo "the stub does not know: $*" >&2; exit 99 ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """A copy of the set-up beside stub Pythons: setup() runs it, setup.calls() lists what it made and installed."""
    repo, state = tmp_path / "a repo", tmp_path / "stub"
    (repo / "scripts").mkdir(parents=True)
    for name in ("scripts/setup.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, repo / name)
    names = ["python", "python3", *(f"python3.{minor}" for minor in range(10, 14))]
    for name in names:
        stub(state, name, STUB_PYTHON)
    main = stub(tmp_path, "main.sh", f'source "{repo}/scripts/setup.sh"\necho "python is $(command -v python)"\n')

    def call():
        return run(main, cwd=tmp_path, path=[state], STUB=str(state))

    def calls():
        lines = (state / "calls").read_text().split() if (state / "calls").exists() else []
        (state / "calls").unlink(missing_ok=True)
        return lines

    call.calls, call.repo, call.state = calls, repo, state
    return call


def test_setup_makes_an_environment_once_and_follows_the_requirements(setup):
    result = setup()
    assert result.returncode == 0, result.stderr
    assert f"python is {setup.repo}/.venv/bin/python" in result.stdout and setup.calls() == ["venv", "install"]
    result = setup()
    assert f"using {setup.repo}/.venv" in result.stdout and setup.calls() == []
    with (setup.repo / "requirements.txt").open("a") as file:
        file.write("more\n")
    assert setup().returncode == 0 and setup.calls() == ["install"]
    (setup.state / "installed").unlink()  # a package was removed by hand
    assert setup().returncode == 0 and setup.calls() == ["install"]


def test_setup_goes_on_after_an_interrupted_installation(setup):
    (setup.state / "pip_fails").touch()
    result = setup()
    assert result.returncode == 1 and "run this again" in result.stderr and "python is" not in result.stdout
    assert setup.calls() == ["venv", "install"]
    (setup.state / "pip_fails").unlink()
    assert setup().returncode == 0 and setup.calls() == ["install"]


def test_setup_makes_a_broken_environment_again(setup):
    setup()
    setup.calls()
    python = setup.repo / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nonexistent/python3")
    result = setup()
    assert result.returncode == 0 and "broken" in result.stdout and setup.calls() == ["venv", "install"]


def test_setup_uses_the_active_environment_as_it_is(setup):
    ready = 'if [[ "$1" == - ]]; then cat > /dev/null; exit 0; fi\n'
    stub(setup.state, "python3", ready + STUB_PYTHON)
    result = setup()
    assert f"using {setup.state}/python3" in result.stdout  # only python3 has everything: `python` becomes that one
    assert f"python is {setup.repo}/build/bin/python" in result.stdout
    assert (setup.repo / "build/bin/python").resolve() == setup.state / "python3"
    stub(setup.state, "python", ready + STUB_PYTHON)
    result = setup()
    assert f"python is {setup.state}/python\n" in result.stdout
    assert not (setup.repo / ".venv").exists() and setup.calls() == []


@pytest.mark.parametrize(("state", "words"), [("no_ensurepip", "python3-venv"), ("old", "needs Python >= 3.10")])
def test_setup_says_what_the_machine_lacks(setup, state, words):
    (setup.state / state).touch()
    result = setup()
    assert result.returncode == 1 and words in result.stderr and "conda env create -f CLeVER.yml" in result.stderr
    assert not (setup.repo / ".venv").exists()
