"""Stable Diffusion 1.x, 2.x or XL from a diffusers folder, or from the hub as one."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.models.components import (
    REFINER,
    empty_network,
    fill_weights,
    find_weight,
    plain_name,
    plain_places,
    read_json,
    text_parts,
    wrong_architecture,
)
from mlm_plugin.models.tokenizers import is_tokenizer_folder, load_tokenizer, second_tokenizer
from mlm_plugin.models.weights_files import read_weights

__all__ = [
    "HUB_ID",
    "DiffusersFolder",
    "find_folder",
    "find_local_folder",
    "is_elsewhere",
    "load_vae_folder",
    "require_vae_folder",
    "weights_files_of",
]

FAMILY_OF_WIDTH = {768: "sd_v1", 1024: "sd_v2"}
MAX_REASON = 200  # characters of a library's message quoted in an error
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS_NAME = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>(?!safetensors|bin)\w+))?"
    r"(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


def find_folder(source: str, *, option: str) -> Path:
    """The folder ``source`` names, or the snapshot of a hub id (downloaded, or from the cache).

    Args:
        source: folder or hub id.
        option: the option it was given with, for the error.

    Raises:
        UserError: neither exists, or the hub has no weights.
    """
    if Path(source).is_dir():
        return Path(source)
    if not HUB_ID.fullmatch(source):
        raise UserError(
            f"{option}: {source} does not exist (a file, a folder or a hub id org/name)"
        )
    reason = "nor on the hub: it has no weights there"
    for variant in (None, "fp16"):
        try:
            with _quiet_hub():
                folder = Path(_download(source, variant=variant))
        except (OSError, ValueError) as error:
            reason = _why_not_from_hub(error)
            continue
        if any(WEIGHTS_NAME.fullmatch(path.name) for path in folder.rglob("*")):
            return folder
    raise UserError(f"{option}: {source} is not a file or folder here, {reason}")


def _why_not_from_hub(error: Exception) -> str:
    """How a message goes on after "is not a file or folder here, "."""
    chain, cause = [], error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    names = {base.__name__ for one in chain for base in type(one).__mro__}
    if names & {"RepositoryNotFoundError", "GatedRepoError"}:
        return "nor on the hub; a private or gated model needs `huggingface-cli login`"
    if names & {
        "OfflineModeIsEnabled",
        "ConnectionError",
        "ConnectError",
        "LocalEntryNotFoundError",
    }:
        return (
            "and the hub cannot be reached; check the name and the network, or give a folder or "
            "file on this machine"
        )
    text = " ".join(str(error).split("\n")[0].split())
    return f"nor on the hub ({textwrap.shorten(text, MAX_REASON, placeholder=' ...')})"


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the hints of libraries about a hub that cannot be reached: the error says it."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def is_elsewhere(source: str) -> bool:
    """Whether it is a hub id, and not on this machine."""
    if Path(source).exists() or not HUB_ID.fullmatch(source):
        return False
    try:
        snapshot_download(source, local_files_only=True)
    except (OSError, ValueError):
        return True
    return False


def find_local_folder(source: str, *, option: str) -> Path:
    """The folder ``source`` names, or the snapshot of a hub id that is already on this machine.

    Raises:
        UserError: neither is on this machine.
    """
    if Path(source).is_dir():
        return Path(source)
    if HUB_ID.fullmatch(source):
        try:
            return Path(snapshot_download(source, local_files_only=True))
        except (OSError, ValueError):  # the hub's own errors are these
            pass
    raise UserError(f"{option}: {source} is not on this machine (a file, a folder or a hub id)")


class DiffusersFolder:
    """A model as a diffusers folder.

    Args:
        folder: contains ``model_index.json`` and a folder for each part.
        name: what the user called it, for errors.

    Attributes:
        family: ``sd_v1``, ``sd_v2`` or ``sdxl``.
        configs: the folder, which has a configuration for each part.
        scheduler: configuration of its scheduler; empty if it has none.
        tokenizers: one for each text encoder; none if the folder lacks the first.

    Raises:
        UserError: a configuration is missing or damaged, or it is a model of another kind.
    """

    def __init__(self, folder: Path, *, name: str):
        self.name, self.configs = name, folder
        self.family = _family(folder, source=name)
        self.scheduler = read_json(folder / "scheduler" / "scheduler_config.json", optional=True)
        self.tokenizers = _tokenizers(folder, count=len(text_parts(self.family)))

    def load(self, part: str, dtype: torch.dtype) -> nn.Module:
        """One of the networks, on the CPU.

        Args:
            part: name of a field of ``Components``.
            dtype: precision of its weights.

        Raises:
            UserError: the part is missing, damaged or incomplete.
        """
        if part == "vae":
            return load_vae_folder(self.configs, source=self.name, dtype=dtype)
        return _load(part, self.configs / part, dtype=dtype)

    def unet_weights(self, _unet: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
        """Some weights of the U-Net by name; the others are not read.

        Raises:
            UserError: a tensor is missing.
        """
        folder = self.configs / "unet"
        state: dict[str, Tensor] = {}
        for path in weights_files_of(folder):
            state |= read_weights(path)
        return {name: find_weight(state, name, path=folder) for name in names}


def load_vae_folder(folder: Path, *, source: str, dtype: torch.dtype) -> nn.Module:
    """Load a VAE from its own folder or from ``vae`` inside a model's.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return _load("vae", _vae_place(folder, source=source), dtype=dtype)


def require_vae_folder(folder: Path, *, source: str) -> None:
    """Refuse a folder without a VAE or its weights.

    Raises:
        UserError: as in :func:`load_vae_folder`, except for damaged weights.
    """
    weights_files_of(_vae_place(folder, source=source))


def _vae_place(folder: Path, *, source: str) -> Path:
    for place in (folder / "vae", folder):
        config = read_json(place / "config.json", optional=True)
        if config.get("_class_name") == "AutoencoderKL":
            return place
    raise UserError(f"{source} holds no VAE (neither vae/config.json nor config.json of one)")


def _download(hub_id: str, *, variant: str | None) -> str:
    return DiffusionPipeline.download(
        hub_id, variant=variant, safety_checker=None, feature_extractor=None
    )


def _tokenizers(folder: Path, *, count: int) -> list:
    first, second = folder / "tokenizer", folder / "tokenizer_2"
    if not is_tokenizer_folder(first):
        return []
    tokenizers = [load_tokenizer(first)]
    if count == 2:
        has_own = is_tokenizer_folder(second)
        tokenizers.append(load_tokenizer(second) if has_own else second_tokenizer(tokenizers[0]))
    return tokenizers


def _family(folder: Path, *, source: str) -> str:
    kind = read_json(folder / "model_index.json", optional=True).get("_class_name", "a pipeline")
    if (folder / "transformer").is_dir():
        raise wrong_architecture(source, f"{kind} (with a transformer)")
    is_sdxl = (folder / "text_encoder_2").is_dir()
    if is_sdxl and not (folder / "text_encoder").is_dir():
        raise wrong_architecture(source, REFINER)
    parts = ("unet", *text_parts("sdxl" if is_sdxl else "sd_v1"))
    for part in parts:
        if not (folder / part / "config.json").is_file():
            raise UserError(
                f"{source} is not a diffusers model folder: {part}/config.json is missing "
                "(give the folder that holds model_index.json, or a checkpoint file)"
            )
    unet, *clips = [read_json(folder / part / "config.json") for part in parts]
    channels, width = unet.get("in_channels", 4), unet.get("cross_attention_dim", 1280)
    if channels != 4:
        raise wrong_architecture(source, f"{kind} with {channels} input channels")
    if width != sum(clip.get("hidden_size", 512) for clip in clips):
        raise wrong_architecture(source, f"{kind} with context width {width}")
    if is_sdxl:
        return "sdxl"
    openai_clip = clips[0].get("hidden_act", "quick_gelu") == "quick_gelu"
    return FAMILY_OF_WIDTH.get(width, "sd_v1" if openai_clip else "sd_v2")


def _load(part: str, folder: Path, *, dtype: torch.dtype) -> nn.Module:
    """A part from its own folder."""
    network = empty_network(part, folder)
    state = {}
    for path in weights_files_of(folder):
        state |= {plain_name(name): tensor for name, tensor in read_weights(path).items()}
    fill_weights(network, plain_places, state, prefix="", path=folder, dtype=dtype)
    return network


def weights_files_of(folder: Path) -> list[Path]:
    """The weights of one part; safetensors if available.

    The files without a variant, else those of fp16, else those of the first variant.

    Raises:
        UserError: the folder holds no weights.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*")):
        if match := WEIGHTS_NAME.fullmatch(path.name):
            found.setdefault(match["variant"] or "", []).append(path)
    if not found:
        raise UserError(f"{folder} holds no weights (*.safetensors or *.bin)")
    files = found[min(found, key=lambda variant: (variant not in ("", "fp16"), variant))]
    return [path for path in files if path.suffix == ".safetensors"] or files
