"""Makes the package `clever_ssl` of the scripts in this repository, for `pip install .` (setup.py).

In the repository the scripts lie side by side and import each other by their plain names (`import utils`), which would shadow
modules of other packages where they are installed. So the package has copies in which these imports name the package:
`import utils` becomes `from clever_ssl import utils`, and `from vmamba.config import x` becomes
`from clever_ssl.vmamba.config import x`.
"""

import ast
import shutil
from pathlib import Path

PACKAGE = "clever_ssl"
LEFT_OUT = {"setup.py", "hubconf.py", "scripts/doctor.py"}  # what only a clone has a use for
FOLDERS = ("evaluation", "vmamba", "scripts")
LEFT_OUT_FOLDERS = {"scripts/bench", "scripts/__pycache__"}
DATA_SUFFIXES = (".yaml", ".css", ".js")
INIT = f'''"""CLeVER: contrastive learning via equivariant representation."""

from {PACKAGE}.evaluation.loading import load_backbone as load_backbone
'''
COMMANDS = """\
\"\"\"Console commands: the mains of the scripts. The entry points in pyproject.toml name these functions.\"\"\"

import importlib
from collections.abc import Callable

from clever_ssl import distributed

SCRIPTS = {scripts!r}


def _command(module: str) -> Callable[[], None]:
    return lambda: distributed.run_entry_point(importlib.import_module(f"clever_ssl.{{module}}").main)


for _name, _module in SCRIPTS.items():
    globals()[_name] = _command(_module)
"""
SCRIPTS = {
    "pretrain": "main_dino", "probe": "eval_linear", "knn": "eval_knn", "equivariance": "eval_equivariance",
    "downstream": "eval_linear_ds", "video": "eval_video_segmentation", "saliency": "eval_saliency",
    "attention": "visualize_attention", "export": "export", "embed": "embed", "report": "scripts.report",
}  # fmt: skip


def own_modules(root: Path) -> dict[str, Path]:
    """{path in the package: file} of all modules and their data."""
    files = {path.name: path for path in sorted(root.glob("*.py"))}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            name = path.relative_to(root).as_posix()
            kept = not any(name.startswith(f"{left_out}/") for left_out in LEFT_OUT_FOLDERS)
            if kept and path.suffix in (".py", *DATA_SUFFIXES):
                files[name] = path
    return {name: path for name, path in files.items() if name not in LEFT_OUT}


def rewrite_imports(source: str, own: set[str]) -> str:
    """The source of a module, in which imports of modules in `own` name the package.

    Raises ValueError for a form of import that is not translated (`import vmamba.model`).
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.split(".")[0] in own]
            if not names:
                continue
            if len(node.names) > 1 or "." in names[0].name:
                raise ValueError(f"line {node.lineno}: write `from ... import ...` instead of {ast.unparse(node)!r}")
            _replace(lines, node.lineno, "import ", f"from {PACKAGE} import ")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in own:
            _replace(lines, node.lineno, "from ", f"from {PACKAGE}.")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and name.value.split(".")[0] in own:
                _replace(lines, name.lineno, f'"{name.value}"', f'"{PACKAGE}.{name.value}"')
    return "".join(lines)


def _replace(lines: list[str], number: int, old: str, new: str) -> None:
    assert old in lines[number - 1], lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new, 1)


def write_package(root: Path, target: Path) -> None:
    """Write the package into the folder `target`, which is made anew."""
    shutil.rmtree(target, ignore_errors=True)
    files = own_modules(root)
    own = {name.split("/")[0].removesuffix(".py") for name in files}
    for name, path in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py":
            (target / name).write_text(rewrite_imports(path.read_text(encoding="utf-8"), own), encoding="utf-8")
        else:
            shutil.copyfile(path, target / name)
    (target / "__init__.py").write_text(INIT)
    (target / "commands.py").write_text(COMMANDS.format(scripts=SCRIPTS))
    (target / "py.typed").touch()
