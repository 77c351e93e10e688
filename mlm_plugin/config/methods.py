"""The methods by name. Does not import torch: a class is imported only when it is needed."""

from __future__ import annotations

__all__ = ["METHOD_CLASSES"]

METHOD_CLASSES = {
    "lora": "mlm_plugin.methods.lora:LoRAMethod",
    "dreambooth": "mlm_plugin.methods.dreambooth:DreamBooth",
    "textual_inversion": "mlm_plugin.methods.textual_inversion:TextualInversion",
    "xti": "mlm_plugin.methods.xti:XTI",
    "custom_diffusion": "mlm_plugin.methods.custom_diffusion:CustomDiffusion",
    "pivotal": "mlm_plugin.methods.pivotal:Pivotal",
}
"""Values of ``method``, and where the classes are; ``methods.METHODS`` has the classes."""
