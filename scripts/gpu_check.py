"""All checks and timings that need a GPU, in one command: builds, tests, trainings, speed. See scripts/gpu_check.sh.

    bash scripts/gpu_check.sh                     # the parts below in this order, in at most 9 minutes
    bash scripts/gpu_check.sh scan tests          # only these parts
    bash scripts/gpu_check.sh --dry_run           # without a GPU, at tiny sizes: does every part start, and end?

Each part is a process of its own with a time limit. If one fails, the others go on. The folder --out (results/gpu_check) holds
a log and a JSON file of each part, summary.json, and tables.md. These two are written anew after each part.
"""

import argparse
import contextlib
import datetime
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from clever import utils
from clever.arguments import ArgumentParser, check_positive
from clever.entry import run_entry_point
from clever.utils import InputError

ROOT = Path(__file__).parents[1]
MINUTES = 9.0
MIN_SHARE = 0.4  # a part is skipped if less than this share of its time is left


class Part(NamedTuple):
    """A question, and the command that answers it within some `seconds`; in a dry run, `tiny` is run instead.

    {out} in a command is the part's JSON file. Without the program `tool`, the part is left out.
    """

    name: str
    answers: str
    seconds: int
    command: str
    tiny: str
    tool: str = ""


BUILD_SCAN = "python csrc/selective_scan/setup.py build_ext --inplace"
BUILD_VIEWS = "python csrc/views/setup.py build_ext --inplace"
STEP = "python -m scripts.bench.pretrain --output {out} --amp_dtype bf16 --batch_size 64 --launch eager compile graph both"
TINY = "python -m scripts.bench.pretrain --output {out} --batch_size 2 --out_dim 256 --steps 1 --rounds 1 --arch"
SCAN = "python -m scripts.bench.scan --output {out}"
CORES = os.cpu_count() or 1
WORKERS = min(4, CORES)
PYTEST = "python -m pytest -q -m gpu" + (f" -n {WORKERS}" if importlib.util.find_spec("xdist") else "")
COLLECT = "python -m pytest -q --collect-only -m gpu"
SCAN_TESTS = "tests/vmamba/test_scan_cuda.py"
TRAINING_TESTS = "tests/training/test_gpu_training.py"
ALL_PARTS = (
    Part("build_scan", "Does the scan compile here? (Kept for the next call.)", 240, f"env SCAN_CUDA=1 {BUILD_SCAN}",
         f"env SCAN_CUDA=0 {BUILD_SCAN}"),
    Part("build_views", "Does the renderer of views compile here?", 60, BUILD_VIEWS, BUILD_VIEWS),
    Part("doctor", "What is there?", 30, "python -m scripts.doctor", "python -m scripts.doctor"),
    Part("tests", "Are scan, losses and attention right on the GPU, in all types, with equal bits in 20 runs?", 120,
         f"{PYTEST} --ignore {TRAINING_TESTS}", COLLECT),
    Part("step_vit_64", "How fast is a step of ViT-S/16, compiled, as a graph? How many cores feed it?", 200,
         f"{STEP} --arch vit_small --steps 10 --rounds 3 --num_workers {CORES}", f"{TINY} vit_micro --launch eager graph"),
    Part("scan", "How fast is the scan, beside the memory's limit?", 90,
         f"{SCAN} --device cuda --dtype bf16 --batch 64 64", f"{SCAN} --sizes 32 --batch 1 --repeats 1"),
    Part("training", "Do 200 steps in bf16 and fp16 follow fp32? Does a killed run go on?", 180,
         f"{PYTEST} {TRAINING_TESTS}", f"{COLLECT} {TRAINING_TESTS}"),
    Part("step_vmamba_64", "How fast is a step of VMamba-T?", 150,
         f"{STEP} --arch vssm2-vmambav2_tiny_224 --steps 5 --rounds 2", f"{TINY} vssm2-vmambav2_micro"),
    Part("step_resnet_64", "How fast is a step of ResNet-50?", 150,
         f"{STEP} --arch resnet50 --steps 8 --rounds 2", f"{TINY} resnet8"),
    Part("sanitizer", "Does the scan touch memory that is not its own?", 120,
         f"compute-sanitizer --error-exitcode 1 python -m pytest -q -m gpu {SCAN_TESTS} -k images_on_a_gpu",
         f"{COLLECT} {SCAN_TESTS}", tool="compute-sanitizer"),
    Part("study", "Does CLeVER learn here, beside DINO?", 240,
         f"env DATA=digits ARCHS=vit_micro SEEDS=0 RECIPES=aug1_2 EPOCHS=80 JOBS={WORKERS} RESULT={{folder}}/study"
         " bash scripts/study.sh",
         "env DATA=digits ARCHS=resnet8 DRY_RUN=1 RESULT={folder}/study bash scripts/study.sh"),
)  # fmt: skip
PARTS = {part.name: part for part in ALL_PARTS}


# --- running -----------------------------------------------------------------------------------------------------------


def run_part(part: Part, folder: Path, left: float, is_dry_run: bool) -> dict:
    """Run the part, if `left` seconds are enough; a record of what became of it."""
    command = (part.tiny if is_dry_run else part.command).format(out=folder / f"{part.name}.json", folder=folder)
    record = {"name": part.name, "answers": part.answers, "command": command, "seconds": 0.0}
    if part.tool and not shutil.which(part.tool):
        return record | {"status": "not here", "note": f"{part.tool} is not installed"}
    if left < MIN_SHARE * part.seconds and not is_dry_run:
        return record | {"status": "skipped", "note": "no time left"}
    words = [sys.executable if word == "python" else word for word in command.split()]
    log, start = folder / f"{part.name}.log", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = "ok" if process.wait(min(left, part.seconds)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what is left of its children
            process.wait()
    seconds = round(time.monotonic() - start, 1)
    return record | {"status": status, "seconds": seconds, "note": "" if status == "ok" else str(log)}


def run_parts(parts: Sequence[Part], args: argparse.Namespace) -> list[dict]:
    """Run the parts in turn within the time; returns their records."""
    folder, records = Path(args.out).resolve(), []
    end = time.monotonic() + 60 * args.minutes
    for part in parts:
        record = run_part(part, folder, end - time.monotonic(), args.dry_run)
        records.append(record)
        save(records, folder, args)
        print(f"{part.name:<20} {record['status']:<10} {record['seconds']:6.1f} s  {record['note']}".rstrip(), flush=True)
    return records


def save(records: list[dict], folder: Path, args: argparse.Namespace) -> None:
    """Write summary.json, and tables.md with what the parts printed."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = {"device": device, "cores": CORES, "torch": torch.__version__, "date": f"{datetime.date.today()}"}
    utils.save_json({"kind": "gpu_check", **machine, "dry_run": args.dry_run, "parts": records}, folder / "summary.json")
    text = f"# {device}, {CORES} cores, torch {torch.__version__}, {datetime.date.today()}\n"
    for record in records:
        text += f"\n## {record['name']}: {record['status']}\n\n{record['answers']} `{record['command']}`\n"
        if record["status"] == "ok":
            printed = (folder / f"{record['name']}.log").read_text(errors="replace").strip()
            text += f"\n{printed}\n" if "\n|---" in printed else f"\n```text\n{printed}\n```\n"
    utils.write_text_atomically(text, folder / "tables.md")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run; not given: all")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, without a GPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="limit of the whole")
    parser.add_argument("--out", default="results/gpu_check", help="folder of the results")
    args = parser.parse_args()
    check_positive(args, "minutes")
    for name in args.parts:
        if name not in PARTS:
            raise InputError(f"part {name!r}: must be one of {', '.join(PARTS)}")
    if not (args.dry_run or torch.cuda.is_available()):
        raise InputError("torch sees no GPU; --dry_run needs none")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    records = run_parts([PARTS[name] for name in args.parts or PARTS], args)
    print(f"wrote {Path(args.out) / 'tables.md'}")
    if any(record["status"] in ("failed", "timed out") for record in records):
        sys.exit(1)


if __name__ == "__main__":
    run_entry_point(main)
