"""Finds the CLIP tokenizers that a checkpoint file does not contain, without the network.

Knows nothing about weights.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTokenizer, CLIPTokenizerFast

from mlm_plugin.errors import UserError

__all__ = ["find_tokenizers", "is_tokenizer_folder", "load_tokenizer", "second_tokenizer"]

logger = logging.getLogger(__name__)

SD1_TOKENIZER = "openai/clip-vit-large-patch14"
SD2_TOKENIZER = "stabilityai/stable-diffusion-2"
OPEN_CLIP_PADDING = "!"  # id 0
FILES = ("vocab.json", "merges.txt")
SHIPPED = Path(__file__).parent / "clip_tokenizer"
SHIPPED_SIZE = 49408  # tokens of CLIP's vocabulary


def find_tokenizers(
    family: str,
    *,
    vocab_size: int,
    cache_dir: str | os.PathLike | None = None,
    near: Path | None = None,
) -> list:
    """Load a model's tokenizers, two for SDXL, from the first location that has one; no network.

    Locations, in order: ``cache_dir`` as sd-scripts fills it (``openai_clip-vit-large-patch14`` or
    ``stabilityai_stable-diffusion-2``, with or without a ``tokenizer`` folder inside),
    ``cache_dir`` itself, a ``tokenizer`` folder at ``near``, the local Hugging Face cache, and for
    models with CLIP's vocabulary the one in this package. SD 1.x and 2.x share the vocabulary and
    differ in the padding, so either tokenizer serves both: SD 2.x pads with ``!`` instead of the
    end token, which is set here.

    Args:
        family: ``sd_v1``, ``sd_v2`` or ``sdxl``.
        vocab_size: tokens that the text encoder knows.
        cache_dir: ``--tokenizer_cache_dir``.
        near: folder of the checkpoint.

    Raises:
        UserError: none of them has a tokenizer; the message lists them.

    Source: sd-scripts ``library/strategy_base.py`` ``_load_tokenizer``, ``library/strategy_sd.py``.
    """
    hub_ids = [SD1_TOKENIZER, SD2_TOKENIZER]
    if family == "sd_v2":
        hub_ids.reverse()
    places = list(filter(is_tokenizer_folder, _places(hub_ids, cache_dir, near)))
    if vocab_size == SHIPPED_SIZE:
        places.append(SHIPPED)
    place = next(iter(places), None)
    if place is None:
        tried = "".join(f"{place}, " for place in (cache_dir, near and near / "tokenizer") if place)
        raise UserError(
            f"no CLIP tokenizer found (a checkpoint file carries none; looked in {tried}the "
            f"Hugging Face cache): set --tokenizer_cache_dir to a folder with "
            f"{' and '.join(FILES)}, or download {hub_ids[0]} once"
        )
    logger.info("tokenizer: %s", place)
    tokenizer = load_tokenizer(place)
    tokenizer.pad_token = OPEN_CLIP_PADDING if family == "sd_v2" else tokenizer.eos_token
    return [tokenizer, second_tokenizer(tokenizer)] if family == "sdxl" else [tokenizer]


def second_tokenizer(tokenizer):
    """The tokenizer of SDXL's second text encoder, made from the first one's.

    Same vocabulary; it pads with ``!`` (id 0) instead of the end token.

    Source: sd-scripts ``library/strategy_sdxl.py`` ``SdxlTokenizeStrategy``.
    """
    second = copy.deepcopy(tokenizer)
    second.pad_token = OPEN_CLIP_PADDING
    return second


def is_tokenizer_folder(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of CLIP's or Qwen's kind, byte-level BPE."""
    return _has_vocabulary(folder) or (folder / "tokenizer.json").is_file()


def load_tokenizer(folder: Path):
    """Read a CLIP tokenizer from its folder.

    Raises:
        UserError: damaged files.
    """
    # transformers 5 writes tokenizer.json alone, which the slow tokenizer of version 4 cannot read.
    cls = CLIPTokenizer if _has_vocabulary(folder) else CLIPTokenizerFast
    try:
        return cls.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: the tokenizer cannot be read ({error})") from error


def _has_vocabulary(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _places(
    hub_ids: list[str], cache_dir: str | os.PathLike | None, near: Path | None
) -> Iterator[Path]:
    if cache_dir is not None:
        for hub_id in hub_ids:
            cached = Path(cache_dir) / hub_id.replace("/", "_")
            yield from (cached, cached / "tokenizer")
        yield Path(cache_dir)
    if near is not None:
        yield near / "tokenizer"
    for hub_id in hub_ids:
        for name in ("vocab.json", "tokenizer/vocab.json"):
            found = try_to_load_from_cache(hub_id, name)
            if isinstance(found, str):
                yield Path(found).parent
