"""A block that draws leaves every stream as it was, on devices whose functions differ too."""

import random

import numpy
import pytest
import torch

from mlm_plugin.random_state import preserved_random_state


def draw():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def seed():
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)


@pytest.mark.parametrize("fails", [False, True])
def test_the_streams_of_the_cpu_go_on_as_if_nothing_had_been_drawn(fails):
    seed()
    expected = draw()
    seed()
    with pytest.raises(RuntimeError) if fails else preserved_random_state(torch.device("cpu")):
        with preserved_random_state(torch.device("cpu")):
            draw()
            if fails:
                raise RuntimeError
    assert draw() == expected


@pytest.mark.parametrize("kind", ["mps", "xpu", "cuda"])
def test_the_stream_of_another_device_is_read_and_put_back(kind, monkeypatch):
    """The two functions have the signatures of the real ones: those of MPS take no device."""
    stream, calls = [7], []
    module, device = getattr(torch, kind), torch.device(kind, 0)
    if kind == "mps":
        monkeypatch.setattr(module, "get_rng_state", lambda: stream[0])
        monkeypatch.setattr(module, "set_rng_state", lambda state: stream.__setitem__(0, state))
    else:

        def get_rng_state(where):
            calls.append(where)
            return stream[0]

        def set_rng_state(state, where):
            calls.append(where)
            stream[0] = state

        monkeypatch.setattr(module, "get_rng_state", get_rng_state)
        monkeypatch.setattr(module, "set_rng_state", set_rng_state)
    with preserved_random_state(device):
        stream[0] = 8
    assert stream == [7]
    assert calls == ([] if kind == "mps" else [device, device])
