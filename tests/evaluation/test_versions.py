"""What a report says of the machine."""

import pytest
import torch

from mlm_plugin import __version__
from mlm_plugin.evaluation.versions import library_versions


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu"])
def test_the_device_of_the_run_is_named(kind):
    found = library_versions(torch.device(kind))
    assert found["device"] == kind
    assert found["mlm_plugin"] == __version__


def test_a_gpu_is_named_by_its_model(monkeypatch):
    names = {0: "first", 1: "second"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: names[device.index])
    assert library_versions(torch.device("cuda", 1))["device"] == "second"


def test_packages_that_are_missing_are_left_out():
    found = library_versions(torch.device("cpu"), also=("no-such-package", "pytest"))
    assert "no-such-package" not in found
    assert found["pytest"] == pytest.__version__
