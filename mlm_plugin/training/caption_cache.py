"""Captions encoded once, before the training, so that the text encoders can leave the GPU.

Knows neither encoders nor data sets: it gets an encoding function and all captions of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from mlm_plugin.models.conditioning import Conditioning

__all__ = ["CaptionCache"]


class CaptionCache:
    """Returns what the encoder would return, from memory.

    Args:
        encode: captions to conditioning; called here only.
        captions: all captions of the run.
        device: where results are needed; the cache itself is on the CPU.
        dtype: precision of the cache.
    """

    @torch.no_grad()
    def __init__(
        self,
        encode: Callable[[Sequence[str]], Conditioning],
        captions: Iterable[str],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.device = device
        self._kept = {
            caption: encode([caption]).to(dtype).to("cpu") for caption in dict.fromkeys(captions)
        }

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """Conditioning of captions that were encoded, in this order."""
        found = [self._kept[caption] for caption in captions]
        states = torch.cat([one.states for one in found])
        pooled = None if found[0].pooled is None else torch.cat([one.pooled for one in found])
        return Conditioning(states, pooled).to(self.device, non_blocking=True)
