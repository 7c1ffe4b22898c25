"""Two nodes, each a network namespace of its own, of which one is lost and comes back: docs/pretraining.md, "Several nodes"."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.interrupted import plain
from support.processes import ROOT, SETTINGS, TINY_NETWORK, write_images

from clever.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow
PREFIX = "10.77.0"
LOOP = """
until {python} -m torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint={prefix}.1:29400 \
    --rdzv_id=job --rdzv_conf=is_host={is_host} --local_addr={prefix}.{number} --max_restarts=0 {root}/main_dino.py {flags}
do sleep 5; done
"""  # is_host, local_addr: the namespaces share the machine's name, by which nodes find each other otherwise


def ip(*words: object, check: bool = True) -> str:
    return subprocess.run(["ip", *map(str, words)], check=check, capture_output=True, text=True).stdout


def can_make_namespaces() -> bool:
    return shutil.which("ip") is not None and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0


@pytest.fixture
def nodes():
    """Two connected namespaces; everything that runs in them is killed at the end."""
    if not can_make_namespaces():
        pytest.skip("no network namespaces here")
    names = [f"clever{os.getpid()}n{number}" for number in (1, 2)]
    for name in names:
        ip("netns", "add", name)
    ip("link", "add", "veth1", "netns", names[0], "type", "veth", "peer", "name", "veth2", "netns", names[1])
    for number, name in enumerate(names, 1):
        ip("-n", name, "addr", "add", f"{PREFIX}.{number}/24", "dev", f"veth{number}")
        for device in ("lo", f"veth{number}"):
            ip("-n", name, "link", "set", device, "up")
    yield names
    for name in names:
        lose(name)
        ip("netns", "del", name)


def start(nodes: list[str], number: int, images: Path, folder: Path) -> subprocess.Popen:
    """The loop of a node: it starts the training again until it has ended well."""
    flags = (*TINY_NETWORK, "--net", "CLeVER", "--data_path", images, "--output_dir", folder, "--epochs", 12)
    flags = (*flags, "--batch_size_per_gpu", 8, "--num_workers", 0, "--saveckp_freq", 0)
    words, is_host = " ".join(map(str, flags)), int(number == 1)
    loop = LOOP.format(python=sys.executable, prefix=PREFIX, number=number, is_host=is_host, root=ROOT, flags=words)
    environment = os.environ | SETTINGS | {"GLOO_SOCKET_IFNAME": f"veth{number}"}
    with open(f"{folder}.node{number}.txt", "ab") as output:
        command = ["ip", "netns", "exec", nodes[number - 1], "bash", "-c", loop]
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def lose(node: str) -> None:
    """Kill all processes of a node."""
    for pid in ip("netns", "pids", node, check=False).split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for_epochs(folder: Path, count: int) -> None:
    deadline, log = time.monotonic() + 120, folder / "log.txt"
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, Path(f"{folder}.node1.txt").read_text()[-2000:]
        time.sleep(0.1)


def test_a_node_that_is_lost_and_comes_back(nodes, tmp_path):
    images = write_images(tmp_path / "images", 64)
    states = []
    for name in ("undisturbed", "disturbed"):
        folder = tmp_path / name
        loops = [start(nodes, number, images, folder) for number in (1, 2)]
        if name == "disturbed":
            wait_for_epochs(folder, 3)
            lose(nodes[1])
            loops[1].wait()
            time.sleep(3)
            assert len((folder / "log.txt").read_text().splitlines()) < 12  # the first node does not go on alone
            loops[1] = start(nodes, 2, images, folder)
        assert [loop.wait(200) for loop in loops] == [0, 0], Path(f"{folder}.node1.txt").read_text()[-2000:]
        states.append(load_checkpoint(folder / "checkpoint.pth"))
    for part in ("student", "teacher", "optimizer", "dino_loss"):
        assert plain(states[0][part]) == plain(states[1][part]), part
    assert "continuing" in (tmp_path / "disturbed.node1.txt").read_text()
