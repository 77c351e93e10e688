"""Derive the size embeddings in tests/models/test_conditioning.py by sd-scripts' own functions.

Usage: ``SD_SCRIPTS_DIR=/path/to/sd-scripts python tests/reference/derive_sizes.py``

Takes the three functions it needs out of ``library/sdxl_train_util.py`` without importing that
file. The stored values come from commit 48d368fa.
"""

from __future__ import annotations

import ast
import math
import os
from pathlib import Path

import torch

FUNCTIONS = ("timestep_embedding", "get_timestep_embedding", "get_size_embeddings")
SIZES = ([[1200, 903], [3024, 4032]], [[0, 31], [12, 0]], [[1152, 896], [896, 1152]])
SHOWN = (1, 130, 260, 515, 770, 1030, 1300, 1535)


def main() -> None:
    """Print some of the 1536 values of two pictures, and the sum of all."""
    path = Path(os.environ["SD_SCRIPTS_DIR"]) / "library" / "sdxl_train_util.py"
    wanted = [
        node
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS
    ]
    scope = {"torch": torch, "math": math}
    exec(compile(ast.Module(wanted, type_ignores=[]), "sdxl_train_util", "exec"), scope)
    embedding = scope["get_size_embeddings"](*map(torch.tensor, SIZES), "cpu")
    for row in embedding:
        print(f"    ({[round(row[i].item(), 5) for i in SHOWN]}, {row.sum().item():.3f}),")


if __name__ == "__main__":
    main()
