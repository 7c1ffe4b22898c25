"""scripts/gpu_check.sh on a CPU: its parts at tiny sizes, failures and timeouts, and what it writes."""

import json
import os
import subprocess

import pytest
from support.in_process import assert_refused, call
from support.processes import ROOT, SETTINGS

from scripts import gpu_check
from scripts.gpu_check import Part


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def check(monkeypatch, folder, *parts, **flags):
    """Run these parts as a dry run, in this process; returns the outcome and the records by name."""
    monkeypatch.setattr(gpu_check, "PARTS", {part.name: part for part in parts})
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    outcome = call(gpu_check.main, "--dry_run", "--out", folder, *words)
    return outcome, {record["name"]: record for record in summary(folder)["parts"]}


def tiny(name, command, seconds=60, tool=""):
    return Part(name, "Does it?", seconds, "false", command, tool)


def test_the_command_runs_a_part_and_writes_tables(tmp_path):
    command = ["bash", "scripts/gpu_check.sh", "doctor", "--dry_run", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | SETTINGS, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = summary(tmp_path / "out")
    assert found["kind"] == "gpu_check" and [part["status"] for part in found["parts"]] == ["ok"]
    tables = (tmp_path / "out/tables.md").read_text()
    assert "\n## doctor: ok\n" in tables and "```text\nPython" in tables


@pytest.mark.slow
def test_every_part_runs_at_a_tiny_size(tmp_path):
    outcome = call(gpu_check.main, "--dry_run", "--out", tmp_path)
    found = {part["name"]: part["status"] for part in summary(tmp_path)["parts"]}
    assert outcome.status == 0 and list(found) == list(gpu_check.PARTS), outcome
    assert set(found.values()) <= {"ok", "not here"}, found
    assert json.loads((tmp_path / "step_vit_64.json").read_text())["results"][0]["step"] > 0


def test_a_failure_and_a_timeout_do_not_stop_the_others(tmp_path, monkeypatch):
    parts = [
        tiny("fails", "python -c print('why');raise(SystemExit(3))"),
        tiny("hangs", "sleep 100", seconds=1),
        tiny("absent", "true", tool="no-such-tool"),
        tiny("works", "echo well"),
    ]
    outcome, records = check(monkeypatch, tmp_path, *parts)
    statuses = {name: record["status"] for name, record in records.items()}
    assert outcome.status == 1
    assert statuses == {"fails": "failed", "hangs": "timed out", "absent": "not here", "works": "ok"}
    assert 1 <= records["hangs"]["seconds"] < 20 and records["absent"]["note"] == "no-such-tool is not installed"
    assert str(tmp_path / "fails.log") in outcome.stdout and "why" in (tmp_path / "fails.log").read_text()
    assert "well" in (tmp_path / "tables.md").read_text()


def test_unknown_parts_are_refused(tmp_path):
    assert_refused(call(gpu_check.main, "scna", "--dry_run", "--out", tmp_path / "out"), "'scna'", "scan")
    assert not (tmp_path / "out").exists()
