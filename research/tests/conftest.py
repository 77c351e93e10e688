"""Fixtures of research, and the marker of its tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.research)


@pytest.fixture(scope="session")
def tiny_pocket(tmp_path_factory, _own_cache):
    """A miniature of the pocket model, hardly trained: folder, quality report, recipe."""
    from research.pocket_model.build import TINY, build

    recipe = shortened(TINY, num_steps=8)
    folder = tmp_path_factory.mktemp("pocket") / "tiny"
    return folder, build(folder, recipe=recipe, show_progress=False), recipe


def shortened(recipe, num_steps):
    """The recipe with fewer steps of every training and a smaller quality report."""
    plans = {
        name: dataclasses.replace(getattr(recipe, name), num_steps=num_steps)
        for name in ("vae", "clip", "oracle", "unet")
    }
    contextualizer = dataclasses.replace(recipe.contextualizer, max_train_steps=num_steps)
    return dataclasses.replace(
        recipe, **plans, contextualizer=contextualizer, oracle_pool=64, unet_pool=64, num_prompts=8
    )
