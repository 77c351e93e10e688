"""`mlm-plugin evaluate`: draw, score, report; an interrupted run continues."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mlm_plugin.config.options import LogOptions
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.comparison import compare
from mlm_plugin.evaluation.eval_prompts import (
    EvaluationPrompt,
    evaluation_prompts,
    load_templates,
    picture_seed,
)
from mlm_plugin.evaluation.evaluated_model import (
    EvaluatedModel,
    LearnedFiles,
    LoadSettings,
    drawing_dtype,
    load_evaluated_model,
)
from mlm_plugin.evaluation.evaluation_page import evaluation_page
from mlm_plugin.evaluation.generate import (
    PICTURES,
    DrawingSettings,
    claim_folder,
    draw_pictures,
    forget_claim_without_pictures,
)
from mlm_plugin.evaluation.image_measures import (
    Judges,
    check_photos,
    find_masks,
    find_photos,
    score_pictures,
)
from mlm_plugin.evaluation.metric_models import Clip, Dino, load_clip, load_dino
from mlm_plugin.evaluation.options import NO_MODEL, EvaluateCommand, EvaluateOptions
from mlm_plugin.evaluation.oracle_judge import (
    OracleJudge,
    find_oracle,
    load_oracle_judge,
    why_not_judged,
)
from mlm_plugin.evaluation.rendering import write_report
from mlm_plugin.evaluation.results import measure_key, measures_of, value_of, write_results
from mlm_plugin.evaluation.text_encoders import (
    LEARNED,
    check_contextualizers,
    measure_text,
    text_protocol,
)
from mlm_plugin.evaluation.text_measures import headline
from mlm_plugin.evaluation.versions import library_versions
from mlm_plugin.files import require_writable
from mlm_plugin.models.weights_files import WEIGHTS_SUFFIXES, without_suffix
from mlm_plugin.pocket.scores import IDENTITY_SCALE
from mlm_plugin.setup.builtin_names import data_path, model_path
from mlm_plugin.setup.console import quiet_libraries, setup_console

__all__ = ["run_evaluate"]

logger = logging.getLogger(__name__)

# Options that do not change the pictures.
NOT_IN_PICTURES = {"train_data_dir", "output", "prompts", "num_images_per_prompt", "batch_size",
                   "clip_model", "dino_model", "masks", "mlm_contextualizer", "label",
                   "tokenizer_cache_dir"}  # fmt: skip


def run_evaluate(command: EvaluateCommand) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserError: from any of the steps.
    """
    options = command.options
    setup_console(LogOptions())
    quiet_libraries()
    output = Path(options.output)
    require_writable(output, "--output")
    if command.text_only and any((output / PICTURES).glob("*.png")):
        raise UserError(
            f"--text_only: {output} holds an evaluation with pictures, whose results would be "
            "replaced; choose another --output"
        )
    if command.compare:
        print(f"wrote {compare(command.compare, output)}")
        return 0
    results = _evaluate(options, output, text_only=command.text_only)
    write_results(output, results)
    report = write_report(output, evaluation_page(results, output))
    _print_measures(results)
    print(f"wrote {report}")
    return 0


def _print_measures(results: dict[str, Any]) -> None:
    taken = {
        measure: value
        for name, measure in measures_of([results]).items()
        if (value := value_of(results, name)) is not None
    }
    width = max((len(measure.title) for measure in taken), default=0)
    for measure, value in taken.items():
        print(f"  {measure.title:<{width}} {value:8.4f}   {measure.meaning}")


class _Pictures(NamedTuple):
    """What was drawn, and its scores."""

    files: Sequence[Sequence[Path]]  # by prompt
    photos: Sequence[Path]
    scores: dict[str, Any]
    protocol: dict[str, str]


def _evaluate(options: EvaluateOptions, output: Path, *, text_only: bool) -> dict[str, Any]:
    """Everything in ``results.json``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = evaluation_prompts(
        load_templates(options.prompts, class_token=options.class_token),
        placeholder_token=options.placeholder_token,
        class_token=options.class_token,
    )
    load = functools.cache(lambda: _load(options, device))
    files = _digests(options)
    if text_only:
        pictures = _no_pictures(len(prompts))
    else:
        pictures = _draw_and_score(options, output, prompts, files, load=load, device=device)
    model = load()
    text = measure_text(options, model, prompts, device)
    return {
        **_description(options, model, files, device),
        "judges": pictures.protocol | text_protocol(text),
        "measures": pictures.scores["measures"],
        "references": pictures.scores["references"],
        "photos": [str(photo) for photo in pictures.photos],
        "prompts": [
            _prompt_row(options, prompt, pictures, index=i) for i, prompt in enumerate(prompts)
        ],
        "text": text,
        "text_headline": {
            measure_key(name, encoder): value
            for encoder, groups in text.items()
            for name, value in headline(groups).items()
        },
    }


def _draw_and_score(
    options: EvaluateOptions,
    output: Path,
    prompts: Sequence[EvaluationPrompt],
    files: dict[str, Any],
    *,
    load: Callable[[], EvaluatedModel],
    device: torch.device,
) -> _Pictures:
    photos = find_photos(data_path(options.train_data_dir))
    check_photos(photos)
    masks = find_masks(options.masks)
    if masks and not any(photo.stem in masks for photo in photos):
        raise UserError(
            f"--masks {options.masks}: no mask is named as a photo of --train_data_dir; name them "
            "as the pictures that they belong to"
        )
    clip, dino = _metric_models(options, device)  # before hours of drawing, as they may be missing
    oracle, oracle_protocol = _oracle(options, prompts)
    how = _picture_settings(options, prompts, files)
    forget_claim_without_pictures(output, how)
    claim_folder(output, how)
    settings = DrawingSettings(
        num_images=options.num_images_per_prompt,
        seed=options.seed,
        steps=options.steps,
        scale=options.scale,
        negative_prompt=options.negative_prompt,
        resolution=options.resolution,
        batch_size=options.batch_size,
    )
    pictures = draw_pictures(output, prompts, settings, load=load)
    judges = Judges(clip, dino, oracle)
    scores = score_pictures(pictures, prompts, photos, judges, masks=masks)
    protocol = _protocol(judges, scores, masked=bool(masks)) | oracle_protocol
    return _Pictures(pictures, photos, scores, protocol)


def _no_pictures(num_prompts: int) -> _Pictures:
    scores = {
        "measures": {},
        "references": {},
        "per_prompt": [{} for _ in range(num_prompts)],
        "per_picture": [[] for _ in range(num_prompts)],
    }
    return _Pictures([[] for _ in range(num_prompts)], [], scores, {})


def _description(
    options: EvaluateOptions, model: EvaluatedModel, files: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """What was evaluated, when, and with what."""
    return {
        "created": time.strftime("%Y-%m-%d %H:%M %z"),
        "label": options.label or _label(options),
        "concept": {
            "placeholder_token": options.placeholder_token,
            "class_token": options.class_token,
        },
        "model": {
            "family": model.family,
            "resolution": options.resolution or model.resolution,
        },
        "settings": dataclasses.asdict(options),
        "files": files,
        "versions": library_versions(device),
    }


def _load(options: EvaluateOptions, device: torch.device) -> EvaluatedModel:
    files = {field.name: getattr(options, field.name) for field in dataclasses.fields(LearnedFiles)}
    settings = LoadSettings(
        clip_skip=options.clip_skip,
        sampler=options.sampler,
        dtype=drawing_dtype(options.precision, device),
        tokenizer_cache_dir=options.tokenizer_cache_dir,
        v_parameterization=options.v_parameterization,
        zero_terminal_snr=options.zero_terminal_snr,
        max_token_length=options.max_token_length,
    )
    model = load_evaluated_model(
        model_path(options.pretrained_model_name_or_path),
        LearnedFiles(**files),
        placeholder_token=options.placeholder_token,
        settings=settings,
    )
    check_contextualizers(options, model)  # before hours of drawing, as they may not fit
    return model.to(device)


def _metric_models(
    options: EvaluateOptions, device: torch.device
) -> tuple[Clip | None, Dino | None]:
    clip = load_clip(options.clip_model, device=device) if options.clip_model != NO_MODEL else None
    dino = load_dino(options.dino_model, device=device) if options.dino_model != NO_MODEL else None
    return clip, dino


def _oracle(
    options: EvaluateOptions, prompts: Sequence[EvaluationPrompt]
) -> tuple[OracleJudge | None, dict[str, str]]:
    """The judge of a pocket model, if it is known what the prompts ask for, and its protocol."""
    path = find_oracle(model_path(options.pretrained_model_name_or_path))
    if path is None:
        return None, {}
    if reason := why_not_judged(options.prompts, resolution=options.resolution):
        logger.warning("the oracle is left out: %s", reason)
        return None, {"Oracle left out": reason}
    oracle = load_oracle_judge(path, options.prompts)
    how = {
        "Oracle": oracle.name,
        "Prompt fidelity": "share of what the prompt asks, but the subject, that the oracle sees",
        "Identity": f"look of {oracle.concept.name}: exp(−(d / {IDENTITY_SCALE})²), d the root "
        "mean square difference of RGB values in [0, 1] where it is smallest",
    }
    if unlabelled := sum(prompt.template not in oracle.labels.captions for prompt in prompts):
        logger.warning("%d prompts have no labels: the oracle scores identity alone", unlabelled)
        how["Prompts without labels"] = f"{unlabelled} of {len(prompts)}: identity alone"
    if oracle.accuracy:
        how["The oracle on true pictures"] = ", ".join(
            f"{name} {share:.1%}" for name, share in oracle.accuracy.items()
        )
    return oracle, how


def _picture_settings(
    options: EvaluateOptions, prompts: Sequence[EvaluationPrompt], files: dict[str, Any]
) -> dict[str, Any]:
    settings = {
        name: value
        for name, value in dataclasses.asdict(options).items()
        if name not in NOT_IN_PICTURES and name not in LEARNED
    }
    digests = {name: files[name]["sha256"] if name in files else None for name in LEARNED}
    return settings | digests | {"prompts": [prompt.prompt for prompt in prompts]}


def _digests(options: EvaluateOptions) -> dict[str, dict[str, str]]:
    """Path and SHA-256 of everything trained."""
    paths = {name: getattr(options, name) for name in LEARNED}
    return {
        name: {"path": path, "sha256": _digest(path)}
        for name, path in paths.items()
        if path is not None
    }


def _digest(path: str) -> str:
    """SHA-256 of a file, or of all weight files in a folder; a hub id has that of its name."""
    place = Path(path)
    if place.is_file():
        return _digest_of_file(place)
    if not place.is_dir():
        return hashlib.sha256(path.encode()).hexdigest()
    files = sorted(file for file in place.rglob("*") if file.suffix in WEIGHTS_SUFFIXES)
    lines = [f"{file.relative_to(place).as_posix()} {_digest_of_file(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _label(options: EvaluateOptions) -> str:
    paths = [getattr(options, name) for name in LEARNED if getattr(options, name)]
    if not paths:
        return "base model"
    return " + ".join(without_suffix(path) for path in paths)


def _prompt_row(
    options: EvaluateOptions, prompt: EvaluationPrompt, pictures: _Pictures, *, index: int
) -> dict[str, Any]:
    scores = pictures.scores
    return {
        **prompt._asdict(),
        "scores": scores["per_prompt"][index],
        "pictures": [
            {
                "file": f"{PICTURES}/{file.name}",
                "seed": picture_seed(options.seed, prompt.template, number),
                "scores": scores["per_picture"][index][number],
            }
            for number, file in enumerate(pictures.files[index])
        ],
    }


def _protocol(judges: Judges, scores: dict[str, Any], *, masked: bool) -> dict[str, str]:
    """How the pictures were scored, for the report."""
    clip, dino = judges.clip, judges.dino
    how = {}
    if clip:
        how["CLIP"] = clip.name
        how["CLIP-T"] = (
            "raw cosine of a picture and its prompt, the placeholder left out; as CustomConcept101 "
            f"writes it (× 2.5): {scores['measures']['clip_t']['custom_concept_101']:.4f}"
        )
        how["CLIP-I"] = "mean cosine of a picture and all photos"
        how["CLIP input"] = _input(clip.how)
    if dino:
        how["DINO"] = dino.name
        how["DINO likeness"] = "mean cosine of the CLS states of a picture and all photos"
        how["DINO input"] = _input(dino.how)
    for name, title in (("clip_i", "CLIP-I"), ("dino", "DINO")):
        if (value := scores["references"].get(name)) is not None:
            how[f"{title}, photos among themselves"] = f"{value:.4f}"
    if masked:
        counts = scores["num_masked"]
        how["Masks"] = (
            f"of {counts['pictures']} pictures and {counts['photos']} photos; the rest is filled "
            "with the mean colour"
        )
    how["Intervals"] = "95 % by Student's t over prompts, one mean each"
    return how


def _input(how: Any) -> str:
    return (
        f"shorter side to {how.shortest_edge} pixels (Pillow filter {how.resample}), middle "
        f"{how.crop} × {how.crop}, normalized as the model's processor says"
    )
