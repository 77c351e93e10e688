"""Imports point one way, heavy ones stay out of the command line, no wildcards."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mlm_plugin"
ROWS = [
    ("errors", "files", "failures"),
    ("config",),
    ("prompt_sets",),
    ("mlm",),
    ("data", "models", "random_state"),
    ("networks",),
    ("export",),
    ("methods",),
    ("training",),
    ("contextualizer_file", "pretraining"),
    ("mlm_setup",),
    ("toy", "pocket"),
    ("setup",),
    ("evaluation", "estimate"),
    ("doctor", "sheet"),
    ("sd_scripts", "commands"),
    ("compare", "demo"),
    ("cli", "kohya"),
]
ROW_OF = {name: number for number, names in enumerate(ROWS) for name in names}
FORBIDDEN = {  # row -> packages that it must not import
    "config": {"torch", "transformers", "diffusers", "accelerate", "peft", "PIL", "numpy"},
    "prompt_sets": {"torch", "transformers", "diffusers", "accelerate", "peft"},
    "mlm": {"transformers", "diffusers", "accelerate", "peft"},
    "data": {"transformers", "diffusers", "accelerate", "peft"},
    "models": {"accelerate"},
    "methods": {"accelerate"},
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: wildcard import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_own_row_and_the_rows_above(path):
    part = part_of(path)
    if part == "__init__":
        return
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "mlm_plugin" and len(parts) > 1 and parts[1] in ROW_OF:
            assert ROW_OF[parts[1]] <= ROW_OF[part], f"{part} must not import {module}"
        assert parts[0] != "research", f"{part} is installed, research is not"
        assert parts[0] not in FORBIDDEN.get(part, ()), f"{part} must not know {parts[0]}"


def test_every_part_is_in_the_table():
    parts = {part_of(path) for path in SOURCES} - {"__init__"}
    assert parts <= set(ROW_OF)


@pytest.mark.parametrize("module", ["mlm_plugin", "mlm_plugin.cli", "mlm_plugin.config.loading"])
def test_importing_the_command_line_loads_nothing_heavy(module):
    code = (
        f"import {module}, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    ).stdout
    assert output.strip() == "[]"
