"""setup.sh with stub Pythons: which Python it chooses, and what it installs."""

import shutil

import pytest
from support.processes import ROOT
from support.shell import run, stub

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")

# A Python without packages; its copy in a virtual environment has them after pip install. Files in the folder $STUB change
# its behaviour: `unsuitable` (too old, or no ensurepip), `pip_fails`. The file `calls` lists the calls of venv and pip install.
STUB_PYTHON = r"""
case "$*" in
  "- "*) cat > /dev/null; [[ $0 == */.venv/* && -e $STUB/installed ]] || { echo "no torch"; exit 1; } ;;
  *"print(sys.executable)"*) echo "$0" ;;
  *"import ensurepip"*) [[ ! -e $STUB/unsuitable ]] ;;
  "-m venv "*) echo venv >> "$STUB/calls"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install "*) echo install >> "$STUB/calls"; [[ ! -e $STUB/pip_fails ]] || exit 1; touch "$STUB/installed" ;;
  *) echo "the stub does not know: $*" >&2; exit 99 ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """setup() runs a copy of setup.sh with stub Pythons; setup.calls() lists the calls of venv and pip since the last time."""
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


def test_creates_an_environment_once_and_follows_the_requirements(setup):
    result = setup()
    assert result.returncode == 0, result.stderr
    assert f"python is {setup.repo}/.venv/bin/python" in result.stdout and setup.calls() == ["venv", "install"]
    result = setup()
    assert f"using {setup.repo}/.venv" in result.stdout and setup.calls() == []
    with (setup.repo / "requirements.txt").open("a") as file:
        file.write("more\n")
    assert setup().returncode == 0 and setup.calls() == ["install"]
    (setup.state / "installed").unlink()  # as if a package had been removed
    assert setup().returncode == 0 and setup.calls() == ["install"]


def test_uses_the_active_environment_unchanged(setup):
    ready = 'if [[ "$1" == - ]]; then cat > /dev/null; exit 0; fi\n'
    stub(setup.state, "python3", ready + STUB_PYTHON)
    result = setup()
    assert f"using {setup.state}/python3" in result.stdout  # only python3 has all packages: it becomes `python`
    assert f"python is {setup.repo}/build/bin/python" in result.stdout
    assert (setup.repo / "build/bin/python").resolve() == setup.state / "python3"
    stub(setup.state, "python", ready + STUB_PYTHON)
    result = setup()
    assert f"python is {setup.state}/python\n" in result.stdout
    assert not (setup.repo / ".venv").exists() and setup.calls() == []
