"""What a run says before it begins, where nothing is wrong but something is probably not meant."""

import pytest

from mlm_plugin.config.datasets import DatasetConfig, SubsetConfig
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.setup.accelerator import create_accelerator
from mlm_plugin.setup.data import find_concepts


def named(class_tokens):
    subsets = (SubsetConfig(class_tokens=class_tokens),)
    return [DatasetConfig(batch_size=1, resolution=(64, 64), subsets=subsets)]


@pytest.mark.parametrize("class_tokens", ["cat dog", "photo dog", "the dog", "Woman person"])
def test_a_placeholder_that_is_an_ordinary_word_is_named(caplog, class_tokens):
    find_concepts(TrainConfig(), named(class_tokens))
    assert "is an ordinary word" in caplog.text
    assert repr(class_tokens.split()[0]) in caplog.text


@pytest.mark.parametrize("class_tokens", ["sks dog", "zwx style", "ohwx woman"])
def test_a_rare_word_is_not(caplog, class_tokens):
    find_concepts(TrainConfig(), named(class_tokens))
    assert "ordinary" not in caplog.text


@pytest.mark.usefixtures("_fresh_accelerator")
@pytest.mark.parametrize(
    ("launched", "chosen", "is_named"),
    [("fp16", "no", True), ("bf16", "no", True), ("bf16", "bf16", False), ("no", "bf16", False)],
)
def test_a_precision_of_the_launcher_that_is_not_read_is_named(
    monkeypatch, caplog, launched, chosen, is_named
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator = create_accelerator(TrainConfig().replace(mixed_precision=chosen))
    assert accelerator.mixed_precision == chosen
    assert ("is not read" in caplog.text) is is_named
