"""Run a script of sd-scripts with the MLM term: its own command line, plus ours."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mlm_plugin.config.checks import no_gradient_message
from mlm_plugin.config.options import OPTIONS
from mlm_plugin.errors import UserError
from mlm_plugin.sd_scripts.arguments import (
    WITH_CROSS_ATTENTION,
    add_mlm_arguments,
    answer_in_one_line,
    read_at,
    read_mlm_options,
    read_watch_options,
    why_script_has_no_gradient,
    why_script_trains_no_text,
)
from mlm_plugin.sd_scripts.locate import LaunchOptions, check_libraries

__all__ = ["SCRIPTS", "Script", "architecture_of", "choose_script", "train"]

logger = logging.getLogger(__name__)

PIPELINES = {
    "StableDiffusionXL": "sdxl",
    "StableDiffusion3": "sd3",
    "Flux": "flux",
    "Lumina2": "lumina",
}
"""Prefix of a diffusers pipeline's name, and its architecture."""

KEYS = {
    "conditioner.embedders.1.": "sdxl",
    "model.diffusion_model.label_emb.": "sdxl",
    "model.diffusion_model.joint_blocks.": "sd3",
    "model.diffusion_model.double_blocks.": "flux",
    "byt5_in.": "hunyuan_image",  # which has double blocks too
    "double_blocks.": "flux",
    "single_transformer_blocks.": "flux",
    "net.llm_adapter.": "anima",
    "llm_adapter.": "anima",
    "model.diffusion_model.context_refiner.": "lumina",
    "context_refiner.": "lumina",
}
"""Prefix of a weight's name that only files of this architecture have."""

FUSED = ("fused_backward_pass", "fused_optimizer_groups")
"""Options of sdxl_train.py with which a weight is trained as soon as its gradient arrives."""

UNPACKED_MODEL = "training_models = training_models[0]"
"""In ``train_db.py`` up to v0.11.1: what follows needs a list."""

HELPER_MODULES = ("library.train_util", "library.args", "library.accelerator_setup")
"""Modules with the shared code of the scripts, by version, oldest first."""
LOADER_MODULES = {
    "sd": ("library.train_util", "library.model_io"),
    "sdxl": ("library.sdxl_train_util",),
}
"""Modules that load whole models, by architecture and version."""


class Script(NamedTuple):
    """A script of sd-scripts and how the term is added to it."""

    file: str
    arch: str
    method: str
    run: Callable[[ModuleType, Script, argparse.Namespace], None]
    trainer: str | None = None  # its class; None where the loop is a function


def train(argv: Sequence[str], checkout: Path, options: LaunchOptions) -> int:
    """Run the script chosen by the options, as if it had been started directly.

    Args:
        argv: the whole command line without the program name.
        checkout: root of sd-scripts.
        options: parsed from ``argv`` before.

    Returns:
        Exit code 0.

    Raises:
        UserError: a checkout, library or option that does not fit.
    """
    check_libraries(checkout)
    script = choose_script(options)
    module = _import_script(checkout, script)
    sys.argv = [str(checkout / script.file), *argv]  # the script also reads the config file
    parser = module.setup_parser()
    add_mlm_arguments(parser)
    answer_in_one_line(parser)
    args = parser.parse_args()
    _helper("verify_command_line_training_args")(args)
    args = _helper("read_config_from_file")(args, parser)
    finish_options(script, args)
    refuse_watching(script, args)
    script.run(module, script, args)
    return 0


def finish_options(script: Script, args: argparse.Namespace) -> None:
    """Do what the script does with its options when it is started directly.

    Raises:
        UserError: the script would train nothing.

    Source: the ends of sd-scripts ``anima_train_network.py`` and ``flux_train_network.py``.
    """
    if script.arch == "anima" and getattr(args, "attn_mode", None) == "sdpa":
        args.attn_mode = "torch"
    if script.arch in ("anima", "flux") and getattr(args, "show_timesteps", None):
        raise UserError(
            f"show_timesteps: only shows the timesteps and trains nothing; start {script.file} of "
            "sd-scripts itself with it, or leave it out"
        )


def refuse_watching(script: Script, args: argparse.Namespace) -> None:
    """Refuse a page or a ranking of files in scripts that save them without a network.

    Raises:
        UserError: names the first such option.
    """
    given = read_watch_options(args).given
    if given and script.method != "lora":
        raise UserError(
            f"{given[0]}: {script.file} has no network whose files could be watched; leave it out, "
            "or use --host standalone"
        )


def choose_script(options: LaunchOptions) -> Script:
    """The script by name, or by method and architecture.

    Raises:
        UserError: no script fits.
    """
    if options.mlm_script is not None:
        name = Path(options.mlm_script).name.removesuffix(".py") + ".py"
        by_name = {script.file: script for script in SCRIPTS}
        if name not in by_name:
            raise UserError(
                f"mlm_script = {options.mlm_script!r}: the MLM term cannot be added to it; "
                "use one of " + ", ".join(by_name)
            )
        return by_name[name]
    methods = list(dict.fromkeys(script.method for script in SCRIPTS))
    if options.method not in methods:
        raise UserError(
            f"method = {options.method!r} is only in the standalone trainer; add --host standalone "
            f"(in sd-scripts: {', '.join(methods)})"
        )
    arch = options.mlm_arch
    if arch == "auto":
        arch = architecture_of(options.pretrained_model_name_or_path)
    if arch == "hunyuan_image":
        raise UserError(
            f"{options.pretrained_model_name_or_path}: no tool trains the text encoders of "
            "HunyuanImage, and the MLM term cannot read its transformer; train it with sd-scripts' "
            "own script"
        )
    for script in SCRIPTS:
        if (script.method, script.arch) == (options.method, arch):
            return script
    serving = [script.file for script in SCRIPTS if script.arch == arch]
    raise UserError(
        f"method = {options.method!r}: the MLM term cannot be added to it for mlm_arch = {arch!r}, "
        f"only to {', '.join(serving)}; train it with sd-scripts' own script, or use "
        "method = 'lora'"
    )


def architecture_of(model: str | None) -> str:
    """A value of ``mlm_arch``, from the contents of a checkpoint.

    Reads names only: the header of a safetensors file or the index of a diffusers folder.

    Raises:
        UserError: it cannot be determined.
    """
    if model is None:
        return "sd"  # the script reports the missing model
    path = Path(model)
    if path.is_dir():
        index = path / "model_index.json"
    elif path.is_file():
        return _arch_of_file(path)
    else:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "model_index.json") if model.count("/") == 1 else None
        index = Path(found) if isinstance(found, str) else path
    if not index.is_file():
        raise UserError(
            f"{model}: cannot tell its architecture before it is loaded; give --mlm_arch: "
            + ", ".join(OPTIONS["mlm_arch"].choices[1:])
        )
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "")
    for mark, arch in PIPELINES.items():
        if name.startswith(mark):
            return arch
    return "sd"


def _arch_of_file(path: Path) -> str:
    if path.suffix not in (".safetensors", ".sft"):
        logger.info("%s is taken for SD 1 or 2; give --mlm_arch if it is not", path.name)
        return "sd"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from error
    for mark, arch in KEYS.items():
        if any(name.startswith(mark) for name in names):
            return arch
    return "sd"


def _import_script(checkout: Path, script: Script) -> ModuleType:
    """Import the script as a module from this checkout.

    Raises:
        UserError: it or one of its imports is missing, or another checkout is imported instead.
    """
    if not (checkout / script.file).is_file():
        raise UserError(f"{checkout}: has no {script.file}; update sd-scripts")
    sys.path.insert(0, str(checkout))
    try:
        module = importlib.import_module(script.file.removesuffix(".py"))
    except ImportError as error:
        raise UserError(
            f"{checkout / script.file} cannot be imported ({error}); install what its "
            "requirements.txt names into this environment"
        ) from error
    library = sys.modules.get("library")
    if library and not Path(str(library.__file__)).resolve().is_relative_to(checkout):
        raise UserError(
            f"the package `library` comes from {library.__file__}, not from {checkout}; remove it "
            "(pip uninstall library) or use that checkout"
        )
    return module


def _helper(name: str) -> Callable[..., Any]:
    """A function of sd-scripts, wherever it is in this version."""
    for module in HELPER_MODULES:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise UserError(
        f"this sd-scripts is newer than the plug-in knows: no {name}; update mlm_plugin"
    )


def _run_network(module: ModuleType, script: Script, args: argparse.Namespace) -> None:
    """Our network module adds the term by itself, and reads the same options."""
    from mlm_plugin.sd_scripts.mixin import with_mlm
    from mlm_plugin.sd_scripts.network_module import MODULE

    trainer = getattr(module, script.trainer)
    if args.network_module != MODULE:
        trainer = with_mlm(trainer, arch=script.arch)
    trainer().train(args)


def _run_embedding(module: ModuleType, script: Script, args: argparse.Namespace) -> None:
    from mlm_plugin.sd_scripts.patches import with_mlm_embedding

    trainer = getattr(module, script.trainer)
    with_mlm_embedding(trainer, arch=script.arch, strategies=_strategies())().train(args)


def _run_function(module: ModuleType, script: Script, args: argparse.Namespace) -> None:
    from mlm_plugin.sd_scripts.data import has_weighted_captions
    from mlm_plugin.sd_scripts.patches import (
        ScriptFacts,
        collected_text_encoders,
        frozen_text_encoders,
        summed_backward,
    )
    from mlm_plugin.sd_scripts.term import MLMTerm

    options = read_mlm_options(args)
    if not options.mlm_loss_weight:
        _require_that_it_can_stop(module, script, args)
        module.train(args)
        return
    if reason := why_script_has_no_gradient(args, options, file=script.file, arch=script.arch):
        elsewhere = script.arch in WITH_CROSS_ATTENTION
        raise UserError(no_gradient_message(options, reason, elsewhere=elsewhere))
    if getattr(args, "deepspeed", False):
        raise UserError(
            f"deepspeed: {script.file} wraps its models into one, in which the MLM term cannot "
            "find them; leave it out, or set mlm_loss_weight = 0"
        )
    trains_text = why_script_trains_no_text(args, file=script.file) is None
    place = read_at(options, arch=script.arch, trains_text=trains_text, trains_unet=False)
    _refuse_two_backward_passes(args, place)
    _require_that_it_can_stop(module, script, args)
    term = MLMTerm(
        options,
        seed=args.seed,
        mixed_precision=getattr(args, "mixed_precision", None),
        weighted_captions=has_weighted_captions(args),
    )
    facts = ScriptFacts(script.arch, getattr(args, "clip_skip", None), _current_tokenizers)
    if trains_text:
        collected = collected_text_encoders(term, facts)
    else:
        collected = frozen_text_encoders(term, facts, _loaders(script.arch))
    with collected, summed_backward(term, _strategies(), trains_text=trains_text):
        module.train(args)


def _refuse_two_backward_passes(args: argparse.Namespace, place: str) -> None:
    """Checkpointing of kohya's U-Nets has a backward pass of its own, besides the term's.

    Raises:
        UserError: an optimizer that steps within them would step twice at the keys and values, and
            several processes would exchange their gradients before they are complete.
    """
    if place == "encoder" or not getattr(args, "gradient_checkpointing", False):
        return
    fused = [name for name in FUSED if getattr(args, name, None)]
    several = ["training on several GPUs"] if int(os.environ.get("WORLD_SIZE", "1")) > 1 else []
    if obstacles := fused + several:
        raise UserError(
            f"{obstacles[0]} with gradient_checkpointing: the term reads the U-Net here "
            f"(mlm_read_at = {place}), and under both the gradients come twice where it does; "
            "leave one of them out, train the text encoder with mlm_read_at = encoder, or set "
            "mlm_loss_weight = 0"
        )


def _require_that_it_can_stop(module: ModuleType, script: Script, args: argparse.Namespace) -> None:
    """Refuse a stop of the text encoder that would end the run with a TypeError of the script.

    Raises:
        UserError: it is asked for, and the script unpacks a single model as a list there.
    """
    stop = getattr(args, "stop_text_encoder_training", None)
    if stop is None or int(stop) < 0 or UNPACKED_MODEL not in inspect.getsource(module.train):
        return
    by_epochs = getattr(args, "max_train_epochs", None) is not None
    if by_epochs or int(stop) < int(args.max_train_steps):
        raise UserError(
            f"stop_text_encoder_training = {stop}: at that step this {script.file} ends with a "
            "TypeError, with or without the MLM term; leave it out, or use --host standalone, "
            "which can stop there"
        )


def _loaders(arch: str) -> list[ModuleType]:
    """The modules whose ``load_target_model`` the scripts of an architecture may call.

    Raises:
        UserError: this version of sd-scripts has none.
    """
    found = []
    for name in LOADER_MODULES[arch]:
        with suppress(ImportError):
            found.append(importlib.import_module(name))
    found = [module for module in found if hasattr(module, "load_target_model")]
    if not found:
        raise UserError(
            "this sd-scripts is newer than the plug-in knows: no load_target_model; update "
            "mlm_plugin, or train the text encoder too"
        )
    return found


def _strategies() -> list[type]:
    from library.strategy_sd import SdTextEncodingStrategy
    from library.strategy_sd3 import Sd3TextEncodingStrategy
    from library.strategy_sdxl import SdxlTextEncodingStrategy

    return [SdTextEncodingStrategy, SdxlTextEncodingStrategy, Sd3TextEncodingStrategy]


def _current_tokenizers() -> list[Any]:
    from mlm_plugin.sd_scripts.architectures import current_architecture, tokenize_strategy

    names = current_architecture("train_network_mlm.py").tokenizers
    return [getattr(tokenize_strategy("train_network_mlm.py"), name) for name in names]


SCRIPTS = (
    Script("train_network.py", "sd", "lora", _run_network, "NetworkTrainer"),
    Script("sdxl_train_network.py", "sdxl", "lora", _run_network, "SdxlNetworkTrainer"),
    Script("sd3_train_network.py", "sd3", "lora", _run_network, "Sd3NetworkTrainer"),
    Script("flux_train_network.py", "flux", "lora", _run_network, "FluxNetworkTrainer"),
    Script("anima_train_network.py", "anima", "lora", _run_network, "AnimaNetworkTrainer"),
    Script("lumina_train_network.py", "lumina", "lora", _run_network, "LuminaNetworkTrainer"),
    Script(
        "train_textual_inversion.py",
        "sd",
        "textual_inversion",
        _run_embedding,
        "TextualInversionTrainer",
    ),
    Script(
        "sdxl_train_textual_inversion.py",
        "sdxl",
        "textual_inversion",
        _run_embedding,
        "SdxlTextualInversionTrainer",
    ),
    Script("train_db.py", "sd", "dreambooth", _run_function),
    Script("sdxl_train.py", "sdxl", "dreambooth", _run_function),
    Script("sd3_train.py", "sd3", "dreambooth", _run_function),
    Script("fine_tune.py", "sd", "dreambooth", _run_function),  # by name only
)
