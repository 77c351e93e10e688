"""What processes exchange: every gradient once, in messages of about one size."""

import itertools

import torch

from mlm_plugin.training import processes
from mlm_plugin.training.processes import _buckets


def test_buckets_hold_every_tensor_once_by_precision_and_size(monkeypatch):
    monkeypatch.setattr(processes, "BUCKET", 100)
    sizes = [(10, torch.float32), (10, torch.bfloat16), (10, torch.float32), (50, torch.float32)]
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in sizes]
    buckets = list(_buckets(parameters))
    assert [[p.nbytes for p in bucket] for bucket in buckets] == [[20], [40, 40], [200]]
    assert sorted(map(id, itertools.chain(*buckets))) == sorted(map(id, parameters))
