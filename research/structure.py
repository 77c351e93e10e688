"""The shape of the package in numbers: `python -m research.structure [FOLDER]`.

Lines, files that import from another part of the package, functions with more than 6 parameters
(without ``self`` and ``cls``), functions of more than 60 lines.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Function", "functions_of", "imports_across", "main"]

MAX_PARAMETERS, MAX_LINES = 6, 60


class Function(NamedTuple):
    """A function or method."""

    place: str
    num_parameters: int
    num_lines: int


def functions_of(path: Path, root: Path) -> Iterator[Function]:
    """Every function of a file, nested ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names = [
                a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            ]
            parameters = [name for name in names if name not in ("self", "cls")]
            place = f"{path.relative_to(root)}:{node.lineno} {node.name}"
            yield Function(place, len(parameters), node.end_lineno - node.lineno + 1)


def imports_across(path: Path, package: Path) -> bool:
    """Whether a file imports from another top-level part of its package."""
    own = path.relative_to(package).parts[0].removesuffix(".py")
    modules = (
        node.module.split(".")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module
    )
    return any(parts[0] == package.name and len(parts) > 1 and parts[1] != own for parts in modules)


def main(argv: list[str]) -> None:
    """Print the numbers of ``mlm_plugin`` in a checkout."""
    root = Path(argv[0] if argv else ".")
    package = root / "mlm_plugin"
    files = sorted(package.rglob("*.py"))
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    method = sum(count for path, count in lines.items() if path.parent.name == "mlm")
    functions = [function for path in files for function in functions_of(path, root)]
    median = statistics.median(function.num_lines for function in functions)
    print(f"{len(files)} files, {sum(lines.values())} lines, {method} of them in mlm/")
    print(f"{sum(imports_across(path, package) for path in files)} files import across")
    print(f"{len(functions)} functions, median {median:g} lines")
    for title, found in (
        (f"more than {MAX_PARAMETERS} parameters",
         [f for f in functions if f.num_parameters > MAX_PARAMETERS]),
        (f"more than {MAX_LINES} lines", [f for f in functions if f.num_lines > MAX_LINES]),
    ):  # fmt: skip
        print(f"{len(found)} functions of {title}")
        for function in found:
            print(f"  {function.place}: {function.num_parameters} parameters, "
                  f"{function.num_lines} lines")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
