"""Derive the file hashes in tests/export by running sd-scripts' own function.

Usage: ``SD_SCRIPTS_DIR=/path/to/sd-scripts python tests/reference/derive_hashes.py``

Takes the three functions it needs out of ``library/train_util.py`` without importing that file, so
that safetensors is the only requirement. The stored values come from commit 48d368fa.
"""

from __future__ import annotations

import ast
import hashlib
import os
from io import BytesIO
from pathlib import Path

import safetensors.torch
import torch

FUNCTIONS = ("precalculate_safetensors_hashes", "addnet_hash_legacy", "addnet_hash_safetensors")
METADATA = {"ss_network_dim": "4", "modelspec.title": "x", "sshs_model_hash": "old"}


def main() -> None:
    """Print the two hashes of a small and of a two-megabyte file."""
    source = (Path(os.environ["SD_SCRIPTS_DIR"]) / "library" / "train_util.py").read_text("utf-8")
    wanted = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS
    ]
    scope = {"safetensors": safetensors, "hashlib": hashlib, "BytesIO": BytesIO}
    exec(compile(ast.Module(wanted, type_ignores=[]), "train_util", "exec"), scope)
    for num_values in (100, 600_000):
        tensors = {
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.arange(
                num_values, dtype=torch.float32
            ).reshape(4, -1),
            "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0),
        }
        print(f"    {num_values}: {scope[FUNCTIONS[0]](tensors, dict(METADATA))},")


if __name__ == "__main__":
    main()
