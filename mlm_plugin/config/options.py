"""Every option of a training run, declared once.

One frozen dataclass per group; a field holds name, type, default, help and limits. Command-line
flags, TOML keys and the tables of ``docs/options.md`` are derived from these fields. The names and,
unless noted, the defaults are those of kohya's ``train_network.py``. Its remaining options are in
two tables at the end: ``NO_EFFECT`` (accepted, with a warning) and ``REFUSED``.

This module knows nothing about files, argparse, images or models.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlm_plugin.config.methods import METHOD_CLASSES

__all__ = [
    "ALIASES",
    "GROUPS",
    "LARGEST_BATCH",
    "LARGEST_SIDE",
    "MOST_REPEATS",
    "NO_EFFECT",
    "OPTIONS",
    "REFUSED",
    "SWITCH_ALIASES",
    "DatasetOptions",
    "Declined",
    "EmbeddingOptions",
    "FinetuneOptions",
    "LogOptions",
    "LossOptions",
    "MLMOptions",
    "ModelOptions",
    "NetworkOptions",
    "OptimizerOptions",
    "Option",
    "OutputOptions",
    "RunOptions",
    "SamplingOptions",
    "ScheduleOptions",
    "TrainConfig",
    "known_names",
]


LARGEST_RANK = 1_000_000  # LoKr presets have 100000, which means full matrices
LARGEST_SIDE = 16_384
LARGEST_BATCH = 4_096
MOST_REPEATS = 1_000_000


def option(
    default: Any,
    help: str,  # noqa: A002 - the word argparse uses
    *,
    choices: tuple | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    zero_is_off: bool = False,
    path: bool = False,
    secret: bool = False,
    convert: Callable[[Any], Any] | None = None,
) -> Any:
    """Declare one option as a dataclass field.

    Args:
        default: Value when neither a flag nor the TOML names the option.
        help: Its effect and unit.
        choices: Allowed values.
        at_least: Smallest allowed number.
        at_most: Largest allowed number: far above any use, below what no machine can hold.
        zero_is_off: 0 means None (GUIs write 0 for an empty box).
        path: The text is a file, a folder or a hub id.
        secret: Never written to files.
        convert: Rewrites unusual spellings before the type check; may raise ValueError.
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "at_least": at_least,
            "at_most": at_most,
            "zero_is_off": zero_is_off,
            "path": path,
            "secret": secret,
            "convert": convert,
        },
    )


def _join_numbers(value: Any) -> Any:
    """``512`` -> ``"512"``, ``[512, 768]`` -> ``"512,768"``; text stays."""
    if isinstance(value, (list, tuple)):
        return ",".join(str(item) for item in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value


def _batch_size(value: Any) -> Any:
    """0 is 1: GUIs write 0 for an empty box. Source: kohya_ss vae_batch_size."""
    return 1 if str(value).strip() in ("0", "0.0") else value


def _window_length(value: Any) -> Any:
    """75 is one CLIP window, which kohya spells None."""
    return None if value in (75, "75", 75.0) else value


def _steps_or_ratio(value: Any) -> Any:
    """``"10%"`` -> ``0.1``; from 1 on the number must be whole. Source: int_or_float."""
    if isinstance(value, str):
        text = value.strip()
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        if text.endswith("%") and value >= 1:  # 1.0 would be read as one step
            raise ValueError("a percentage below 100%")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value < 0 or (value >= 1 and value != int(value)):
            raise ValueError("a whole number of steps, a ratio below 1 or a percentage like 10%")
        return int(value) if value >= 1 else value
    return value


def _stop_step(value: Any) -> Any:
    """As ``_steps_or_ratio``; 0 means never, as GUIs write it for an empty box."""
    return None if value in (None, "") else _steps_or_ratio(value) or None


@dataclass(frozen=True)
class ModelOptions:
    """The base model and how it is kept in memory."""

    pretrained_model_name_or_path: str | None = option(
        None,
        "Base model: diffusers folder, hub id, or a .safetensors/.ckpt file (SD 1.x, 2.x or XL).",
        path=True,
    )
    v2: bool = option(False, "The base model is Stable Diffusion 2.x.")
    v_parameterization: bool = option(False, "The base model predicts v instead of the noise.")
    vae: str | None = option(
        None, "VAE folder, hub id or file that replaces the model's own.", path=True
    )
    tokenizer_cache_dir: str | None = option(
        None, "Folder with saved tokenizers, for training without a network.", path=True
    )
    clip_skip: int | None = option(
        None,
        "Condition on the n-th last text-encoder layer, followed by the final layer norm "
        "(anime models expect 2). SDXL always uses the one before the last.",
        at_least=1,
    )
    max_token_length: int | None = option(
        None,
        "Number of tokens of a caption: 75 (default), 150 or 225, in windows of 75.",
        choices=(150, 225),
        convert=_window_length,
    )
    no_half_vae: bool = option(False, "Run the VAE in fp32 even with mixed precision.")
    quantize_unet: str = option(
        "no",
        "Keep the linear weights of a frozen U-Net in fewer bits: `int8` takes half the memory of "
        "bf16 with an error of about 1 %, `nf4` (bitsandbytes) 28 % with an error of about 9 %. "
        "Trained weights keep their precision; every step takes longer.",
        choices=("no", "int8", "nf4"),
    )
    xformers: bool = option(
        False, "Attention by xformers if it is installed, else PyTorch SDPA with a warning."
    )
    sdpa: bool = option(False, "Attention by PyTorch SDPA; this is already the default.")
    torch_compile: bool = option(
        False, "Compile the U-Net with torch.compile: slow start, faster steps."
    )
    dynamo_backend: str = option(
        "inductor",
        "Backend of torch_compile; `no` turns compilation off.",
        choices=(
            "no",
            "eager",
            "aot_eager",
            "inductor",
            "aot_ts_nvfuser",
            "nvprims_nvfuser",
            "cudagraphs",
            "ofi",
            "fx2trt",
            "onnxrt",
            "tensort",
            "ipex",
            "tvm",
        ),
    )


@dataclass(frozen=True)
class NetworkOptions:
    """The network that is trained on top of the frozen model."""

    network_module: str = option(
        "networks.lora", "Kind of network: `networks.lora` (built in) or `lycoris.kohya`."
    )
    network_dim: int | None = option(
        None, "Rank of the LoRA matrices; 4 if not given.", at_least=1, at_most=LARGEST_RANK
    )
    network_alpha: float = option(
        1.0,
        "Scales the LoRA output by network_alpha / network_dim. Equal to network_dim: scale 1.",
        at_least=0,
    )
    network_dropout: float | None = option(
        None, "Probability of dropping a value after the down projection while training."
    )
    network_args: tuple[str, ...] = option(
        (), "More settings for the network as key=value, e.g. conv_dim=8 loraplus_lr_ratio=16."
    )
    network_weights: str | None = option(
        None,
        "LoRA file to start from (without optimizer state).",
        path=True,
    )
    dim_from_weights: bool = option(
        False, "Take rank and alpha of every module from network_weights."
    )
    network_train_unet_only: bool = option(
        False, "Train no text-encoder modules. The MLM term then reads at the cross-attention."
    )
    network_train_text_encoder_only: bool = option(False, "Train no U-Net modules.")
    scale_weight_norms: float | None = option(
        None,
        "After every step scale down each module whose weight norm exceeds this; 1 is usual, "
        "0 turns it off.",
        at_least=0,
        zero_is_off=True,
    )


@dataclass(frozen=True)
class EmbeddingOptions:
    """Learned token embeddings: methods textual_inversion, xti, custom_diffusion and pivotal."""

    num_vectors_per_token: int = option(
        1,
        "Vectors per placeholder; more of them capture more detail and take more of the prompt.",
        at_least=1,
        at_most=LARGEST_BATCH,
    )
    init_word: tuple[str, ...] | None = option(
        None,
        "Word whose embedding the learned one starts from, one per concept, or `id:42170` for a "
        "token by number; the class word if not given (custom_diffusion: a rare token).",
    )
    weights: tuple[str, ...] | None = option(
        None,
        "Embedding files to start from, one per concept (.safetensors, .pt, .bin).",
        path=True,
    )
    directional_embedding: bool = option(
        False,
        "Learn only the direction of token embeddings; their norm is the mean norm of the "
        "vocabulary (Directional Textual Inversion). embedding_lr then acts on vectors of norm 1.",
    )
    directional_kappa: float = option(
        1e-4,
        "Strength of the von Mises-Fisher prior, which pulls the direction of a token embedding "
        "back to its initial one; 0 for no prior.",
        at_least=0,
    )
    xti_mlm_layers: str = option(
        "sample",
        "MLM term of xti: `sample` encodes each prompt with the embeddings of one random layer, "
        "`all` with those of every layer in turn (as many times the cost).",
        choices=("sample", "all"),
    )
    bundle_embedding: bool = option(
        False,
        "Write a second LoRA file, `NAME_bundle`, that contains the embeddings too, for A1111 and "
        "SD.Next (pivotal).",
    )


@dataclass(frozen=True)
class FinetuneOptions:
    """Trained model weights: methods dreambooth and custom_diffusion."""

    no_train_text_encoder: bool = option(
        False,
        "Do not train the text encoder (dreambooth); the MLM term then reads at the U-Net's "
        "cross-attention.",
    )
    class_prompt: str | None = option(
        None, "Prompt of generate_class_images; `a photo of a <class_token>` if not given."
    )
    generate_class_images: int | None = option(
        None,
        "Let the base model draw regularization images before training, until reg_data_dir has "
        "this many per class; 200 is usual.",
        at_least=1,
        zero_is_off=True,
    )
    delta_lora_rank: int | None = option(
        None,
        "Also write the change of custom_diffusion as a LoRA of this rank, which WebUIs load.",
        at_least=1,
        at_most=LARGEST_RANK,
        zero_is_off=True,
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """Learning rates, optimizer and scheduler."""

    learning_rate: float = option(
        2e-6, "Learning rate where unet_lr or text_encoder_lr is not given."
    )
    unet_lr: float | None = option(None, "Learning rate of the U-Net modules.")
    text_encoder_lr: tuple[float, ...] | None = option(
        None,
        "Learning rate of the text-encoder modules, or one for each of SDXL's two text encoders; "
        "0 leaves them untrained.",
    )
    learning_rate_te: float | None = option(
        None, "Learning rate of the whole text encoder (dreambooth); learning_rate if not given."
    )
    learning_rate_te1: float | None = option(
        None, "The same for SDXL's first text encoder, CLIP-L; learning_rate_te if not given."
    )
    learning_rate_te2: float | None = option(
        None, "The same for SDXL's second text encoder, bigG; learning_rate_te if not given."
    )
    embedding_lr: float | None = option(
        None, "Learning rate of learned token embeddings; learning_rate if not given."
    )
    stop_text_encoder_training: int | float | None = option(
        None,
        "Freeze the text encoder (its weights or its LoRA) from this optimizer step on, or from "
        "this share of the run (0.6 or `60%`).",
        convert=_stop_step,
    )
    stop_text_encoder1_training: int | float | None = option(
        None,
        "The same for SDXL's first text encoder; stop_text_encoder_training if not given.",
        convert=_stop_step,
    )
    stop_text_encoder2_training: int | float | None = option(
        None,
        "The same for SDXL's second text encoder; stop_text_encoder_training if not given.",
        convert=_stop_step,
    )
    stop_embedding_training: int | float | None = option(
        None,
        "Freeze learned token embeddings from this optimizer step on, or from this share of the "
        "run.",
        convert=_stop_step,
    )
    stop_unet_training: int | float | None = option(
        None,
        "Freeze the U-Net's part from this optimizer step on, or from this share of the run.",
        convert=_stop_step,
    )
    optimizer_type: str = option(
        "",
        "Optimizer, case-insensitive: AdamW (default), AdamW8bit, PagedAdamW8bit, Lion, Lion8bit, "
        "Prodigy, DAdaptAdam, Adafactor, ..., or a full class path.",
    )
    optimizer_args: tuple[str, ...] = option(
        (), "Optimizer settings as key=value, e.g. weight_decay=0.01 betas=0.9,0.99."
    )
    max_grad_norm: float = option(
        1.0, "Clip the norm of the whole gradient to this; 0 for no clipping.", at_least=0
    )
    fused_backward_pass: bool = option(
        False,
        "Step every U-Net tensor inside the backward pass and free its gradient there "
        "(dreambooth): saves about the size of the model. max_grad_norm then applies per tensor.",
    )
    lr_scheduler: str = option(
        "constant",
        "Learning-rate schedule: constant, constant_with_warmup, linear, cosine, "
        "cosine_with_restarts, polynomial, inverse_sqrt, cosine_with_min_lr, warmup_stable_decay, "
        "piecewise_constant or adafactor.",
    )
    lr_warmup_steps: int | float = option(
        0,
        "Warm-up in optimizer steps, or as a ratio below 1, or as `10%`.",
        convert=_steps_or_ratio,
    )
    lr_decay_steps: int | float = option(
        0,
        "Decay in optimizer steps, ratio or percentage (warmup_stable_decay).",
        convert=_steps_or_ratio,
    )
    lr_scheduler_num_cycles: int = option(1, "Number of cosine restarts.")
    lr_scheduler_power: float = option(1.0, "Exponent of the polynomial scheduler.")
    lr_scheduler_type: str = option(
        "", "Scheduler class (torch name or full path) used instead of lr_scheduler."
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (), "Settings for the scheduler as key=value, e.g. T_max=1000."
    )
    lr_scheduler_timescale: int | None = option(
        None, "Time scale of inverse_sqrt in steps; the warm-up if not given."
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "Lowest learning rate as a ratio (cosine_with_min_lr, warmup_stable_decay)."
    )


@dataclass(frozen=True)
class ScheduleOptions:
    """Length, batch, precision and repeatability of the run."""

    method: str = option("lora", "What is trained.", choices=tuple(METHOD_CLASSES))
    max_train_steps: int = option(1600, "Length of the run in optimizer steps.", at_least=1)
    max_train_epochs: int | None = option(
        None,
        "Length in epochs; takes precedence over max_train_steps.",
        at_least=1,
        zero_is_off=True,
    )
    train_batch_size: int = option(
        1, "Images per step and device.", at_least=1, at_most=LARGEST_BATCH
    )
    gradient_accumulation_steps: int = option(
        1, "Batches whose gradients are averaged into one optimizer step.", at_least=1
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, slower steps."
    )
    mixed_precision: str = option(
        "no",
        "Precision of the forward pass and of the frozen model.",
        choices=("no", "fp16", "bf16"),
    )
    full_fp16: bool = option(False, "Keep trained weights and gradients in fp16 too (needs fp16).")
    full_bf16: bool = option(False, "Keep trained weights and gradients in bf16 too (needs bf16).")
    seed: int | None = option(
        None,
        "Seed of everything random, from 0 to 2^32 - 1; drawn and logged if not given.",
        at_least=0,
    )
    max_data_loader_n_workers: int = option(
        8,
        "Processes that load images, at most the number of cores; 0 loads in the main one.",
        at_least=0,
    )
    persistent_data_loader_workers: bool = option(
        False, "Keep the loader processes between epochs."
    )
    resume: str | None = option(None, "State folder (`...-state`) to resume from.", path=True)


@dataclass(frozen=True)
class DatasetOptions:
    """Images and captions; with dataset_config these are the defaults."""

    train_data_dir: str | None = option(
        None, "Folder with folders named `<repeats>_<placeholder> <class>`.", path=True
    )
    reg_data_dir: str | None = option(
        None, "The same for regularization images, named `<repeats>_<class>`.", path=True
    )
    dataset_config: str | None = option(
        None, "TOML or JSON that describes data sets and subsets (kohya's format).", path=True
    )
    resolution: str | None = option(
        None, "Training size in pixels: `512` or `width,height`.", convert=_join_numbers
    )
    enable_bucket: bool = option(
        False, "Keep aspect ratios: sort images into buckets of about equal area."
    )
    min_bucket_reso: int = option(
        256, "Smallest bucket side in pixels.", at_least=1, at_most=LARGEST_SIDE
    )
    max_bucket_reso: int = option(
        1024, "Largest bucket side in pixels.", at_least=1, at_most=LARGEST_SIDE
    )
    bucket_reso_steps: int = option(
        64,
        "Bucket sides are multiples of this many pixels: of 64, in SDXL of 32 (rounded up to 32).",
        at_least=1,
        at_most=LARGEST_SIDE,
    )
    bucket_no_upscale: bool = option(False, "Never enlarge an image to fill a bucket.")
    resize_interpolation: str | None = option(
        None,
        "How images are resized; by default area when shrinking, lanczos when growing.",
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"),
    )
    cache_latents: bool = option(False, "Encode every image once and keep its latents in memory.")
    cache_latents_to_disk: bool = option(
        False, "Keep the latents beside the images as .npz for the next run."
    )
    vae_batch_size: int = option(
        1,
        "Images encoded at once while latents are cached.",
        at_least=1,
        at_most=LARGEST_BATCH,
        convert=_batch_size,
    )
    cache_text_encoder_outputs: bool = option(
        False,
        "Encode every caption once and take the text encoders off the GPU. Nothing before their "
        "output can then be trained, and captions must not vary.",
    )
    skip_cache_check: bool = option(
        False, "Trust latent files on disk without opening them; a stale file then spoils the run."
    )
    caption_extension: str = option(".caption", "Extension of the caption files.")
    shuffle_caption: bool = option(False, "Shuffle the parts of a caption at every use.")
    caption_separator: str = option(",", "Separates the parts of a caption.")
    keep_tokens: int = option(
        0, "First parts of a caption that are never moved or dropped.", at_least=0
    )
    keep_tokens_separator: str = option(
        "",
        "Marks the end of a caption's fixed parts, e.g. `|||`; takes precedence over keep_tokens.",
    )
    secondary_separator: str | None = option(
        None, "Joins parts that are shuffled and dropped together; becomes the caption separator."
    )
    enable_wildcard: bool = option(
        False, "Read `{a|b}` as one of a, b; draw one line of the caption file."
    )
    caption_prefix: str | None = option(None, "Text put before every caption.")
    caption_suffix: str | None = option(None, "Text put after every caption.")
    use_object_template: bool = option(
        False, "Captions from neutral templates for objects instead of those of the data."
    )
    use_style_template: bool = option(
        False, "Captions from neutral templates for styles instead of those of the data."
    )
    caption_dropout_rate: float = option(0.0, "Probability of an empty caption.", at_least=0)
    caption_dropout_every_n_epochs: int = option(
        0, "Empty captions in every n-th epoch; 0 for never.", at_least=0
    )
    caption_tag_dropout_rate: float = option(
        0.0, "Probability of dropping a part of a caption.", at_least=0
    )
    token_warmup_min: int = option(1, "Caption parts used at the first step.", at_least=0)
    token_warmup_step: float = option(
        0.0,
        "Step at which all caption parts are used; below 1 a ratio of the run; 0 for at once.",
        at_least=0,
    )
    color_aug: bool = option(False, "Vary hue and gamma a little; excludes latent caching.")
    flip_aug: bool = option(False, "Mirror half of the images.")
    scale_aug: bool = option(
        False,
        "Draw images smaller or larger at random, say so in the caption, and learn only where the "
        "image is (Custom Diffusion); excludes latent caching.",
    )
    face_crop_aug_range: str | None = option(
        None,
        "Not supported: refused with a line. Use `random_crop`, or crop the files.",
        convert=_join_numbers,
    )
    random_crop: bool = option(False, "Crop at a random position; excludes latent caching.")
    alpha_mask: bool = option(False, "Weight the loss by the image's alpha channel.")
    masked_loss: bool = option(
        False, "Weight the loss by the mask images in conditioning_data_dir."
    )
    conditioning_data_dir: str | None = option(
        None, "Folder of mask images with the names of the training images.", path=True
    )
    dataset_repeats: int = option(
        1,
        "num_repeats of subsets under dataset_config that give none.",
        at_least=1,
        at_most=MOST_REPEATS,
    )
    prior_loss_weight: float = option(
        1.0, "Weight of the loss on regularization images.", at_least=0
    )
    debug_dataset: bool = option(
        False, "Print a report of the data set, then exit without training."
    )


@dataclass(frozen=True)
class LossOptions:
    """Noise, timesteps and weights of the diffusion loss."""

    noise_offset: float | None = option(
        None, "Shift the noise per image and channel by this times N(0,1).", at_least=0
    )
    noise_offset_random_strength: bool = option(
        False, "Draw the offset between 0 and noise_offset."
    )
    adaptive_noise_scale: float | None = option(
        None, "Add this times the latents' mean to noise_offset (needs noise_offset)."
    )
    multires_noise_iterations: int | None = option(
        None, "Levels of pyramid noise; 6 to 10 are usual.", at_least=0
    )
    multires_noise_discount: float = option(
        0.3, "Strength of a pyramid level relative to the one before.", at_least=0
    )
    ip_noise_gamma: float | None = option(
        None, "Noise added to the model's input but not to its target; 0.1 is usual.", at_least=0
    )
    ip_noise_gamma_random_strength: bool = option(False, "Draw it between 0 and ip_noise_gamma.")
    min_snr_gamma: float | None = option(
        None, "Limit the weight of easy timesteps (min-SNR); 5 is usual.", at_least=0
    )
    debiased_estimation_loss: bool = option(False, "Weight timesteps by 1/sqrt(SNR).")
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "Give the v loss the timestep weights of a noise loss (needs v_parameterization)."
    )
    v_pred_like_loss: float | None = option(
        None, "Weight of an additional v-like loss (not with v_parameterization)."
    )
    zero_terminal_snr: bool = option(
        False, "Rescale betas so that the last timestep is pure noise."
    )
    min_timestep: int | None = option(None, "First timestep that is trained, from 0.", at_least=0)
    max_timestep: int | None = option(
        None, "Timesteps are drawn below this, at most 1000.", at_least=1
    )
    loss_type: str = option(
        "l2", "Distance of prediction and target.", choices=("l1", "l2", "huber", "smooth_l1")
    )
    huber_schedule: str = option(
        "snr", "How huber_c depends on the timestep.", choices=("constant", "exponential", "snr")
    )
    huber_c: float = option(0.1, "Where huber and smooth_l1 turn from quadratic to linear.")
    huber_scale: float = option(1.0, "Multiplies the huber parameter.")


@dataclass(frozen=True)
class OutputOptions:
    """What is written, when, and under which name."""

    output_dir: str | None = option(None, "Folder for the trained files.", path=True)
    output_name: str | None = option(
        None, "Name of the files without extension; `last` if not given."
    )
    save_precision: str | None = option(
        None,
        "Precision of the file; that of the training (fp32) if not given.",
        choices=("float", "fp16", "bf16"),
    )
    save_model_as: str = option(
        "safetensors",
        "File format. Only `safetensors` is written; the others are refused, as pickle files can "
        "run code.",
        choices=("safetensors", "ckpt", "pt"),
    )
    save_diffusers_folder: bool = option(
        False, "Also write a diffusers folder with the name of the checkpoint (dreambooth)."
    )
    save_every_n_epochs: int | None = option(
        None, "Save every n epochs.", at_least=1, zero_is_off=True
    )
    save_every_n_steps: int | None = option(
        None, "Save every n optimizer steps.", at_least=1, zero_is_off=True
    )
    save_n_epoch_ratio: int | None = option(
        None, "Save at least this many times, evenly over the epochs.", at_least=1, zero_is_off=True
    )
    save_last_n_epochs: int | None = option(
        None,
        "Keep the files of the last n epochs, remove older ones.",
        at_least=1,
        zero_is_off=True,
    )
    save_last_n_epochs_state: int | None = option(
        None, "The same for state folders.", at_least=1, zero_is_off=True
    )
    save_last_n_steps: int | None = option(
        None, "Keep the files of the last n steps, remove older ones.", at_least=1, zero_is_off=True
    )
    save_last_n_steps_state: int | None = option(
        None, "The same for state folders.", at_least=1, zero_is_off=True
    )
    save_state: bool = option(
        False, "Save a state folder to resume from with every file and at the end."
    )
    save_state_on_train_end: bool = option(False, "Save a state folder at the end only.")
    mlm_keep_best: bool = option(
        False,
        "At every save, measure from text alone how much of its context a prompt with the concept "
        "keeps, and keep the best file (in sd-scripts a copy of it): the last that keeps 95 %. "
        "Needs a concept.",
    )
    mlm_page: bool = option(
        True,
        "Write a page of the run beside its file, NAME.html, at every save and sample (runs of 10 "
        "steps or more): curves, samples, the words that are still read, settings, warnings. "
        "--no_mlm_page turns it off. In sd-scripts it is off unless given, and may be a path.",
    )
    mlm_stop_below: float | None = option(
        None,
        "End the run, with its state saved, when a saved file keeps less than this share of the "
        "context, e.g. 0.8.",
        at_least=0,
        at_most=1,
    )
    no_metadata: bool = option(
        False, "Write only the metadata that WebUIs need to recognize the base model."
    )
    training_comment: str | None = option(None, "Free text for the metadata.")
    metadata_title: str | None = option(None, "modelspec title; output_name if not given.")
    metadata_author: str | None = option(None, "modelspec author.")
    metadata_description: str | None = option(None, "modelspec description.")
    metadata_license: str | None = option(None, "modelspec license.")
    metadata_tags: str | None = option(None, "modelspec tags, separated by commas.")
    metadata_usage_hint: str | None = option(
        None, "modelspec usage hint; trigger and strength if not given."
    )
    metadata_thumbnail: str | None = option(
        None,
        "modelspec thumbnail: a picture file, stored with at most 256 pixels, or a data URL; the "
        "last sample if not given.",
    )
    metadata_merged_from: str | None = option(None, "modelspec sources of a merge.")
    metadata_trigger_phrase: str | None = option(
        None, "modelspec trigger phrase shown by UIs; the concept's words if not given."
    )
    metadata_preprocessor: str | None = option(None, "modelspec preprocessor.")
    metadata_is_negative_embedding: str | None = option(None, "modelspec is_negative_embedding.")


@dataclass(frozen=True)
class LogOptions:
    """Curves and console."""

    logging_dir: str | None = option(None, "Folder for curves; turns TensorBoard on.", path=True)
    log_with: str | None = option(
        None,
        "Where curves go; tensorboard if logging_dir is given.",
        choices=("tensorboard", "wandb", "all"),
    )
    log_prefix: str | None = option(None, "Text before the time stamp in the log folder's name.")
    log_tracker_name: str | None = option(None, "Name of the tracker or wandb project.")
    log_tracker_config: str | None = option(None, "TOML with settings of the trackers.", path=True)
    wandb_run_name: str | None = option(None, "Name of the wandb run.")
    wandb_api_key: str | None = option(None, "Key used to log in to wandb.", secret=True)
    log_config: bool = option(False, "Log the options of the run to the tracker.")
    console_log_level: str | None = option(
        None,
        "Least important console messages shown; INFO if not given.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: str | None = option(
        None, "Write console messages to this file instead.", path=True
    )
    console_log_simple: bool = option(False, "Plain console messages without time and module.")


@dataclass(frozen=True)
class SamplingOptions:
    """Sample pictures during training."""

    sample_every_n_steps: int | None = option(
        None, "Draw samples every n optimizer steps.", at_least=1, zero_is_off=True
    )
    sample_every_n_epochs: int | None = option(
        None,
        "Draw samples every n epochs; takes precedence over sample_every_n_steps.",
        at_least=1,
        zero_is_off=True,
    )
    sample_at_first: bool = option(False, "Draw samples before the first step too.")
    sample_prompts: str | None = option(
        None,
        "Prompts in a .txt (one per line, `--n --w --h --d --s --l --ss`), .toml or .json; "
        "`[trigger]` stands for the concept. Pictures of up to 128 pixels are saved four times as "
        "large.",
        path=True,
    )
    sample_sampler: str = option(
        "ddim",
        "Sampler of the samples.",
        choices=(
            "ddim",
            "pndm",
            "lms",
            "euler",
            "euler_a",
            "heun",
            "dpm_2",
            "dpm_2_a",
            "dpmsolver",
            "dpmsolver++",
            "dpmsingle",
            "k_lms",
            "k_euler",
            "k_euler_a",
            "k_dpm_2",
            "k_dpm_2_a",
        ),
    )


@dataclass(frozen=True)
class ValidationOptions:
    """The denoising loss of pictures that are not trained on."""

    validation_split: float = option(
        0.0,
        "Share of each folder's pictures that is held out and not trained on, from 0 to below 1. "
        "Their loss is measured instead. Regularization images are never held out.",
        at_least=0,
    )
    validation_seed: int | None = option(
        None,
        "Chooses the pictures that are held out, and the noise of their loss; seed if not given.",
        at_least=0,
    )
    validate_every_n_steps: int | None = option(
        None,
        "Measure the loss of the held-out pictures every n optimizer steps too.",
        at_least=1,
        zero_is_off=True,
    )
    validate_every_n_epochs: int | None = option(
        None,
        "Measure the loss of the held-out pictures every n epochs; every epoch if not given.",
        at_least=1,
        zero_is_off=True,
    )
    max_validation_steps: int | None = option(
        None, "Batches of held-out pictures that are measured, at most.", at_least=1
    )


@dataclass(frozen=True)
class MLMOptions:
    """The MLM term: keeps the words around the concept readable."""

    placeholder_token: tuple[str, ...] | None = option(
        None,
        "Word or words that name the concept, or a list for several concepts; from class_tokens of "
        "the data if not given.",
    )
    class_token: tuple[str, ...] | None = option(
        None,
        "What the concept is, e.g. `dog`, one per placeholder_token; from class_tokens of the data "
        "if not given.",
    )
    mlm_loss_weight: float = option(
        0.1,
        "Weight of the MLM loss added to the diffusion loss; 0 turns the term off. "
        "For `mlm_target = word` the research code uses 1e-4 to 5e-4.",
        at_least=0,
    )
    mlm_read_at: str = option(
        "auto",
        "Where the term reads. `encoder`: the text encoder's output. `cross_attention`: the keys "
        "and values that the U-Net makes of it, so that training the U-Net alone is reached too. "
        "`both`. `auto`: wherever something is trained; with `mlm_target` `class` or `word` at the "
        "`encoder` alone, if anything before its output is trained; in sd-scripts' scripts for "
        "whole models at the `encoder` if one is trained.",
        choices=("auto", "encoder", "cross_attention", "both"),
    )
    mlm_target: str = option(
        "states",
        "What is compared around the concept. `states`: the states of all words, with those that "
        "the untrained model gives them beside the class word; needs no contextualizer. `class`: "
        "predictions for masked words, with those from the untrained text encoder beside the class "
        "word. `word`: the masked words themselves, as in the paper.",
        choices=("states", "class", "word"),
    )
    mlm_batch_size: int = option(
        8, "Prompts of the MLM term per batch of images.", at_least=1, at_most=LARGEST_BATCH
    )
    mlm_probability: float = option(
        0.5,
        "Share of the context words to mask, above 0 and up to 1; whole words. Used only "
        "with `mlm_target` `class` or `word`.",
    )
    mlm_replace: str = option(
        "mask",
        "`mask`: every chosen word becomes the mask vector; "
        "`bert`: 80 % mask, 10 % random, 10 % kept. "
        "Used only with `mlm_target` `class` or `word`.",
        choices=("mask", "bert"),
    )
    mlm_every_n_steps: int = option(
        1,
        "Add the term at every n-th optimizer step, n times as strong: the mean gradient is the "
        "same, its effect under AdamW at n = 4 up to a quarter smaller.",
        at_least=1,
    )
    mlm_start_step: int = option(0, "First optimizer step with the term, from 0.", at_least=0)
    mlm_end_step: int | None = option(
        None,
        "Optimizer step from which the term is off; the end of the run if not given.",
        at_least=1,
    )
    mlm_prompt_set: str = option(
        "auto",
        "Prompts: `auto` (by class_token), living, person, object, building, style, illustration "
        "(tags only, half of them with quality tags in front), a .toml or .txt file with {} for "
        "the concept, `captions` (those of the data), or `pocket` (for the built-in pocket model).",
        path=True,
    )
    mlm_prompt_syntax: str = option(
        "natural", "Prompts as sentences or as comma-separated tags.", choices=("natural", "tags")
    )
    mlm_contextualizer: str = option(
        "auto",
        "Pretrained contextualizer (.safetensors); `auto` finds or pretrains the one for this text "
        "encoder. With several trained text encoders one file for each, separated by commas. "
        "Used only with `mlm_target` `class` or `word`.",
        path=True,
    )
    mlm_joint_share: float = option(
        0.5, "Share of the prompts with two concepts at once, if there are several."
    )
    mlm_seed: int | None = option(
        None, "Seed of prompts and masks; derived from seed if not given."
    )


@dataclass(frozen=True)
class RunOptions:
    """How the command itself behaves."""

    config_file: str | None = option(
        None, "TOML with options; flags take precedence. Sections only group options.", path=True
    )
    output_config: bool = option(
        False, "Write the options that differ from the defaults to config_file and exit."
    )
    allow_unknown_keys: bool = option(
        False, "Warn about unknown keys and flags instead of refusing them."
    )
    check: bool = option(
        False, "Refuse what the run would refuse, print data, concepts and length; load no weights."
    )
    host: str = option(
        "auto",
        "Trainer that runs: `standalone` (this package's own) or `sd-scripts` (kohya's, with the "
        "MLM term added); `auto` is sd-scripts if a checkout is given or is beside the "
        "script, else standalone.",
        choices=("auto", "sd-scripts", "standalone"),
    )
    sd_scripts_dir: str | None = option(
        None,
        "Checkout of sd-scripts; the environment variable SD_SCRIPTS_DIR does the same.",
        path=True,
    )
    mlm_arch: str = option(
        "auto",
        "Architecture in the sd-scripts host; `auto` detects it from the base model.",
        choices=("auto", "sd", "sdxl", "sd3", "flux", "anima", "lumina"),
    )
    mlm_script: str | None = option(
        None,
        "Script of sd-scripts to run, e.g. `fine_tune.py`; chosen by method and mlm_arch if not "
        "given.",
    )


class Declined(NamedTuple):
    """A kohya option that this trainer knows but does not support.

    ``default`` is the neutral value; False makes it a switch, a tuple a list.
    """

    default: Any
    reason: str


_MEMORY = "this trainer places models automatically"
_DDP = "gradients are averaged without DistributedDataParallel"

NO_EFFECT: dict[str, Declined] = {
    "lowram": Declined(False, _MEMORY),
    "highvram": Declined(False, _MEMORY),
    "lowvram": Declined(False, _MEMORY),
    "mem_eff_attn": Declined(False, "PyTorch SDPA is already memory efficient"),
    "mem_eff_save": Declined(False, "a LoRA file is small"),
    "disable_mmap_load_safetensors": Declined(False, "files are read by safetensors' own rule"),
    "cpu_offload_checkpointing": Declined(False, "checkpointed activations stay on the device"),
    "cache_info": Declined(False, "image sizes are read from the file headers at every start"),
    "ddp_timeout": Declined(None, "processes wait for each other up to a day"),
    "ddp_gradient_as_bucket_view": Declined(False, _DDP),
    "ddp_static_graph": Declined(False, _DDP),
    "epoch": Declined(
        None, "a field of the GUI; max_train_epochs or max_train_steps set the length"
    ),
    "noise_offset_type": Declined(
        None, "a field of the GUI; noise_offset and multires_noise_iterations decide"
    ),
    "huggingface_repo_type": Declined(None, "nothing is uploaded"),
    "huggingface_path_in_repo": Declined(None, "nothing is uploaded"),
    "huggingface_token": Declined(None, "nothing is uploaded"),
    "huggingface_repo_visibility": Declined(None, "nothing is uploaded"),
    "async_upload": Declined(False, "nothing is uploaded"),
    "no_token_padding": Declined(False, "kohya ignores it too"),
    "split_mode": Declined(False, "it belongs to FLUX"),
}

_DEEPSPEED = "DeepSpeed is not supported; leave it out and use accelerate's multi-GPU launch"
_FP8 = "fp8 base weights are not supported; use quantize_unet = 'int8': as small, and more exact"
_UPLOAD = "uploading is not supported; upload the saved file with `huggingface-cli upload`"
_INITIAL = "resume finds the exact batch automatically; give the state folder as resume instead"
_LORAPLUS = "give it as key=value in network_args instead, e.g. loraplus_lr_ratio=16"

REFUSED: dict[str, Declined] = {
    "base_weights": Declined(
        (), "merging LoRA files is not supported; merge them into the model first"
    ),
    "base_weights_multiplier": Declined((), "merge LoRA files into the model first"),
    "fp8_base": Declined(False, _FP8),
    "fp8_base_unet": Declined(False, _FP8),
    "deepspeed": Declined(False, _DEEPSPEED),
    "zero_stage": Declined(2, _DEEPSPEED),
    "offload_optimizer_device": Declined(None, _DEEPSPEED),
    "offload_optimizer_nvme_path": Declined(None, _DEEPSPEED),
    "offload_param_device": Declined(None, _DEEPSPEED),
    "offload_param_nvme_path": Declined(None, _DEEPSPEED),
    "zero3_init_flag": Declined(False, _DEEPSPEED),
    "zero3_save_16bit_model": Declined(False, _DEEPSPEED),
    "fp16_master_weights_and_gradients": Declined(False, _DEEPSPEED),
    "weighted_captions": Declined(
        False, "(word:1.2) weights are not applied; remove them from the captions and leave it out"
    ),
    "in_json": Declined(
        None, "give the file as metadata_file of a subset in a dataset_config TOML instead"
    ),
    "dataset_class": Declined(None, "custom dataset classes are not supported; use dataset_config"),
    "train_inpainting": Declined(False, "inpainting models are not supported; leave it out"),
    "huggingface_repo_id": Declined(None, _UPLOAD),
    "save_state_to_huggingface": Declined(False, _UPLOAD),
    "resume_from_huggingface": Declined(
        False, "downloading a state is not supported; download the folder and give it as resume"
    ),
    "initial_epoch": Declined(None, _INITIAL),
    "initial_step": Declined(None, _INITIAL),
    "skip_until_initial_step": Declined(False, _INITIAL),
    "loraplus_lr_ratio": Declined(0.0, _LORAPLUS),
    "loraplus_unet_lr_ratio": Declined(0.0, _LORAPLUS),
    "loraplus_text_encoder_lr_ratio": Declined(0.0, _LORAPLUS),
    "cache_text_encoder_outputs_to_disk": Declined(
        False, "captions are encoded again in every run; use cache_text_encoder_outputs"
    ),
}

ALIASES: dict[str, str] = {
    "caption_extention": "caption_extension",
    "token_string": "placeholder_token",
}
"""Old spellings of kohya options."""

SWITCH_ALIASES: dict[str, tuple[str, str]] = {
    "use_8bit_adam": ("optimizer_type", "AdamW8bit"),
    "use_lion_optimizer": ("optimizer_type", "Lion"),
}
"""Old switches and the options they set."""


@dataclass(frozen=True)
class TrainConfig:
    """All options of a run, one attribute per group. Values only: checks live in ``checks``."""

    model: ModelOptions = ModelOptions()
    network: NetworkOptions = NetworkOptions()
    embedding: EmbeddingOptions = EmbeddingOptions()
    finetune: FinetuneOptions = FinetuneOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    dataset: DatasetOptions = DatasetOptions()
    loss: LossOptions = LossOptions()
    output: OutputOptions = OutputOptions()
    logging: LogOptions = LogOptions()
    sampling: SamplingOptions = SamplingOptions()
    validation: ValidationOptions = ValidationOptions()
    mlm: MLMOptions = MLMOptions()
    run: RunOptions = RunOptions()

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from option names and final values; other options keep their defaults."""
        return cls().replace(**values)

    def replace(self, **values: Any) -> TrainConfig:
        """A copy with options changed by their flat names.

        Raises:
            KeyError: For a name that is not an option.
        """
        changed: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            changed.setdefault(OPTIONS[name].group, {})[name] = value
        groups = {
            group: dataclasses.replace(getattr(self, group), **members)
            for group, members in changed.items()
        }
        return dataclasses.replace(self, **groups)

    def to_flat(self) -> dict[str, Any]:
        """Every option of kohya and ours, by flat name.

        Options of ``NO_EFFECT`` and ``REFUSED`` have their default: how this trainer behaves.
        """
        declined = {name: entry.default for name, entry in (NO_EFFECT | REFUSED).items()}
        return declined | {
            name: getattr(getattr(self, entry.group), name) for name, entry in OPTIONS.items()
        }

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, by flat name."""
        flat = self.to_flat()
        return {name: flat[name] for name, entry in OPTIONS.items() if flat[name] != entry.default}


class Option(NamedTuple):
    """One option as the dataclass field declares it."""

    name: str
    group: str
    kind: type  # bool, int, float, str; float also for `int | float`
    many: bool  # a tuple of kind
    nullable: bool
    whole: bool  # `int | float`: whole numbers stay int
    default: Any
    help: str
    choices: tuple | None
    at_least: float | None
    at_most: float | None
    zero_is_off: bool
    path: bool
    secret: bool
    convert: Callable[[Any], Any] | None


def _read_fields(group: str, cls: type) -> dict[str, Option]:
    hints = typing.get_type_hints(cls)
    return {
        item.name: _read_field(group, item, hints[item.name]) for item in dataclasses.fields(cls)
    }


def _read_field(group: str, item: dataclasses.Field, hint: Any) -> Option:
    is_union = isinstance(hint, types.UnionType)
    members = [m for m in typing.get_args(hint) if m is not type(None)] if is_union else [hint]
    whole = set(members) == {int, float}
    kind = float if whole else members[0]
    many = typing.get_origin(kind) is tuple
    return Option(
        name=item.name,
        group=group,
        kind=typing.get_args(kind)[0] if many else kind,
        many=many,
        nullable=is_union and len(members) < len(typing.get_args(hint)),
        whole=whole,
        default=item.default,
        **item.metadata,
    )


GROUPS: dict[str, type] = {
    "model": ModelOptions,
    "network": NetworkOptions,
    "embedding": EmbeddingOptions,
    "finetune": FinetuneOptions,
    "optimizer": OptimizerOptions,
    "schedule": ScheduleOptions,
    "dataset": DatasetOptions,
    "loss": LossOptions,
    "output": OutputOptions,
    "logging": LogOptions,
    "sampling": SamplingOptions,
    "validation": ValidationOptions,
    "mlm": MLMOptions,
    "run": RunOptions,
}

OPTIONS: dict[str, Option] = {
    name: entry for group, cls in GROUPS.items() for name, entry in _read_fields(group, cls).items()
}


def known_names() -> set[str]:
    """Every name that a TOML or the command line may use."""
    return {*OPTIONS, *NO_EFFECT, *REFUSED, *ALIASES, *SWITCH_ALIASES}
