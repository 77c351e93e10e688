"""How many bytes of tensors live at once while code runs, and what they belong to at the peak.

Counts storages from the call that makes them until the last tensor on them is gone, as a caching
allocator would, on real devices and on meta, where nothing is allocated. What a kernel needs
besides its outputs is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "storage_bytes"]


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered; may be entered again.

    Args:
        device: only tensors there are counted.

    Attributes:
        label: what new tensors are counted under.
        live: bytes that live now, by label.
        at_peak: the same at the moment when their sum was highest.
        peak: that sum.
    """

    def __init__(self, device: torch.device | str = "meta"):
        super().__init__()
        self.device = torch.device(device)
        self.label = ""
        self.live: Counter[str] = Counter()
        self._total = 0
        self._known: dict[int, tuple[str, int]] = {}  # by address of the storage
        self.reset_peak()

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.at_peak = self._total, Counter(self.live)

    def hold(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count tensors that exist already; those that are counted move to ``label``."""
        for tensor in tensors:
            if tensor.device.type == self.device.type:
                self._count(tensor.untyped_storage(), label)

    def hold_gradients(self, parameters: Iterable[nn.Parameter], label: str) -> None:
        """From now on, move each gradient to ``label`` once it is complete."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: self.hold([p.grad], label))

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Count new tensors under ``label`` in the block."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        """Run the operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device.type:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._count(storage, self.label)
        return result

    def _count(self, storage: torch.UntypedStorage, label: str) -> None:
        address, nbytes = storage._cdata, storage.nbytes()
        if address in self._known:
            old, nbytes = self._known[address]
            self.live[old] -= nbytes
        else:
            self._total += nbytes
            weakref.finalize(storage, self._release, address)
        self._known[address] = label, nbytes
        self.live[label] += nbytes
        if self._total > self.peak:
            self.reset_peak()

    def _release(self, address: int) -> None:
        label, nbytes = self._known.pop(address)
        self.live[label] -= nbytes
        self._total -= nbytes


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
