"""Captions encoded once are the captions encoded each time."""

import pytest
import torch

from mlm_plugin.models.conditioning import Conditioning
from mlm_plugin.training.caption_cache import CaptionCache


@pytest.mark.parametrize("has_pooled", [False, True])
def test_results_are_those_of_the_encoder_in_the_order_asked_for(has_pooled):
    asked = []

    def encode(captions):
        asked.extend(captions)
        states = torch.stack([torch.full((3, 2), float(len(caption))) for caption in captions])
        return Conditioning(states, states[:, 0] if has_pooled else None)

    cache = CaptionCache(encode, ["a", "", "bcd", "a"], device="cpu", dtype=torch.float16)
    assert sorted(asked) == ["", "a", "bcd"]
    assert len(cache) == 3
    cached = cache(["bcd", "a", "bcd"])
    assert cached.states[:, 0, 0].tolist() == [3, 1, 3]
    assert cached.states.dtype == torch.float16
    assert not cached.states.requires_grad
    assert (cached.pooled is not None) == has_pooled
    assert len(asked) == 3
