"""Pretraining of a contextualizer: text in, one file out, once per text encoder.

The text encoder stays frozen; the contextualizer's blocks and the mask vector learn to name masked
words of built-in contexts around hundreds of ordinary subjects (never a concept token) and of the
user's own captions. Knows no images and no concept. Shapes: B prompts, L tokens.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mlm_plugin.config.pretraining import RECIPE, SMALL_ENCODER, PretrainOptions
from mlm_plugin.contextualizer_file import (
    POOR_ACCURACY,
    ContextualizerFacts,
    LoadedContextualizer,
    cached_contextualizer_path,
    in_memory,
    load_and_report,
    read_contextualizer,
    related_contextualizer_paths,
    save_contextualizer,
)
from mlm_plugin.errors import UserError
from mlm_plugin.files import (
    atomic_path,
    cache_dir,
    disk_errors,
    remove_temporaries,
    writable_cache_dir,
)
from mlm_plugin.mlm.contextualizer import Contextualizer, ContextualizerSizes, default_width
from mlm_plugin.mlm.encoder import mask_embedding
from mlm_plugin.mlm.losses import MaskedWordLoss, masked_word_loss
from mlm_plugin.mlm.masking import MaskingVocabulary, mask_tokens, prompt_attention_mask
from mlm_plugin.mlm.prompts import PromptSet
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.prompt_sets.english import FUNCTION_WORDS, NEUTRAL_WORDS, subjects
from mlm_plugin.prompt_sets.files import BUILTIN
from mlm_plugin.training.interrupt import StopRequest

__all__ = [
    "Corpus",
    "FamilyScores",
    "Interrupted",
    "NotSaved",
    "Scores",
    "Start",
    "find_contextualizer",
    "find_start",
    "is_small",
    "pretrain",
    "pretrain_on_device",
    "read_caption_files",
]

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 20  # one prompt in twenty is never trained on
TAG_SHARE = 0.3
WIDE = 1024  # width of a text encoder above which a step's prompts are encoded in chunks
CHUNK_SIZE = 32  # prompts; 128 would take 4 GB of activations in bigG
NUM_COUNTED = 4096  # prompts that tell how often tokens occur
MAX_RELATED = 4  # cached contextualizers that are tried as a start
NUM_COMPARED = 128  # held-out prompts on which they are tried
RELATED = 0.5  # share of its accuracy that a contextualizer keeps on a similar text encoder


class FamilyScores(NamedTuple):
    """Held-out result of one family of contexts."""

    loss: float  # nats per masked token
    accuracy: float  # share of masked tokens predicted correctly


class Scores(NamedTuple):
    """Held-out result: overall and per family of contexts."""

    loss: float
    accuracy: float
    families: dict[str, FamilyScores]


class Interrupted(Exception):
    """Pretraining was stopped by a signal; its state file continues it."""

    def __init__(self, exit_code: int, state_path: Path | None):
        super().__init__(f"pretraining stopped; the same command continues from {state_path}")
        self.exit_code = exit_code


class NotSaved(OSError):
    """A contextualizer is pretrained, and its file cannot be written.

    Attributes:
        network: as trained.
        facts: how it was made.
    """

    def __init__(self, network: Contextualizer, facts: ContextualizerFacts, error: OSError):
        super().__init__(error.errno, " ".join(str(error).split()))
        self.network, self.facts = network, facts


class Corpus:
    """Text to learn from: built-in contexts around ordinary subjects, and the user's captions.

    Args:
        captions: the user's own.
        caption_share: how often they are drawn, where there are any.
    """

    def __init__(self, captions: Sequence[str] = (), *, caption_share: float = 0.5):
        self.captions, self.caption_share = list(captions), caption_share
        self.prompt_sets = {
            syntax: {name: PromptSet.load(name, syntax=syntax) for name in BUILTIN}
            for syntax in ("natural", "tags")
        }
        self.subjects = {name: subjects(name) for name in BUILTIN}

    def draw(self, rng: random.Random, *, held_out: bool) -> tuple[str, str]:
        """A text of one side of the split and its family; the sides never share a text."""
        while True:
            text, family = self._draw_any(rng)
            if (zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0) == held_out:
                return text, family

    def _draw_any(self, rng: random.Random) -> tuple[str, str]:
        if self.captions and rng.random() < self.caption_share:
            return rng.choice(self.captions), "captions"
        syntax = "tags" if rng.random() < TAG_SHARE else "natural"
        category = rng.choice(BUILTIN)
        context = self.prompt_sets[syntax][category].draw(rng)
        return context.text.replace("{}", rng.choice(self.subjects[category])), context.family


def read_caption_files(paths: Iterable[str | Path]) -> list[str]:
    """Captions from text files, one per line; empty lines are skipped.

    Raises:
        UserError: if a file is missing, empty, or not UTF-8 text.
    """
    captions: list[str] = []
    for path in map(Path, paths):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--captions: cannot read {path} ({error}); give UTF-8 text files"
            ) from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"--captions: {path} holds no caption; write one per line")
        captions += found
    return captions


def find_contextualizer(
    text_encoder: TextEncoder, setting: str, *, show_progress: bool = True
) -> LoadedContextualizer:
    """The given file, or the cached one for ``auto``: pretrained if it is missing or damaged.

    Call it before anything is trained: pretraining needs the untrained text encoder.

    Raises:
        UserError: the given file does not fit the text encoder.
        Interrupted: a signal stopped the pretraining.
    """
    if setting != "auto":
        return load_and_report(setting, text_encoder)
    path = cached_contextualizer_path(text_encoder)
    if path.is_file():
        try:
            return load_and_report(path, text_encoder)
        except UserError as error:
            logger.warning("%s; making it again", error)
    path = writable_cache_dir() / path.relative_to(cache_dir())
    options = SMALL_ENCODER if is_small(text_encoder) else PretrainOptions()
    start = find_start(text_encoder, options)
    if start is None:
        logger.info(
            "no contextualizer for this text encoder yet: pretraining one, only once, in at most "
            "%d steps; the bar says how long it will take",
            options.max_train_steps,
        )
    else:
        options = options.continued()
        logger.info(
            "no contextualizer for this text encoder yet: adapting that of a similar one, which "
            "names %.0f%% of hidden words here (only once)",
            100 * start.accuracy,
        )
    try:
        pretrain_on_device(
            text_encoder, path, options=options, start=start, show_progress=show_progress
        )
    except NotSaved as error:
        logger.warning(
            "%s: the contextualizer cannot be kept (%s); this run uses it from memory, and the "
            "next one makes it again",
            path,
            error.strerror,
        )
        return in_memory(error.network, error.facts)
    return load_and_report(path, text_encoder)


class Start(NamedTuple):
    """The contextualizer of a similar text encoder, and what it can do here untrained."""

    network: Contextualizer
    accuracy: float
    made_for: str  # fingerprint of its text encoder


def find_start(text_encoder: TextEncoder, options: PretrainOptions) -> Start | None:
    """Where pretraining can start: the best cached contextualizer that reads this encoder too.

    A fine-tuned text encoder keeps the states of its base so nearly that the contextualizer of one
    reads the other. Which encoders are related is told by that alone.

    Args:
        text_encoder: has none of its own yet.
        options: name the held-out prompts and the sizes.
    """
    paths = related_contextualizer_paths(text_encoder)[:MAX_RELATED]
    if not paths:
        return None
    best: Start | None = None
    run = _Run(text_encoder, paths[0], options=replace(options, num_held_out=NUM_COMPARED))
    for path in paths:
        try:
            network, facts = read_contextualizer(path)
        except UserError as error:
            logger.debug("%s", error)
            continue
        if network.sizes != run.network.sizes:
            continue
        run.network.load_state_dict(network.state_dict())
        with _frozen(text_encoder):
            run.evaluate()
        accuracy = run.scores.accuracy
        if accuracy > max(POOR_ACCURACY, RELATED * facts.accuracy, best.accuracy if best else 0):
            best = Start(network, accuracy, facts.text_encoder)
    return best


def is_small(text_encoder: TextEncoder) -> bool:
    """Whether the encoder is far smaller than those of Stable Diffusion (768 and up)."""
    return text_encoder.token_embedding.embedding_dim < 512


def pretrain_on_device(
    text_encoder: TextEncoder,
    path: Path,
    *,
    options: PretrainOptions,
    captions: Sequence[str] = (),
    start: Start | None = None,
    show_progress: bool = True,
) -> Scores:
    """Pretrain on the text encoder's device; in bf16 where the GPU has it, else in fp32."""
    weight = text_encoder.token_embedding.weight
    dtype, device = weight.dtype, weight.device
    if device.type == "cpu" and not is_small(text_encoder):
        logger.warning(
            "pretraining the contextualizer of a full-size text encoder on a CPU takes hours; "
            "a GPU takes minutes, and the file can be carried over (--mlm_contextualizer FILE)"
        )
    text_encoder.model.float()  # lossless for half weights, and undone below
    try:
        return pretrain(
            text_encoder,
            path,
            options=options,
            captions=captions,
            start=start,
            show_progress=show_progress,
        )
    finally:
        text_encoder.model.to(dtype)


def pretrain(
    text_encoder: TextEncoder,
    output: str | Path,
    *,
    options: PretrainOptions,
    captions: Sequence[str] = (),
    start: Start | None = None,
    show_progress: bool = True,
) -> Scores:
    """Train a contextualizer for ``text_encoder`` and write it to ``output``.

    It begins with the weights of ``start``, if any. A state file beside ``output`` is written at
    every evaluation and on SIGINT or SIGTERM; the same call continues from it. The text encoder is
    not changed.

    Returns:
        Held-out scores of the saved network, which is the best of all evaluations.

    Raises:
        Interrupted: after a signal, with the state saved.
        NotSaved: the file cannot be written; the exception holds the network.
    """
    run = _Run(
        text_encoder,
        Path(output),
        options=options,
        captions=captions,
        start=start,
    )
    with StopRequest() as stop, _frozen(text_encoder):
        run.resume()
        bar = tqdm(
            total=options.max_train_steps,
            initial=run.step,
            desc="contextualizer",
            disable=not show_progress,
        )
        with bar:
            while not run.finished:
                loss = run.train_step()
                bar.update()
                if run.step % options.eval_every_n_steps == 0 or run.finished:
                    run.evaluate()
                    run.save_state()
                    bar.set_postfix(
                        loss=f"{loss.item():.2f}", held_out=f"{run.scores.accuracy:.1%}"
                    )
                if stop:
                    run.save_state()
                    raise Interrupted(stop.exit_code, run.state_path)
    return run.finish()


class _Run:
    """A pretraining in progress: network, optimizer, step, best held-out loss."""

    def __init__(
        self,
        text_encoder: TextEncoder,
        output: Path,
        *,
        options: PretrainOptions,
        captions: Sequence[str] = (),
        start: Start | None = None,
    ):
        self.text_encoder, self.options = text_encoder, options
        self.output, self.state_path = output, output.with_suffix(".state.pt")
        self.corpus = Corpus(captions, caption_share=options.caption_share)
        self.table = text_encoder.token_embedding.weight.detach()
        self.vocabulary = MaskingVocabulary.from_tokenizer(
            text_encoder.tokenizer, protected=(), low_priority=FUNCTION_WORDS | NEUTRAL_WORDS
        )
        self.network = self._new_network().to(self.table.device)
        self.started_from = None if start is None else start.made_for
        if start is not None:
            self.network.load_state_dict(start.network.state_dict())
        self.optimizer = torch.optim.AdamW(parameter_groups(self.network), lr=options.learning_rate)
        self.step, self.looks_without_gain, self.best_loss = 0, 0, math.inf
        self.scores: Scores | None = None
        self.lowest_loss, self.best_weights = math.inf, {}
        self.held_out = self._draw_held_out()

    @property
    def finished(self) -> bool:
        return (
            self.step >= self.options.max_train_steps
            or self.looks_without_gain >= self.options.patience
        )

    def train_step(self) -> Tensor:
        rng = random.Random(f"pretrain/{self.options.seed}/{self.step}")
        texts = [self.corpus.draw(rng, held_out=False)[0] for _ in range(self.options.batch_size)]
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * learning_rate_share(self.step, self.options)
        losses = []
        chunks = self._chunks(texts)
        for chunk in chunks:
            loss = self._loss(chunk, rng).loss / len(chunks)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(self) -> None:
        rng = random.Random(f"held-out masks/{self.options.seed}")
        totals = {family: [0.0, 0, 0] for family in self.held_out}  # nats, correct, masked
        self.network.eval()
        for family, texts in self.held_out.items():
            for start in range(0, len(texts), self.options.batch_size):
                part = self._loss(texts[start : start + self.options.batch_size], rng)
                masked = part.num_masked
                for i, value in enumerate(
                    (float(part.loss) * masked, int(part.num_correct), masked)
                ):
                    totals[family][i] += value
        self.network.train()
        nats, correct, masked = (sum(column) for column in zip(*totals.values(), strict=True))
        self.scores = Scores(
            loss=nats / max(1, masked),
            accuracy=correct / max(1, masked),
            families={
                family: FamilyScores(loss=nats / masked, accuracy=correct / masked)
                for family, (nats, correct, masked) in sorted(totals.items())
                if masked
            },
        )
        if self.scores.loss < self.lowest_loss:
            self.lowest_loss, self.best_weights = self.scores.loss, _copied(self.network)
        gained = self.scores.loss < 0.99 * self.best_loss
        if gained:  # small gains add up until they count
            self.best_loss, self.looks_without_gain = self.scores.loss, 0
        else:
            self.looks_without_gain += 1

    def save_state(self) -> None:
        state = {
            "made_for": self._made_for(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "looks_without_gain": self.looks_without_gain,
            "best_loss": self.best_loss,
            "lowest_loss": self.lowest_loss,
            "best_weights": self.best_weights,
        }
        try:
            with disk_errors(self.state_path), atomic_path(self.state_path) as temporary:
                torch.save(state, temporary)
        except OSError as error:
            logger.warning("the pretraining goes on, but cannot be continued later: %s", error)

    def resume(self) -> None:
        ours = {self.output.name, self.state_path.name}
        remove_temporaries(self.output.parent, ours.__contains__)
        if not self.state_path.exists():
            return
        start = copy.deepcopy((self.network.state_dict(), self.optimizer.state_dict()))
        try:
            is_ours = self._restore()
        except Exception as error:  # a damaged pickle can fail with any exception
            self.network.load_state_dict(start[0])
            self.optimizer.load_state_dict(start[1])
            self._set_state_aside(error)
            return
        if is_ours:
            logger.info("continuing the contextualizer at step %d", self.step)
        else:
            logger.warning("%s belongs to other settings; starting again", self.state_path.name)

    def _restore(self) -> bool:
        """Load the state file; false if it belongs to other settings."""
        state = torch.load(self.state_path, map_location=self.table.device, weights_only=True)
        if state["made_for"] != self._made_for():
            return False
        step, looks, best = (
            int(state["step"]),
            int(state["looks_without_gain"]),
            state["best_loss"],
        )
        lowest, best_weights = float(state["lowest_loss"]), state["best_weights"]
        for weights in filter(None, (state["network"], best_weights)):
            if not all(weight.isfinite().all() for weight in weights.values()):
                raise ValueError("weights that are not finite")
            self.network.load_state_dict(weights)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.looks_without_gain, self.best_loss = step, looks, float(best)
        self.lowest_loss, self.best_weights = lowest, best_weights
        return True

    def _set_state_aside(self, error: Exception) -> None:
        damaged = self.state_path.with_suffix(".damaged")
        try:
            self.state_path.replace(damaged)
            kept = f"kept as {damaged.name}"
        except OSError:
            kept = "it stays where it is"
        text = type(error).__name__
        logger.warning("%s is damaged (%s; %s); starting again", self.state_path, text, kept)

    def finish(self) -> Scores:
        if self.scores is None:  # resumed at its very end
            self.evaluate()
        if self.scores.loss > self.lowest_loss:
            self.network.load_state_dict(self.best_weights)
            self.evaluate()
        facts = ContextualizerFacts(
            text_encoder=self.text_encoder.fingerprint(),
            tokenizer=self.text_encoder.tokenizer_fingerprint(),
            num_steps=self.step,
            accuracy=self.scores.accuracy,
            loss=self.scores.loss,
            training={
                **asdict(self.options),
                "num_captions": len(self.corpus.captions),
                "started_from": self.started_from,
                "families": {f: s._asdict() for f, s in self.scores.families.items()},
            },
        )
        try:
            save_contextualizer(self.output, self.network, facts)
        except OSError as error:
            raise NotSaved(self.network, facts, error) from error
        self.state_path.unlink(missing_ok=True)
        return self.scores

    def _chunks(self, texts: list[str]) -> list[list[str]]:
        """Chunks of prompts that the encoder takes at once: small for one of SDXL's size."""
        is_wide = self.table.shape[1] > WIDE
        size = CHUNK_SIZE if is_wide else len(texts)
        return [texts[start : start + size] for start in range(0, len(texts), size)]

    def _loss(self, texts: list[str], rng: random.Random) -> MaskedWordLoss:
        ids_BL = self.text_encoder.tokenize_trimmed(texts)
        masked = mask_tokens(
            ids_BL, self.vocabulary, mlm_probability=self.options.mlm_probability, rng=rng
        )
        device = self.table.device
        with (
            _autocast(device),
            mask_embedding(self.text_encoder.token_embedding, self.network.mask_vector),
        ):
            return masked_word_loss(
                self.network,
                self.text_encoder.encode(masked.input_ids.to(device)),
                labels_BL=masked.labels,
                attention_mask_BL=prompt_attention_mask(ids_BL, self.vocabulary.eos_token_id).to(
                    device
                ),
                token_table_VD=self.table,
            )

    def _new_network(self) -> Contextualizer:
        vocab_size, hidden_size = self.table.shape
        sizes = ContextualizerSizes(
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            width=self.options.width or default_width(hidden_size),
            num_layers=self.options.num_layers,
            max_length=self.text_encoder.window,
        )
        with torch.random.fork_rng(devices=[]):  # the caller's stream stays unchanged
            torch.manual_seed(self.options.seed)
            network = Contextualizer(sizes)
        network.start_from(self.table, self._count_tokens().to(self.table.device))
        return network

    def _count_tokens(self) -> Tensor:
        rng = random.Random(f"counts/{self.options.seed}")
        texts = [self.corpus.draw(rng, held_out=False)[0] for _ in range(NUM_COUNTED)]
        ids = self.text_encoder.tokenizer(texts, add_special_tokens=False).input_ids
        flat = torch.tensor([id for prompt in ids for id in prompt])
        return torch.bincount(flat, minlength=len(self.table))

    def _draw_held_out(self) -> dict[str, list[str]]:
        rng = random.Random(f"held-out/{self.options.seed}")
        by_family = defaultdict(list)
        for _ in range(self.options.num_held_out):
            text, family = self.corpus.draw(rng, held_out=True)
            by_family[family].append(text)
        return dict(by_family)

    def _made_for(self) -> dict:
        return {
            **asdict(self.options),
            "recipe": RECIPE,
            "text_encoder": self.text_encoder.fingerprint(),
            "started_from": self.started_from,
            "captions": zlib.crc32("\n".join(self.corpus.captions).encode()),
        }


def _autocast(device: torch.device) -> AbstractContextManager:
    """Half precision where the GPU has bf16."""
    use_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast("cuda", torch.bfloat16) if use_bf16 else nullcontext()


def parameter_groups(network: Contextualizer) -> list[dict]:
    """Weight decay for matrices alone: none for the mask vector, biases, norms and scales."""
    matrices = [weight for weight in network.parameters() if weight.ndim >= 2]
    others = [weight for weight in network.parameters() if weight.ndim < 2]
    return [
        {"params": matrices, "weight_decay": 0.01},
        {"params": others, "weight_decay": 0.0},
    ]


def _copied(network: Contextualizer) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in network.state_dict().items()}


def learning_rate_share(step: int, options: PretrainOptions) -> float:
    """Linear warm-up to 1, then cosine down to 0.1 at ``max_train_steps``."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(
        1, options.max_train_steps - options.warmup_steps
    )
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))


class _frozen:  # noqa: N801 - reads as a statement: with _frozen(text_encoder)
    """Text encoder in eval mode and without parameter gradients; restored at the end."""

    def __init__(self, text_encoder: TextEncoder):
        self.model = text_encoder.model

    def __enter__(self) -> None:
        self.training = self.model.training
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.requires_grad_(False).eval()

    def __exit__(self, *_exception: object) -> None:
        self.model.train(self.training)
        for parameter in self.trained:
            parameter.requires_grad_(True)
