"""Which options contradict each other, independent of the method and from the options alone.

Rules that depend on the method are in ``methods.checks``, those of one optimizer (Adafactor,
Prodigy) with the optimizers, those about subsets in ``datasets``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from mlm_plugin.config.options import OPTIONS, MLMOptions, TrainConfig

__all__ = [
    "Rule",
    "mlm_range_errors",
    "mlm_warnings",
    "no_gradient_message",
    "option_errors",
    "option_warnings",
    "without_effect",
]

NUM_TRAIN_TIMESTEPS = 1000
MAX_SEED = 2**32 - 1  # the largest seed of numpy


def option_errors(config: TrainConfig) -> Iterator[str]:
    """Options that contradict each other, the most basic first.

    Source: sd-scripts library/train_util.py verify_training_args, get_scheduler_fix.
    """
    for check in _CHECKS:
        yield from check(config)


def option_warnings(config: TrainConfig) -> Iterator[str]:
    """Settings without effect, and questionable ones."""
    yield from without_effect(config, _RULES)
    if config.loss.zero_terminal_snr and not config.model.v_parameterization:
        yield (
            "zero_terminal_snr is meant for v_parameterization: at SNR 0 the noise is the input "
            "itself"
        )
    every = config.output.save_every_n_steps
    for name in ("save_last_n_steps", "save_last_n_steps_state"):
        if every and 0 < (getattr(config.output, name) or 0) < every:
            yield (
                f"{name} = {getattr(config.output, name)} is below save_every_n_steps = {every}: "
                "it counts steps, not files, so only the newest is kept"
            )
    if config.model.v2 and config.model.clip_skip is not None:
        yield "clip_skip with v2: Stable Diffusion 2 leaves out its last layer already"


class Rule(NamedTuple):
    """Options that are only read if ``is_read`` is true for the flat options."""

    options: tuple[str, ...]
    otherwise: str  # ends "has no effect ..."; {name} is the value of an option
    is_read: Callable[[Mapping[str, Any]], Any]


def without_effect(config: TrainConfig, rules: Iterable[Rule]) -> Iterator[str]:
    """Options that were changed but are not read with the others; one line per reason."""
    flat, changed = config.to_flat(), config.changed()
    for rule in rules:
        names = [name for name in rule.options if name in changed]
        if names and not rule.is_read(flat):
            verb = "has" if len(names) == 1 else "have"
            yield f"{', '.join(names)} {verb} no effect {rule.otherwise.format_map(flat)}"


def _required(config: TrainConfig) -> Iterator[str]:
    if config.run.output_config:
        return
    if config.model.pretrained_model_name_or_path is None:
        yield "pretrained_model_name_or_path is missing: give the base model (folder, hub id, file)"
    ends_early = config.run.check or config.dataset.debug_dataset
    if config.output.output_dir is None and not ends_early:
        yield "output_dir is missing: give the folder for the trained files"


def _network(config: TrainConfig) -> Iterator[str]:
    network = config.network
    if network.network_train_unet_only and network.network_train_text_encoder_only:
        yield (
            "network_train_unet_only and network_train_text_encoder_only leave nothing to train; "
            "keep one"
        )
    if network.dim_from_weights and network.network_weights is None:
        yield "dim_from_weights needs network_weights, the file to take the dims from"
    if network.network_dropout is not None and not 0 <= network.network_dropout < 1:
        yield f"network_dropout = {network.network_dropout:g}: must be from 0 to below 1"
    for argument in network.network_args:
        if "=" not in argument:
            yield f"network_args {argument!r}: must be key=value"


def _learning(config: TrainConfig) -> Iterator[str]:
    schedule = config.schedule
    if len(config.optimizer.text_encoder_lr or ()) > 2:
        values = ", ".join(f"{value:g}" for value in config.optimizer.text_encoder_lr)
        yield f"text_encoder_lr = {values}: no model here has more than two text encoders"
    if schedule.seed is not None and not 0 <= schedule.seed <= MAX_SEED:
        yield f"seed = {schedule.seed}: must be from 0 to {MAX_SEED}"
    yield from _warmup(config)
    for name, flag, precision in (
        ("full_fp16", schedule.full_fp16, "fp16"),
        ("full_bf16", schedule.full_bf16, "bf16"),
    ):
        if flag and schedule.mixed_precision != precision:
            yield f"{name} needs mixed_precision = {precision!r}, not {schedule.mixed_precision!r}"


def _embedding(config: TrainConfig) -> Iterator[str]:
    embedding = config.embedding
    if embedding.weights and embedding.init_word:
        yield "weights and init_word both set the initial embeddings; keep one"


def _finetune(config: TrainConfig) -> Iterator[str]:
    finetune, data = config.finetune, config.dataset
    if finetune.generate_class_images and data.dataset_config is not None:
        yield (
            "generate_class_images fills reg_data_dir, which dataset_config replaces; give "
            "train_data_dir, or name a folder of images with is_reg = true in the dataset_config"
        )


def _warmup(config: TrainConfig) -> Iterator[str]:
    optimizer, schedule = config.optimizer, config.schedule
    kind = optimizer.optimizer_type.lower()
    if optimizer.lr_scheduler_type.rpartition(".")[2] == "ReduceLROnPlateau":
        yield (
            f"lr_scheduler_type = {optimizer.lr_scheduler_type!r} needs a validation loss at every "
            "step, and schedules are stepped without one; use lr_scheduler = 'cosine'"
        )
    if optimizer.lr_warmup_steps == 0 or "schedulefree" in kind:
        return
    if schedule.max_train_epochs is None and optimizer.lr_warmup_steps > schedule.max_train_steps:
        yield (
            f"lr_warmup_steps = {optimizer.lr_warmup_steps:g} is longer than the run "
            f"(max_train_steps = {schedule.max_train_steps}); shorten it or give a ratio like 10%"
        )
    if kind == "adafactor":
        return
    if optimizer.lr_scheduler_type:
        yield (
            f"lr_scheduler_type = {optimizer.lr_scheduler_type!r} takes no warm-up; "
            "set lr_warmup_steps = 0"
        )
    elif optimizer.lr_scheduler.lower() == "constant":
        yield (
            f"lr_scheduler = 'constant' with lr_warmup_steps = {optimizer.lr_warmup_steps:g}: "
            "use lr_scheduler = 'constant_with_warmup' or lr_warmup_steps = 0"
        )


def _fused(config: TrainConfig) -> Iterator[str]:
    schedule = config.schedule
    if not config.optimizer.fused_backward_pass:
        return
    if schedule.gradient_accumulation_steps > 1:
        yield (
            f"fused_backward_pass cannot be combined with gradient_accumulation_steps = "
            f"{schedule.gradient_accumulation_steps}: no gradient is kept to be added to; set it "
            "to 1"
        )
    if schedule.mixed_precision == "fp16":
        yield (
            "fused_backward_pass cannot be combined with mixed_precision = 'fp16', which needs all "
            "gradients before it steps; use 'bf16'"
        )


def _loss(config: TrainConfig) -> Iterator[str]:
    loss, is_v = config.loss, config.model.v_parameterization
    if loss.adaptive_noise_scale is not None and loss.noise_offset is None:
        yield "adaptive_noise_scale needs noise_offset, to which it adds"
    if loss.scale_v_pred_loss_like_noise_pred and not is_v:
        yield "scale_v_pred_loss_like_noise_pred needs v_parameterization"
    if loss.v_pred_like_loss and is_v:
        yield (
            "v_pred_like_loss cannot be combined with v_parameterization, whose loss is already a "
            "v loss"
        )
    low = 0 if loss.min_timestep is None else loss.min_timestep
    high = NUM_TRAIN_TIMESTEPS if loss.max_timestep is None else loss.max_timestep
    if low > high:
        yield f"min_timestep = {low} is above max_timestep = {high}"
    if high > NUM_TRAIN_TIMESTEPS or low >= NUM_TRAIN_TIMESTEPS:
        yield f"min_timestep = {low}, max_timestep = {high}: there are {NUM_TRAIN_TIMESTEPS} steps"


def _data(config: TrainConfig) -> Iterator[str]:
    data = config.dataset
    if data.cache_latents or data.cache_latents_to_disk:
        for name in ("color_aug", "random_crop", "scale_aug"):
            if getattr(data, name):
                yield (
                    f"cache_latents cannot be combined with {name}, which changes images at every "
                    "use"
                )
    for name in ("caption_dropout_rate", "caption_tag_dropout_rate"):
        if getattr(data, name) > 1:
            yield f"{name} = {getattr(data, name):g}: a probability must be from 0 to 1"
    if config.validation.validation_split >= 1:
        yield (
            f"validation_split = {config.validation.validation_split:g}: must be from 0 to below "
            "1, as what is held out is not trained on"
        )
    if data.use_object_template and data.use_style_template:
        yield "use_object_template and use_style_template exclude each other; keep one"
    if data.conditioning_data_dir is not None and not data.masked_loss:
        yield "conditioning_data_dir holds masks for masked_loss; add masked_loss or leave it out"


def _output(config: TrainConfig) -> Iterator[str]:
    if config.output.save_model_as != "safetensors":
        yield (
            f"save_model_as = {config.output.save_model_as!r} is not supported (pickle files can "
            "run code); use safetensors"
        )
    if config.output.output_name is not None and set(config.output.output_name) & set("/\\"):
        yield f"output_name = {config.output.output_name!r} holds a slash; put it into output_dir"
    if config.logging.log_with in ("tensorboard", "all") and config.logging.logging_dir is None:
        yield f"log_with = {config.logging.log_with!r} needs logging_dir"
    sampling = config.sampling
    if sampling.sample_prompts is None:
        for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"):
            if getattr(sampling, name):
                yield f"{name} needs sample_prompts, the file with the prompts to draw"


def mlm_warnings(mlm: MLMOptions) -> Iterator[str]:
    """``mlm`` options without effect beside the others, for any trainer."""
    yield from without_effect(TrainConfig(mlm=mlm), _MLM_RULES)


def mlm_range_errors(mlm: MLMOptions, *, num_steps: int | None) -> Iterator[str]:
    """``mlm`` options that are out of range, for any trainer.

    Args:
        mlm: the options.
        num_steps: length of the run; ``None`` if it follows from epochs.
    """
    if not 0 < mlm.mlm_probability <= 1:
        yield f"mlm_probability = {mlm.mlm_probability:g}: must be above 0 and at most 1"
    if mlm.mlm_end_step is not None and mlm.mlm_end_step <= mlm.mlm_start_step:
        yield (
            f"mlm_end_step = {mlm.mlm_end_step} must be above mlm_start_step = {mlm.mlm_start_step}"
        )
    if not 0 <= mlm.mlm_joint_share <= 1:
        yield f"mlm_joint_share = {mlm.mlm_joint_share:g}: must be from 0 to 1"
    if mlm.mlm_loss_weight and num_steps is not None and mlm.mlm_start_step >= num_steps:
        yield (
            f"mlm_start_step = {mlm.mlm_start_step} is after the end of the run "
            f"(max_train_steps = {num_steps})"
        )


def no_gradient_message(mlm: MLMOptions, reason: str, *, elsewhere: bool = False) -> str:
    """The error for a run in which the MLM term would change nothing, for any trainer.

    Args:
        mlm: the options.
        reason: why.
        elsewhere: whether ``mlm_read_at = cross_attention`` may help.
    """
    place = " at the text encoder" if mlm.mlm_read_at == "both" else ""
    advice = ""
    if elsewhere and mlm.mlm_read_at in ("encoder", "both"):
        advice = ", take mlm_read_at = cross_attention if the U-Net is trained"
    return (
        f"mlm_loss_weight = {mlm.mlm_loss_weight:g} asks for the MLM term, but {reason}, so it "
        f"would change nothing{place}; train something that it reads{advice}, or set "
        "mlm_loss_weight = 0"
    )


def _mlm(config: TrainConfig) -> Iterator[str]:
    schedule = config.schedule
    by_steps = schedule.max_train_epochs is None
    num_steps = schedule.max_train_steps if by_steps else None
    yield from mlm_range_errors(config.mlm, num_steps=num_steps)


_CHECKS = (
    _required,
    _network,
    _embedding,
    _finetune,
    _learning,
    _fused,
    _loss,
    _data,
    _output,
    _mlm,
)


def _without(options: str, *partners: str) -> Rule:
    """``options`` (names separated by spaces) are read if one of ``partners`` is on."""
    return Rule(
        tuple(options.split()),
        f"without {' or '.join(partners)}",
        lambda flat: any(flat[partner] for partner in partners),
    )


def _with_scheduler(name: str, *schedulers: str) -> Rule:
    """Option ``name`` is only read by these of kohya's schedulers."""
    return Rule(
        (name,),
        f"without lr_scheduler = {' or '.join(schedulers)}",
        lambda flat: not flat["lr_scheduler_type"] and flat["lr_scheduler"] in schedulers,
    )


def _reads_syntax(flat: Mapping[str, Any]) -> bool:
    """Whether the prompt set has several syntaxes; at weight 0 another rule applies."""
    prompt_set = flat["mlm_prompt_set"]
    return not flat["mlm_loss_weight"] or not (
        prompt_set in ("captions", "illustration") or prompt_set.endswith(".txt")
    )


_MLM_PROMPTS = ("mlm_prompt_set", "mlm_prompt_syntax", "mlm_joint_share")
_MLM_DETAILS = tuple(
    name
    for name, entry in OPTIONS.items()
    if entry.group == "mlm" and name.startswith("mlm_")
    if name not in ("mlm_loss_weight", *_MLM_PROMPTS)
)

_MLM_RULES = (
    _without(" ".join(_MLM_DETAILS), "mlm_loss_weight"),
    # A file is scored with the same prompts.
    _without(
        " ".join(_MLM_PROMPTS), "mlm_loss_weight", "mlm_page", "mlm_keep_best", "mlm_stop_below"
    ),
    Rule(
        ("mlm_contextualizer", "mlm_probability", "mlm_replace"),
        "with mlm_target = states; take mlm_target = class to predict masked words",
        lambda flat: flat["mlm_target"] != "states" or not flat["mlm_loss_weight"],
    ),
    Rule(("mlm_prompt_syntax",), "with mlm_prompt_set = {mlm_prompt_set}", _reads_syntax),
)

_RULES = (
    _without("class_prompt", "generate_class_images"),
    _without("xti_mlm_layers", "mlm_loss_weight"),
    _without("directional_kappa", "directional_embedding"),
    _without("noise_offset_random_strength", "noise_offset"),
    _without("ip_noise_gamma_random_strength", "ip_noise_gamma"),
    _without("multires_noise_discount", "multires_noise_iterations"),
    Rule(
        ("huber_schedule", "huber_c", "huber_scale"),
        "with loss_type = {loss_type}",
        lambda flat: flat["loss_type"] not in ("l1", "l2"),
    ),
    _with_scheduler("lr_scheduler_power", "polynomial"),
    _with_scheduler("lr_scheduler_timescale", "inverse_sqrt"),
    _with_scheduler("lr_decay_steps", "warmup_stable_decay"),
    _with_scheduler("lr_scheduler_min_lr_ratio", "cosine_with_min_lr", "warmup_stable_decay"),
    _with_scheduler(
        "lr_scheduler_num_cycles",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ),
    Rule(
        ("lr_scheduler",),
        "with lr_scheduler_type = {lr_scheduler_type}",
        lambda flat: not flat["lr_scheduler_type"],
    ),
    Rule(
        ("unet_lr",),
        "with network_train_text_encoder_only",
        lambda flat: not flat["network_train_text_encoder_only"] or not flat["unet_lr"],
    ),
    # A rate of 0 has the same effect as the switch.
    Rule(
        ("text_encoder_lr",),
        "with network_train_unet_only",
        lambda flat: not flat["network_train_unet_only"] or not any(flat["text_encoder_lr"]),
    ),
    Rule(
        ("dynamo_backend",),
        "without torch_compile",
        lambda flat: flat["torch_compile"] or flat["dynamo_backend"] == "no",
    ),
    _without("persistent_data_loader_workers", "max_data_loader_n_workers"),
    _without("vae_batch_size", "cache_latents", "cache_latents_to_disk"),
    _without("skip_cache_check", "cache_latents_to_disk"),
    # A dataset_config may turn buckets on, or hold the regularization images.
    _without(
        "min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale",
        "enable_bucket",
        "dataset_config",
    ),
    Rule(
        ("min_bucket_reso", "max_bucket_reso"),
        "with bucket_no_upscale, which makes buckets of the pictures' own sizes",
        lambda flat: not (flat["enable_bucket"] and flat["bucket_no_upscale"]),
    ),
    _without("dataset_repeats", "dataset_config"),
    _without("prior_loss_weight", "reg_data_dir", "generate_class_images", "dataset_config"),
    _without("save_last_n_steps save_last_n_steps_state", "save_every_n_steps"),
    _without(
        "save_last_n_epochs save_last_n_epochs_state", "save_every_n_epochs", "save_n_epoch_ratio"
    ),
    _without("save_last_n_steps_state save_last_n_epochs_state", "save_state"),
    _without(
        "mlm_keep_best mlm_stop_below",
        "save_every_n_steps",
        "save_every_n_epochs",
        "save_n_epoch_ratio",
    ),
    Rule(
        ("max_train_steps",),
        "with max_train_epochs = {max_train_epochs}, which takes precedence",
        lambda flat: flat["max_train_epochs"] is None,
    ),
    Rule(
        ("sample_every_n_steps",),
        "with sample_every_n_epochs = {sample_every_n_epochs}, which takes precedence",
        lambda flat: flat["sample_every_n_epochs"] is None,
    ),
    Rule(
        ("keep_tokens",),
        "with keep_tokens_separator = {keep_tokens_separator}, which takes precedence",
        lambda flat: not flat["keep_tokens_separator"],
    ),
    Rule(
        ("save_every_n_epochs",),
        "with save_n_epoch_ratio = {save_n_epoch_ratio}, which takes precedence",
        lambda flat: flat["save_n_epoch_ratio"] is None,
    ),
    _without("log_prefix", "logging_dir"),
    _without("log_tracker_name log_tracker_config log_config", "logging_dir", "log_with"),
    Rule(
        ("wandb_run_name", "wandb_api_key"),
        "without log_with = wandb or all",
        lambda flat: flat["log_with"] in ("wandb", "all"),
    ),
    _without("sample_sampler", "sample_prompts"),
    Rule(
        ("sample_prompts",),
        "without sample_every_n_epochs, sample_every_n_steps or sample_at_first",
        lambda flat: (
            flat["sample_every_n_epochs"] or flat["sample_every_n_steps"] or flat["sample_at_first"]
        ),
    ),
    *_MLM_RULES,
)
"""Which settings make an option effective, mirroring the code that reads it."""
