"""Runs training code on the meta device as it would run on a GPU, in shapes and precisions.

Meta tensors have no values and no kernels of their own, so three things need help: attention (one
fused kernel on a GPU, a square matrix of scores on meta), mixed precision (autocast does not know
meta) and questions about values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = ["CPU_TO_FP32", "CUDA_TO_FP32", "OnMeta"]

TO_HALF = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul "
    "__matmul__ __rmatmul__ mm mv bmm baddbmm addbmm addmm addmv addr einsum prelu chain_matmul "
    "multi_dot scaled_dot_product_attention".split()
)
"""Functions that autocast runs in the lower precision."""

CUDA_TO_FP32 = frozenset(
    "layer_norm group_norm softmax log_softmax cross_entropy nll_loss mse_loss l1_loss huber_loss "
    "smooth_l1_loss kl_div binary_cross_entropy_with_logits cosine_similarity pow __pow__ "
    "__rpow__ exp expm1 log log10 log1p log2 reciprocal rsqrt sinh cosh tan acos asin softplus "
    "cumsum cumprod prod sum norm vector_norm renorm cdist logsumexp".split()
)
"""Functions that autocast runs in fp32 on a GPU.

Source: https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32".
"""

CPU_TO_FP32 = frozenset(
    "mse_loss cosine_embedding_loss nll_loss kl_div binary_cross_entropy smooth_l1_loss "
    "cross_entropy".split()
)
"""The same on a CPU, as far as training here uses them; for comparisons with real runs."""

FUSED_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Keeps for the backward pass what a GPU's kernels keep: inputs, output, one fp32 sum per query."""


class OnMeta(TorchFunctionMode):
    """While it is entered, code on meta tensors runs as on a GPU.

    Args:
        to_fp32: functions that autocast runs in fp32.
    """

    def __init__(self, *, to_fp32: frozenset[str] = CUDA_TO_FP32):
        super().__init__()
        self.to_fp32 = to_fp32
        self._dtype: torch.dtype | None = None
        self._cast_weights: dict[Tensor, Tensor] | None = None

    @contextmanager
    def autocast(self, dtype: torch.dtype | None, *, cache_enabled: bool = True) -> Iterator[None]:
        """Mixed precision in the block, as in ``torch.autocast``.

        Args:
            dtype: the lower precision; ``None`` leaves everything as it is.
            cache_enabled: cast each trained weight once in the block.
        """
        before = self._dtype, self._cast_weights
        self._dtype, self._cast_weights = dtype, {} if cache_enabled else None
        try:
            yield
        finally:
            self._dtype, self._cast_weights = before

    def backward(self, loss: Tensor, dtype: torch.dtype | None) -> None:
        """``loss.backward()`` with mixed precision for what it computes again.

        The method itself, and ``torch.autograd.backward``, would leave this mode until it is done.

        Args:
            loss: 0-d.
            dtype: as for :meth:`autocast`.
        """
        with self.autocast(dtype, cache_enabled=False):  # checkpointed blocks cast for themselves
            torch.autograd.Variable._execution_engine.run_backward(
                (loss,),
                (torch.ones_like(loss),),
                False,  # keep_graph
                False,  # create_graph
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        """Answer a function, or let it run in the precision that autocast would choose."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__bool__" and _on_meta(args[0]):
            return True  # checks of values pass
        if name == "cpu" and _on_meta(args[0]):
            return args[0].detach()  # a copy for the CPU takes nothing on the GPU
        if self._dtype is not None and (name in TO_HALF or name in self.to_fp32):
            dtype = self._dtype if name in TO_HALF else torch.float32
            args, kwargs = tree_map(lambda value: self._cast(value, dtype), (args, kwargs))
        if name == "scaled_dot_product_attention":
            return _attention(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        """A tensor in another precision; a trained weight is cast once and kept, as autocast does.

        Source: PyTorch ``aten/src/ATen/autocast_mode.cpp`` ``cached_cast``.
        """
        is_castable = _on_meta(value) and value.is_floating_point()
        if not is_castable or value.dtype in (dtype, torch.float64):
            return value
        is_weight = value.dtype == torch.float32 and value.requires_grad and value.is_leaf
        if not is_weight or self._cast_weights is None:
            return value.to(dtype)
        if value not in self._cast_weights:
            self._cast_weights[value] = value.to(dtype)
        return self._cast_weights[value]


def _attention(
    func: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """``scaled_dot_product_attention`` by one kernel; what it skips takes no memory there."""
    if not _on_meta(query):
        return func(query, key, value, attn_mask, *args, **kwargs)
    return FUSED_ATTENTION(query, key, value, attn_mask=attn_mask)[0]


def _on_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta
