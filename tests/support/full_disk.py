"""Runs every kind on a disk that fills up. Started in a mount namespace of its own: `unshare -m python -m support.full_disk`.

    python -m support.full_disk FOLDER MOMENTS

Mounts a file system in memory at FOLDER/disk. For each kind: how much an undisturbed run writes is measured; then the run is
repeated with MOMENTS smaller amounts of free space, must end with one line and leave whole files; and with all space it must
end with the files of the undisturbed run. Prints a JSON object {kind: [moments at which the disk was full, problems]}.
"""

import importlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from support.in_process import call
from support.interrupted import assert_whole, contents, make_runs, words_of

SIZE = 200 << 20
PAGE = 4096


def free(disk: Path) -> int:
    return shutil.disk_usage(disk).free


def fill(disk: Path, left: int) -> None:
    """A file that leaves `left` bytes."""
    with open(disk / "filler", "wb") as file:
        for _ in range((free(disk) - left) // PAGE):
            file.write(bytes(PAGE))


def check_kind(script: str, flags: list[str], disk: Path, moments: int) -> tuple[int, list[str]]:
    """How often the disk was full, and what was wrong."""
    main = importlib.import_module(script).main
    rng, full, problems = random.Random(script), 0, []
    before = free(disk)
    outcome = call(main, *words_of(flags, disk / "run"))
    assert outcome.status == 0, outcome
    needed, expected = before - free(disk), contents(disk / "run")
    shutil.rmtree(disk / "run")
    for moment in range(moments):
        left = round(needed * (moment + rng.random()) / moments)
        fill(disk, left)
        outcome = call(main, *words_of(flags, disk / "run"))
        lines = outcome.stderr.splitlines()
        if outcome.status:
            full += 1
            if outcome.status != 1 or len(lines) != 1 or "the disk is full" not in lines[0]:
                problems.append(f"{left} bytes left: status {outcome.status}, {lines[-3:]}")
        try:
            assert_whole(disk / "run")
        except Exception as error:
            problems.append(f"{left} bytes left: {type(error).__name__}: {error}")
        leftovers = [str(path) for path in (disk / "run").rglob("*") if path.suffix in (".tmp", ".lock")]
        problems += [f"{left} bytes left: {path} is left" for path in leftovers]
        (disk / "filler").unlink()
        if moment % 2:  # every other time the run goes on with space, otherwise with what it has
            outcome = call(main, *words_of(flags, disk / "run"))
            if outcome.status or contents(disk / "run") != expected:
                problems.append(f"{left} bytes left: with more space, other files, or {outcome.stderr[-300:]}")
            shutil.rmtree(disk / "run", ignore_errors=True)
    return full, problems


def main() -> None:
    folder, moments = Path(sys.argv[1]), int(sys.argv[2])
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", disk], check=True)
    runs = make_runs(folder / "world")
    kinds = sys.argv[3:] or list(runs)
    print(json.dumps({kind: check_kind(*runs[kind], disk, moments) for kind in kinds}))


if __name__ == "__main__":
    main()
