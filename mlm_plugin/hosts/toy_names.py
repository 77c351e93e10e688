"""``toy`` in place of a model or data folder: the built-in ones, made on first use."""

from __future__ import annotations

from pathlib import Path

__all__ = ["data_path", "model_path"]

TOY = "toy"


def model_path(name: str | None) -> str | None:
    """``toy`` becomes the folder of the built-in model, unless a folder has that name."""
    if name != TOY or Path(name).exists():
        return name
    from mlm_plugin.toy import toy_model

    return str(toy_model())


def data_path(name: str | None) -> str | None:
    """``toy`` becomes the folder of the built-in pictures, unless a folder has that name."""
    if name != TOY or Path(name).exists():
        return name
    from mlm_plugin.toy import toy_data

    return str(toy_data())
