"""Fixtures of research, and the marker of its tests."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.research)


@pytest.fixture(scope="session")
def tiny_pocket(tmp_path_factory, _own_cache):
    """A miniature of the pocket model: folder, quality report, last losses of every training."""
    from research.pocket_model.build import TINY, build

    folder = tmp_path_factory.mktemp("pocket") / "tiny"
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    loop_logger = logging.getLogger("research.pocket_model.train_loop")
    loop_logger.addHandler(handler)
    before = loop_logger.level
    loop_logger.setLevel(logging.INFO)
    try:
        card = build(folder, recipe=TINY, show_progress=False)
    finally:
        loop_logger.removeHandler(handler)
        loop_logger.setLevel(before)
    return folder, card, _last_losses(messages)


def _last_losses(messages):
    """Last numbers of every training, by stage: ``{"clip": {"loss": 4.5, ...}}``."""
    found = {}
    for message in messages:
        name, _, numbers = message.partition(": ")
        if numbers.startswith("loss "):
            pairs = (pair.split() for pair in numbers.split(", "))
            found[name] = {key: float(value) for key, value in pairs}
    return found
