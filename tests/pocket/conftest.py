"""One miniature of the pocket model for all tests that need one."""

import logging

import pytest

from mlm_plugin.pocket.build import TINY, build


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A miniature: its folder, its quality card and the last losses of every stage."""
    folder = tmp_path_factory.mktemp("pocket") / "tiny"
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    stage_logger = logging.getLogger("mlm_plugin.pocket.stage")
    stage_logger.addHandler(handler)
    before = stage_logger.level
    stage_logger.setLevel(logging.INFO)
    try:
        card = build(folder, recipe=TINY, show_progress=False)
    finally:
        stage_logger.removeHandler(handler)
        stage_logger.setLevel(before)
    return folder, card, _losses(messages)


def _losses(messages):
    """Last numbers of every stage, by stage: ``{"clip": {"loss": 4.5, ...}}``."""
    found = {}
    for message in messages:
        name, _, numbers = message.partition(": ")
        if numbers.startswith("loss "):
            pairs = (pair.split() for pair in numbers.split(", "))
            found[name] = {key: float(value) for key, value in pairs}
    return found
