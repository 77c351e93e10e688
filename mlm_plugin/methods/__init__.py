"""The methods: what is trained when a concept is learned."""

from pkgutil import resolve_name

from mlm_plugin.config.methods import METHOD_CLASSES
from mlm_plugin.methods.base import WEIGHT_DTYPES, Export, Method
from mlm_plugin.methods.facts import STOP_OPTIONS

__all__ = ["METHODS", "STOP_OPTIONS", "WEIGHT_DTYPES", "Export", "Method"]

METHODS: dict[str, type[Method]] = {
    name: resolve_name(place) for name, place in METHOD_CLASSES.items()
}
