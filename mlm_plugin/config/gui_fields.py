"""Field names of the kohya_ss GUI: those that its presets are translated from, and its own.

Source: bmaltais/kohya_ss kohya_gui/lora_gui.py train_model.
"""

from __future__ import annotations

from mlm_plugin.config.options import known_names

__all__ = [
    "GUI_ONLY",
    "HANDLED",
    "KOHYA_ARGS",
    "LYCORIS_ARGS",
    "RENAMED",
    "SDXL_SWITCHES",
    "is_gui_field",
]


def is_gui_field(name: str) -> bool:
    """Whether only the GUI has such a field, and no trainer such an option."""
    return name in {*RENAMED, *HANDLED, *GUI_ONLY} - known_names()


RENAMED = {
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "lora_network_weights": "network_weights",
}

KOHYA_ARGS = (
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
    "block_lr_zero_threshold",
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
    "rank_dropout",
    "module_dropout",
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
)

LYCORIS_ARGS = (
    "rank_dropout",
    "module_dropout",
    "rank_dropout_scale",
    "bypass_mode",
    "dora_wd",
    "use_cp",
    "use_tucker",
    "use_scalar",
    "decompose_both",
    "train_norm",
    "constrain",
    "rescaled",
)

HANDLED = {
    *KOHYA_ARGS,
    *LYCORIS_ARGS,
    "LoRA_type",
    "LyCORIS_preset",
    "additional_parameters",
    "conv_alpha",
    "conv_alphas",
    "conv_dim",
    "conv_dims",
    "epoch",
    "factor",
    "learning_rate",
    "lr_scheduler_num_cycles",
    "lr_warmup",
    "lr_warmup_steps",
    "max_train_epochs",
    "max_train_steps",
    "network_args",
    "noise_offset_type",
    "sample_prompts",
    "sdxl",
    "sdxl_cache_text_encoder_outputs",
    "sdxl_no_half_vae",
    "stop_text_encoder_training",
    "text_encoder_lr",
    "train_on_input",
    "unet_lr",
    "unit",
    "xformers",
}
"""Fields that the functions below read."""

SDXL_SWITCHES = {
    "sdxl_no_half_vae": "no_half_vae",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
}
"""Fields that the GUI reads of SDXL presets only."""

GUI_ONLY = {
    "dynamo_mode",
    "dynamo_use_dynamic",
    "dynamo_use_fullgraph",
    "extra_accelerate_launch_args",
    "gpu_ids",
    "main_process_port",
    "model_list",
    "multi_gpu",
    "num_cpu_threads_per_process",
    "num_machines",
    "num_processes",
    "save_as_bool",
}
"""Settings of the GUI or of ``accelerate launch``; training does not see them."""
