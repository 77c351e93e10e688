"""Sample pictures during training, from a prompt file in kohya's format.

Reads prompts, decides when samples are due, and draws them with the live models. Modes, devices and
random streams are restored afterwards. Knows nothing about LoRA: the U-Net and the encoder it is
given are the trained ones.

The denoising loop is that of diffusers' ``StableDiffusionPipeline`` and
``StableDiffusionXLPipeline`` (tests compare them). The pipelines themselves are not used because
they rewrite the configuration of the models they are built from and want them all on one device.
Two deviations from sd-scripts: predicted pictures are not clipped to [-1, 1] (its DDIM is, which
greys them), and starting noise is drawn on the CPU, so that a seed gives the same picture on every
machine. Weighted prompts, ``(word:1.3)``, are not supported.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.errors import UserError, shown_error
from mlm_plugin.files import atomic_path, parse_json
from mlm_plugin.models.conditioning import Conditioning, size_ids, unet_inputs
from mlm_plugin.random_state import preserved_random_state

__all__ = [
    "SAMPLERS",
    "SAMPLES",
    "TRIGGER",
    "DenoiseSettings",
    "SampleFiles",
    "SampleModels",
    "SamplePrompt",
    "as_image",
    "create_sampler",
    "decode_latents",
    "denoise",
    "enlarged",
    "generate_samples",
    "parse_sample_prompts",
    "sample_due",
    "save_sample",
]

logger = logging.getLogger(__name__)

TRIGGER = "[trigger]"  # stands for the concept's words in a prompt file
LATENT_SCALE = 8  # pixels per latent pixel
SMALLEST_SIDE = 64
TINY_SIDE, ENLARGEMENT = 128, 4  # pictures up to this many pixels are too small to be looked at
SAMPLES = "sample"  # folder of the pictures, in the output folder


@dataclass(frozen=True)
class SamplePrompt:
    """One picture to draw."""

    prompt: str = ""
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    seed: int | None = None  # None = another picture each time
    sample_steps: int = 30
    scale: float = 7.5  # classifier-free guidance; 1 = without
    sample_sampler: str | None = None  # None = the run's sampler


class SampleModels(NamedTuple):
    """The models that draw.

    Attributes:
        unet: on the device where to draw.
        vae: on any device; is moved to the U-Net's and back.
        encode: as in training, so that clip skip and long prompts are the same.
        noise_scheduler: its betas are used.
        prediction_type: ``"epsilon"`` or ``"v_prediction"``.
        autocast: mixed precision of the run.
        zero_terminal_snr: whether it is trained so.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    encode: Callable[[Sequence[str]], Conditioning]
    noise_scheduler: DDPMScheduler
    prediction_type: str
    autocast: Callable[[], AbstractContextManager] = nullcontext
    zero_terminal_snr: bool = False


class SampleFiles(NamedTuple):
    """Where pictures go, and what their names contain.

    Attributes:
        output_dir: the run's output folder; pictures go to ``sample`` in it.
        step: optimizer steps done.
        epoch: epochs done if one has just ended, else ``None``.
        name: the run's output name.
    """

    output_dir: Path
    step: int
    epoch: int | None = None
    name: str | None = None

    def path(self, index: int, seed: int | None) -> Path:
        """``{name}_{e000001 or 000100}_{index}_{time}_{seed}.png``, as sd-scripts names samples."""
        when = f"{self.step:06d}" if self.epoch is None else f"e{self.epoch:06d}"
        parts = [self.name, when, f"{index:02d}", time.strftime("%Y%m%d%H%M%S"), seed]
        file_name = "_".join(str(part) for part in parts if part is not None) + ".png"
        return self.output_dir / SAMPLES / file_name


class DenoiseSettings(NamedTuple):
    """Settings of the denoising.

    Attributes:
        size: height and width in pixels, multiples of 8.
        num_steps: steps of the sampler.
        scale: classifier-free guidance; 1 or less = none.
    """

    size: tuple[int, int]
    num_steps: int
    scale: float


class Sampler(NamedTuple):
    """A scheduler of diffusers and the settings that make it the sampler of that name."""

    class_name: str
    settings: Mapping[str, Any] = {}


def parse_sample_prompts(path: str | Path, *, trigger: str | None = None) -> list[SamplePrompt]:
    """Read a prompt file.

    ``.txt``: one prompt per line with options ``--n`` negative prompt, ``--w``, ``--h``, ``--d``
    seed, ``--s`` steps, ``--l`` guidance scale, ``--ss`` sampler; ``#`` in column 0 = comment.
    ``.toml``: defaults in ``[prompt]``, one ``[[prompt.subset]]`` per picture. ``.json``: a list of
    such lines or of dicts.

    Args:
        path: the file.
        trigger: text that replaces ``[trigger]``.

    Raises:
        UserError: the file cannot be read, or a prompt contains something unknown; names file and
            line.

    Source: sd-scripts ``library/train_util.py`` ``line_to_prompt_dict`` and ``load_prompts``; there
    the prompt's own text is also searched for options, and mistakes are ignored.
    """
    path = Path(path)
    readers = {".txt": _read_txt, ".toml": _read_toml, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise UserError(f"sample_prompts={path}: expected a .txt, .toml or .json file")
    prompts = [
        _to_prompt(values, place=place, trigger=trigger)
        for place, values in readers[path.suffix.lower()](path)
    ]
    if not prompts:
        raise UserError(f"sample_prompts={path}: the file has no prompt")
    return prompts


def sample_due(
    step: int,
    *,
    epoch: int | None = None,
    every_n_steps: int | None = None,
    every_n_epochs: int | None = None,
    at_first: bool = False,
) -> bool:
    """Whether to draw now. ``every_n_epochs`` switches ``every_n_steps`` off.

    Args:
        step: optimizer steps done; 0 = before the first.
        epoch: epochs done if one has just ended, else None.
        every_n_steps: None = not by steps.
        every_n_epochs: None = not by epochs.
        at_first: draw at step 0, which the other two never do.

    Source: sd-scripts ``library/train_util.py`` ``sample_images_common``.
    """
    if step == 0:
        return at_first
    if every_n_epochs is not None:
        return epoch is not None and epoch % every_n_epochs == 0
    return every_n_steps is not None and epoch is None and step % every_n_steps == 0


@torch.no_grad()
def generate_samples(
    prompts: Sequence[SamplePrompt],
    models: SampleModels,
    files: SampleFiles,
    *,
    sampler: str = "ddim",
    on_error: Callable[[SamplePrompt, Exception], None] | None = None,
) -> list[Path]:
    """Draw all prompts.

    Args:
        prompts: from ``parse_sample_prompts``.
        models: in any mode; modes, devices and random streams are restored.
        files: where the pictures go.
        sampler: for prompts without their own.
        on_error: called with a prompt that fails, before the next one is drawn; without it, the
            error is raised.

    Returns:
        The files, in the order of the prompts.

    Raises:
        UserError: an unknown sampler, or one whose package is missing.
    """
    device = next(models.unet.parameters()).device
    vae_device = next(models.vae.parameters()).device
    paths = []
    with preserved_random_state(device), _eval_mode((models.unet, models.vae)):
        try:
            models.vae.to(device)
            for index, prompt in enumerate(prompts):
                path = files.path(index, prompt.seed)
                try:
                    latents = _sample(prompt, models, sampler)
                    save_sample(path, enlarged(decode_latents(models.vae, latents)))
                except Exception as error:
                    if on_error is None:
                        raise
                    on_error(prompt, error)
                else:
                    paths.append(path)
        finally:
            models.vae.to(vae_device)
    return paths


def save_sample(path: Path, picture: Image.Image) -> None:
    """Write a picture, completely or not at all."""
    with atomic_path(path) as temporary:
        picture.save(temporary)


def _sample(prompt: SamplePrompt, models: SampleModels, sampler: str) -> Tensor:
    """Latents of one prompt."""
    scheduler = create_sampler(
        prompt.sample_sampler or sampler,
        models.noise_scheduler,
        prediction_type=models.prediction_type,
        zero_terminal_snr=models.zero_terminal_snr,
    )
    size = _rounded(prompt.height), _rounded(prompt.width)
    with models.autocast():
        return denoise(
            models.unet,
            models.encode([prompt.negative_prompt, prompt.prompt]),
            scheduler,
            DenoiseSettings(size, prompt.sample_steps, prompt.scale),
            generator=_generator(prompt.seed),
        )


def create_sampler(
    name: str,
    noise_scheduler: DDPMScheduler,
    *,
    prediction_type: str,
    zero_terminal_snr: bool = False,
) -> SchedulerMixin:
    """The diffusers scheduler of kohya's name, with the betas of the trained model.

    Args:
        name: see ``SAMPLERS``.
        noise_scheduler: has the betas.
        prediction_type: ``epsilon`` or ``v_prediction``.
        zero_terminal_snr: whether to rescale the betas, where v is predicted; a warning says
            where the sampler cannot.

    Raises:
        UserError: an unknown name, or a missing package (``lms`` needs scipy).
    """
    if name not in SAMPLERS:
        raise UserError(f"sampler {name!r} is not known; expected one of {', '.join(SAMPLERS)}")
    class_name, settings = SAMPLERS[name]
    if zero_terminal_snr and prediction_type == "v_prediction":  # else it divides by zero
        settings = {**settings, **_rescaled(class_name, name)}
    config = noise_scheduler.config
    try:
        return getattr(diffusers, class_name)(
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
            trained_betas=config.trained_betas,
            prediction_type=prediction_type,
            **settings,
        )
    except ImportError as error:
        raise UserError(f"sampler {name} needs a package: {shown_error(error)}") from error


def _rescaled(class_name: str, name: str) -> dict[str, bool]:
    if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, class_name)).parameters:
        return {"rescale_betas_zero_snr": True}
    logger.warning(
        "the model was made for zero terminal SNR, which sampler %s does not have: pictures will "
        "be washed out; take ddim or euler",
        name,
    )
    return {}


def denoise(
    unet: UNet2DConditionModel,
    prompts: Conditioning,
    scheduler: SchedulerMixin,
    settings: DenoiseSettings,
    *,
    generator: torch.Generator,
) -> Tensor:
    """From noise to latents with classifier-free guidance: ``uncond + scale (cond - uncond)``.

    Args:
        unet: the model.
        prompts: conditioning of the negative and of the positive prompt, B = 2.
        scheduler: the sampler.
        settings: size, steps, guidance.
        generator: on the CPU; all noise comes from it.

    Returns:
        fp32 latents, ``(1, C, height / 8, width / 8)``.
    """
    weight, (size, num_steps, scale) = next(unet.parameters()), settings
    if num_steps == scheduler.config.num_train_timesteps:
        scheduler.register_to_config(steps_offset=0)  # there is no timestep after the last one
    scheduler.set_timesteps(num_steps, device=weight.device)
    shape = (1, unet.config.in_channels, size[0] // LATENT_SCALE, size[1] // LATENT_SCALE)
    latents = torch.randn(shape, generator=generator).to(weight.device)
    latents = latents * scheduler.init_noise_sigma
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    noise_source = {"generator": generator} if takes_generator else {}
    sizes_26 = size_ids([size] * 2, [(0, 0)] * 2, [size] * 2)
    inputs = unet_inputs(prompts.to(weight.device), sizes_26, dtype=weight.dtype)
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        model_pred = unet(model_input.to(weight.dtype), timestep, **inputs).sample
        unconditional, conditional = model_pred.float().chunk(2)
        guided = unconditional + max(scale, 1.0) * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents, **noise_source).prev_sample
    return latents


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Image.Image:
    """The picture of latents ``(1, C, h, w)``; black, with a warning, where the VAE overflows."""
    weight = next(vae.parameters())
    pixels = vae.decode((latents / vae.config.scaling_factor).to(weight.dtype)).sample[0].float()
    if not pixels.isfinite().all():
        logger.warning("a sample overflowed in %s and is black; set no_half_vae", weight.dtype)
        pixels = torch.full_like(pixels, -1.0)
    return as_image(pixels)


def enlarged(picture: Image.Image) -> Image.Image:
    """A tiny picture, such as the pocket model's, with each pixel as 4 x 4; others unchanged."""
    if max(picture.size) > TINY_SIDE:
        return picture
    width, height = (ENLARGEMENT * length for length in picture.size)
    return picture.resize((width, height), Image.Resampling.NEAREST)


def as_image(pixels: Tensor) -> Image.Image:
    """Pixels ``(3, H, W)``, in [-1, 1] apart from overshoot, as a Pillow image."""
    pixels = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _rounded(length: int) -> int:
    return max(SMALLEST_SIDE, length - length % LATENT_SCALE)


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)


@contextmanager
def _eval_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _read_txt(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            place = f"{path}, line {number}"
            yield place, _split_line(line, place=place)


def _read_toml(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    table = read_toml(path).get("prompt")
    if not isinstance(table, dict) or not isinstance(table.get("subset"), list):
        raise UserError(f"{path}: expected [prompt] with at least one [[prompt.subset]]")
    defaults = {key: value for key, value in table.items() if key != "subset"}
    for number, subset in enumerate(table["subset"], start=1):
        yield f"{path}, prompt {number}", {**defaults, **subset}


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    entries = parse_json(_read_text(path), path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list of prompts")
    for number, entry in enumerate(entries, start=1):
        place = f"{path}, prompt {number}"
        if isinstance(entry, str):
            entry = _split_line(entry, place=place)
        if not isinstance(entry, dict):
            raise UserError(f"{place}: expected a text or an object, got {entry!r}")
        yield place, entry


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"sample_prompts={path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"sample_prompts={path}: is not UTF-8 text") from error


def _split_line(line: str, *, place: str) -> dict[str, Any]:
    prompt, *options = line.strip().split(" --")
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for option in options:
        flag, _, value = option.strip().partition(" ")
        if flag.lower() not in FLAGS:
            raise UserError(
                f"{place}: unknown option --{flag}; expected one of "
                f"{', '.join(f'--{known}' for known in FLAGS)}"
            )
        values[FLAGS[flag.lower()]] = value.strip()
    return values


def _to_prompt(values: Mapping[str, Any], *, place: str, trigger: str | None) -> SamplePrompt:
    known = {}
    for key, value in values.items():
        if key in OTHER_MODELS:
            logger.warning("%s: %s has no effect for Stable Diffusion", place, key)
        elif key not in FIELD_TYPES:
            raise UserError(
                f"{place}: unknown key {key!r}; expected one of {', '.join(FIELD_TYPES)}"
            )
        else:
            known[key] = _converted(key, value, place=place)
    for key in ("prompt", "negative_prompt"):
        if TRIGGER in known.get(key, ""):
            if trigger is None:
                raise UserError(f"{place}: {TRIGGER} stands for the concept, but none is named")
            known[key] = known[key].replace(TRIGGER, trigger)
    if "sample_steps" in known:
        wanted, known["sample_steps"] = known["sample_steps"], _clamped(known["sample_steps"])
        if wanted != known["sample_steps"]:
            logger.warning("%s: %d steps are drawn as %d", place, wanted, known["sample_steps"])
    for key, (low, high) in LIMITS.items():
        if not low <= known.get(key, low) <= high:
            raise UserError(f"{place}: {key}={known[key]}: allowed are {low} to {high}")
    sampler = known.get("sample_sampler", "ddim")
    if sampler not in SAMPLERS:
        raise UserError(
            f"{place}: unknown sampler {sampler!r}; expected one of {', '.join(SAMPLERS)}"
        )
    return SamplePrompt(**known)


def _clamped(num_steps: int) -> int:
    """As sd-scripts does it; Stable Diffusion has 1000 timesteps."""
    return max(1, min(1000, num_steps))


def _converted(key: str, value: Any, *, place: str) -> Any:
    wanted = FIELD_TYPES[key]
    try:
        if isinstance(value, bool) or (wanted is str and not isinstance(value, str)):
            raise ValueError
        if isinstance(value, float) and wanted is int and value != int(value):
            raise ValueError
        return wanted(value)
    except (TypeError, ValueError) as error:
        kind = {int: "a whole number", float: "a number", str: "a text"}[wanted]
        raise UserError(f"{place}: {key}={value!r}: expected {kind}") from error


LIMITS = {"width": (64, 8192), "height": (64, 8192), "seed": (-(2**63), 2**64 - 1)}
"""Pixels, and what a random generator takes."""

FIELD_TYPES: dict[str, type] = {
    "prompt": str,
    "negative_prompt": str,
    "width": int,
    "height": int,
    "seed": int,
    "sample_steps": int,
    "scale": float,
    "sample_sampler": str,
}
OTHER_MODELS = (
    "guidance_scale",
    "controlnet_image",
    "cfg_trunc_ratio",
    "renorm_cfg",
    "flow_shift",
)
FLAGS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "ss": "sample_sampler",
    "g": "guidance_scale",
    "cn": "controlnet_image",
    "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
}
# Offsets and ends of DDIM and PNDM as in the scheduler configuration of Stable Diffusion 1.5.
SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(
        "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    ),
    "pndm": Sampler(
        "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
    ),
    "lms": Sampler("LMSDiscreteScheduler"),
    "k_lms": Sampler("LMSDiscreteScheduler"),
    "euler": Sampler("EulerDiscreteScheduler"),
    "k_euler": Sampler("EulerDiscreteScheduler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler"),
    "k_euler_a": Sampler("EulerAncestralDiscreteScheduler"),
    "heun": Sampler("HeunDiscreteScheduler"),
    "dpm_2": Sampler("KDPM2DiscreteScheduler"),
    "k_dpm_2": Sampler("KDPM2DiscreteScheduler"),
    "dpm_2_a": Sampler("KDPM2AncestralDiscreteScheduler"),
    "k_dpm_2_a": Sampler("KDPM2AncestralDiscreteScheduler"),
    "dpmsolver": Sampler(
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": Sampler("DPMSolverSinglestepScheduler"),
}
