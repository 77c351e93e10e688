"""Runs training code on the meta device as it would run on a GPU, in shapes and precisions.

Meta tensors have no values and no kernels of their own, so three things need help: attention (one
fused kernel on a GPU, a square of scores on meta), mixed precision (autocast does not know meta)
and questions about values.
Shapes: B batch, H heads, L queries, S keys, D width of a head.
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
"""The same on a CPU, as far as training here has them; for comparisons with real runs."""


class OnMeta(TorchFunctionMode):
    """While it is entered, code on meta tensors runs as on a GPU.

    Args:
        to_fp32: functions that autocast runs in fp32.
    """

    def __init__(self, *, to_fp32: frozenset[str] = CUDA_TO_FP32):
        super().__init__()
        self.to_fp32 = to_fp32
        self._dtype: torch.dtype | None = None
        self._cast_weights: dict[int, tuple[Tensor, Tensor]] | None = None

    @contextmanager
    def autocast(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Mixed precision in the block; weights that are trained are cast once in it.

        Args:
            dtype: the lower precision; ``None`` leaves everything as it is.
        """
        with self._casting(dtype, {}):
            yield

    def backward(self, loss: Tensor, dtype: torch.dtype | None) -> None:
        """``loss.backward()`` with mixed precision for what it computes again.

        The method itself would leave this mode until it is done. Each block casts for itself.

        Args:
            loss: 0-d.
            dtype: as for :meth:`autocast`.
        """
        with self._casting(dtype, None):
            torch.autograd.Variable._execution_engine.run_backward(
                (loss,),
                (torch.ones_like(loss),),
                False,  # keep_graph
                False,  # create_graph
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    @contextmanager
    def _casting(self, dtype: torch.dtype | None, weights: dict | None) -> Iterator[None]:
        before = self._dtype, self._cast_weights
        self._dtype, self._cast_weights = dtype, weights
        try:
            yield
        finally:
            self._dtype, self._cast_weights = before

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        """Answer a function, or let it run in the precision that autocast would choose."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ANSWERS and _on_meta(args[0]):
            return _ANSWERS[name](self, func, *args, **kwargs)
        if self._dtype is not None and name in TO_HALF:
            args, kwargs = tree_map(lambda value: self._cast(value, self._dtype), (args, kwargs))
        elif self._dtype is not None and name in self.to_fp32:
            args, kwargs = tree_map(lambda value: self._cast(value, torch.float32), (args, kwargs))
        if name == "scaled_dot_product_attention":
            inputs = _attention_inputs(*args, **kwargs)
            if _on_meta(inputs[0]):
                return _FusedAttention.apply(*inputs)
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        """A tensor in another precision; a trained weight is cast once and kept, as autocast does.

        Source: PyTorch ``aten/src/ATen/autocast_mode.cpp`` ``cached_cast``.
        """
        if not _castable(value) or value.dtype == dtype:
            return value
        is_weight = value.dtype == torch.float32 and value.requires_grad and value.is_leaf
        if not is_weight or self._cast_weights is None:
            return value.to(dtype)
        if id(value) not in self._cast_weights:
            self._cast_weights[id(value)] = value, value.to(dtype)
        return self._cast_weights[id(value)][1]


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps for the backward pass: its inputs, its output, one sum per row."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """``(B, H, L, D)`` from queries of that shape and keys and values ``(B, H, S, D)``."""
        output = torch.empty_like(query)  # in the order of the queries, as the kernels have it
        sums_BHL = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums_BHL, mask)
        return output

    @staticmethod
    def backward(ctx, _gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


def _attention_inputs(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor | None, ...]:
    """What the kernel reads, of all arguments of ``scaled_dot_product_attention``."""
    return query, key, value, attn_mask


def _castable(value: Any) -> bool:
    return _on_meta(value) and value.is_floating_point() and value.dtype != torch.float64


def _on_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _is_true(_mode: OnMeta, _func: Callable, _tensor: Tensor) -> bool:
    """Values are as they should be: checks of them pass."""
    return True


def _stay(_mode: OnMeta, _func: Callable, tensor: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """A copy for the CPU is not on the GPU and has no values to bring there."""
    return tensor.detach()


_ANSWERS: dict[str, Callable] = {"__bool__": _is_true, "cpu": _stay}
