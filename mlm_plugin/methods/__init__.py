"""The methods: what is trained when a concept is learned."""

from mlm_plugin.methods.base import Method
from mlm_plugin.methods.lora import LoRAMethod

__all__ = ["METHODS", "LoRAMethod", "Method"]

METHODS = {"lora": LoRAMethod}
