"""Facts about a method before anything is loaded: its parts, its options, whether the term acts.

A method states most of this as class attributes; the rest follows from them. Knows options only,
no models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from mlm_plugin.config.checks import Rule
from mlm_plugin.config.options import OptimizerOptions, TrainConfig
from mlm_plugin.networks.kohya_names import TEXT_ENCODER_PARTS

__all__ = [
    "STOP_OPTIONS",
    "TEXT_ENCODERS",
    "LearningRate",
    "MethodFacts",
    "Part",
    "is_before",
    "why_untrained",
]

Part = str
"""What is frozen together: ``unet``, ``textencoder`` (kohya's names), ``textencoder1`` and
``textencoder2`` of SDXL, or ``embedding``."""

TEXT_ENCODERS: tuple[Part, ...] = ("textencoder", "textencoder1", "textencoder2")

STOP_OPTIONS: dict[Part, tuple[str, ...]] = {
    "unet": ("stop_unet_training",),
    "textencoder": ("stop_text_encoder_training",),
    "textencoder1": ("stop_text_encoder1_training", "stop_text_encoder_training"),
    "textencoder2": ("stop_text_encoder2_training", "stop_text_encoder_training"),
    "embedding": ("stop_embedding_training",),
}
"""The options that stop the training of a part; the first that is given counts."""


class LearningRate(NamedTuple):
    """The learning rate of a part, and the option that sets it."""

    option: str
    value: float


class MethodFacts:
    """The facts of a method. The defaults hold for most of them.

    Attributes:
        rate_options: the parts that the method trains. Each has the options that set its learning
            rate: the first that is given counts, and ``learning_rate`` where none is.
        own_options: options that are read besides the rates and the stops of these parts. Those of
            other methods have no effect and cause a warning.
        own_state_options: the own options that a training state depends on.
        rules: when options of the method have no effect.
        supports_sdxl: a model may have two text encoders.
        supports_fused_backward: ``fused_backward_pass`` is worth it.
        trains_base_weights: weights of the U-Net itself are trained. Then the model is loaded in
            fp32, and ``quantize_unet`` is refused.
        trains_network: a network is trained on top of the model.
        learns_tokens: the placeholders get token embeddings of their own, so the run must know
            the concepts.
    """

    rate_options: ClassVar[Mapping[Part, tuple[str, ...]]]
    own_options: ClassVar[tuple[str, ...]] = ()
    own_state_options: ClassVar[tuple[str, ...]] = ()
    rules: ClassVar[tuple[Rule, ...]] = ()
    supports_sdxl: ClassVar[bool] = True
    supports_fused_backward: ClassVar[bool] = False
    trains_base_weights: ClassVar[bool] = False
    trains_network: ClassVar[bool] = False
    learns_tokens: ClassVar[bool] = False

    @classmethod
    def options_read(cls) -> set[str]:
        """Options that this method reads and others may not."""
        return {*cls.own_options, *cls._options_of_parts()}

    @classmethod
    def state_options(cls) -> set[str]:
        """Options that must be the same when a run of this method is resumed."""
        return {*cls.own_state_options, *cls._options_of_parts()}

    @classmethod
    def learning_rate_of(cls, part: Part, options: OptimizerOptions) -> LearningRate:
        """The learning rate of a part."""
        for option in cls.rate_options[part]:
            value = _value_for(part, getattr(options, option))
            if value is not None:
                return LearningRate(option, value)
        return LearningRate("learning_rate", options.learning_rate)

    @classmethod
    def learning_rates(
        cls, config: TrainConfig, *, num_text_encoders: int = 2
    ) -> dict[Part, LearningRate]:
        """The learning rate of every part that the options may train.

        Args:
            config: all options.
            num_text_encoders: those of the model; 2 if unknown.
        """
        others = set(TEXT_ENCODERS).difference(TEXT_ENCODER_PARTS[num_text_encoders])
        parts = [part for part in cls.rate_options if part not in others]
        return {part: cls.learning_rate_of(part, config.optimizer) for part in parts}

    @classmethod
    def mlm_read_at(cls, config: TrainConfig, *, num_text_encoders: int = 2) -> str:
        """Where the MLM term reads: ``mlm_read_at`` with ``auto`` decided.

        States are read wherever something is trained, predictions at the encoder if they can be.

        Args:
            config: all options.
            num_text_encoders: those of the model; 2 if unknown.
        """
        if config.mlm.mlm_read_at != "auto":
            return config.mlm.mlm_read_at
        if cls.why_text_untrained(config, num_text_encoders=num_text_encoders) is not None:
            return "cross_attention"
        if config.mlm.mlm_target == "states" and cls.why_unet_untrained(config) is None:
            return "both"
        return "encoder"

    @classmethod
    def why_no_gradient(cls, config: TrainConfig, *, num_text_encoders: int = 2) -> str | None:
        """Why the MLM term has no gradient, naming the options; None if it has one.

        This is the only place that decides from options whether the term acts. During training,
        :meth:`Method.trains_before` says whether it still does.

        Args:
            config: all options.
            num_text_encoders: those of the model; 2 if unknown.
        """
        of_text = cls.why_text_untrained(config, num_text_encoders=num_text_encoders)
        read_at = cls.mlm_read_at(config, num_text_encoders=num_text_encoders)
        if of_text is None or read_at == "encoder":
            return of_text
        of_unet = cls.why_unet_untrained(config)
        if of_unet is not None:
            return of_text if of_unet == of_text else f"{of_text}, and {of_unet}"
        return of_text if read_at == "both" else None

    @classmethod
    def why_text_untrained(cls, config: TrainConfig, *, num_text_encoders: int = 2) -> str | None:
        """Why nothing before the text encoder's output is trained, naming the options.

        Args:
            config: all options.
            num_text_encoders: those of the model; 2 if unknown.
        """
        rates = cls.learning_rates(config, num_text_encoders=num_text_encoders)
        of_text = [rate for part, rate in rates.items() if part in TEXT_ENCODERS]
        if not of_text:
            return f"method = {config.schedule.method!r} trains no text encoder"
        return why_untrained(of_text, "the text encoder")

    @classmethod
    def why_unet_untrained(cls, config: TrainConfig) -> str | None:
        """Why the U-Net's keys and values are not trained, naming the options."""
        rate = cls.learning_rates(config).get("unet")
        if rate is None:
            return f"method = {config.schedule.method!r} trains no U-Net"
        return why_untrained([rate], "the U-Net")

    @classmethod
    def trained_text_encoders(cls, config: TrainConfig, *, num_text_encoders: int) -> list[bool]:
        """For each text encoder of the model, whether anything is trained before its output."""
        if cls.why_text_untrained(config, num_text_encoders=num_text_encoders):
            return [False] * num_text_encoders
        rates = cls.learning_rates(config, num_text_encoders=num_text_encoders)
        trained = {part for part, rate in rates.items() if rate.value}
        text_parts = TEXT_ENCODER_PARTS[num_text_encoders]
        return ["embedding" in trained or part in trained for part in text_parts]

    @classmethod
    def _options_of_parts(cls) -> set[str]:
        options = [*cls.rate_options.values(), *(STOP_OPTIONS[part] for part in cls.rate_options)]
        return {name for names in options for name in names}


def is_before(part: Part, read_at: str) -> bool:
    """Whether training a part can change what the MLM term reads at this place."""
    return part != "unet" or read_at != "encoder"


def why_untrained(rates: Iterable[LearningRate], what: str) -> str | None:
    """Names the options that leave something untrained; None where a rate is not 0."""
    rates = list(rates)
    if any(rate.value for rate in rates):
        return None
    options = dict.fromkeys(rate.option for rate in rates)
    return f"{' = 0 and '.join(options)} = 0 leaves {what} untrained"


def _value_for(part: Part, value: Any) -> float | None:
    """The value for a part; the last one of a tuple is used for every further text encoder.

    Source: sd-scripts networks/lora.py prepare_optimizer_params_with_multiple_te_lrs.
    """
    if not isinstance(value, tuple):
        return value
    number = int(part == "textencoder2")
    return value[min(number, len(value) - 1)] if value else None
