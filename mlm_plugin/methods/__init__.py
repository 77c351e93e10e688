"""The methods: what is trained when a concept is learned."""

from mlm_plugin.methods.base import WEIGHT_DTYPES, Export, Method
from mlm_plugin.methods.custom_diffusion import CustomDiffusion
from mlm_plugin.methods.dreambooth import DreamBooth
from mlm_plugin.methods.lora import LoRAMethod
from mlm_plugin.methods.pivotal import Pivotal
from mlm_plugin.methods.textual_inversion import TextualInversion
from mlm_plugin.methods.xti import XTI

__all__ = ["METHODS", "WEIGHT_DTYPES", "Export", "LoRAMethod", "Method"]

METHODS: dict[str, type[Method]] = {
    "lora": LoRAMethod,
    "dreambooth": DreamBooth,
    "textual_inversion": TextualInversion,
    "xti": XTI,
    "custom_diffusion": CustomDiffusion,
    "pivotal": Pivotal,
}
