"""Pretraining of a contextualizer: text in, one file out, once per text encoder.

The text encoder stays frozen; the contextualizer's blocks and the mask vector learn to name masked
words of a corpus. Knows no images and no concept. Shapes: B prompts, L tokens.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import zlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mlm_plugin.config.pretraining import RECIPE, PretrainOptions
from mlm_plugin.contextualizer_file import ContextualizerFacts, save_contextualizer
from mlm_plugin.errors import UserError, shown_error
from mlm_plugin.files import atomic_path, disk_errors, remove_temporaries
from mlm_plugin.mlm.contextualizer import Contextualizer, ContextualizerSizes, default_width
from mlm_plugin.mlm.encoder import mask_embedding
from mlm_plugin.mlm.losses import MaskedWordLoss, masked_word_loss
from mlm_plugin.mlm.masking import MaskingVocabulary, mask_tokens, prompt_attention_mask
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pretraining.corpus import Corpus
from mlm_plugin.prompt_sets.english import WORDS_WITHOUT_CONTENT
from mlm_plugin.training.interrupt import StopRequest

__all__ = [
    "Diverged",
    "FamilyScores",
    "Interrupted",
    "NotSaved",
    "PretrainingRun",
    "Scores",
    "Start",
    "checksum",
    "frozen",
    "pretrain",
    "state_file",
]

logger = logging.getLogger(__name__)

WIDE = 1024  # width of a text encoder above which a step's prompts are encoded in chunks
CHUNK_SIZE = 32  # prompts; 128 would take 4 GB of activations in bigG
NUM_COUNTED = 4096  # prompts that tell how often tokens occur


class FamilyScores(NamedTuple):
    """Held-out result of one family of contexts."""

    loss: float  # nats per masked token
    accuracy: float  # share of masked tokens predicted correctly


class Scores(NamedTuple):
    """Held-out result: overall and per family of contexts."""

    loss: float
    accuracy: float
    families: dict[str, FamilyScores]


def checksum(captions: Sequence[str]) -> int:
    """Tells captions from others."""
    return zlib.crc32("\n".join(captions).encode())


def state_file(output: Path) -> Path:
    """Where an interrupted pretraining of a file keeps its state."""
    return output.with_suffix(".state.pt")


class Interrupted(Exception):
    """Pretraining was stopped by a signal; ``next_start`` says where the same command starts."""

    def __init__(self, exit_code: int, next_start: str):
        super().__init__(f"pretraining stopped; {next_start}")
        self.exit_code = exit_code


class Diverged(UserError):
    """The held-out loss was not finite at any evaluation: there is no network to write."""

    exit_code = 1


class Start(NamedTuple):
    """The contextualizer of a similar text encoder, and what it can do here untrained."""

    network: Contextualizer
    accuracy: float
    made_for: str  # fingerprint of its text encoder


class NotSaved(OSError):
    """A contextualizer is pretrained, and its file cannot be written.

    Attributes:
        network: as trained.
        facts: how it was made.
    """

    def __init__(self, network: Contextualizer, facts: ContextualizerFacts, error: OSError):
        super().__init__(error.errno, shown_error(error))
        self.network, self.facts = network, facts


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
        Interrupted: after a signal, with the state saved where that is possible.
        NotSaved: the file cannot be written; the exception holds the network.
        Diverged: the held-out loss was never finite.
    """
    run = PretrainingRun(
        text_encoder,
        Path(output),
        options=options,
        captions=captions,
        start=start,
    )
    with StopRequest() as stop, frozen(text_encoder):
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
                    raise Interrupted(stop.exit_code, run.next_start())
    return run.finish()


class PretrainingRun:
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
        self.output, self.state_path = output, state_file(output)
        self.corpus = Corpus(captions, caption_share=options.caption_share)
        self.table = text_encoder.token_embedding.weight.detach()
        self.vocabulary = MaskingVocabulary.from_tokenizer(
            text_encoder.tokenizer, protected=(), low_priority=WORDS_WITHOUT_CONTENT
        )
        self.network = self._new_network().to(self.table.device)
        self.started_from = None if start is None else start.made_for
        if start is not None:
            self.network.load_state_dict(start.network.state_dict())
        self.optimizer = torch.optim.AdamW(parameter_groups(self.network), lr=options.learning_rate)
        self.step, self.evaluations_without_gain, self.best_loss = 0, 0, math.inf
        self.saved_step: int | None = None  # of the state file, if there is one of this run
        self.scores: Scores | None = None
        self.lowest_loss, self.best_weights = math.inf, {}
        self.held_out = self._draw_held_out()

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the held-out loss has stopped falling."""
        return (
            self.step >= self.options.max_train_steps
            or self.evaluations_without_gain >= self.options.patience
        )

    def train_step(self) -> Tensor:
        """One step; returns its loss (a scalar, nats per masked token)."""
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
        """Score the network on the held-out prompts; keep its weights if it is the best."""
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
            self.best_loss, self.evaluations_without_gain = self.scores.loss, 0
        else:
            self.evaluations_without_gain += 1

    def save_state(self) -> None:
        """Write what :meth:`resume` needs; a failed write is a warning."""
        state = {
            "made_for": self._made_for(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "evaluations_without_gain": self.evaluations_without_gain,
            "best_loss": self.best_loss,
            "lowest_loss": self.lowest_loss,
            "best_weights": self.best_weights,
        }
        try:
            with disk_errors(self.state_path), atomic_path(self.state_path) as temporary:
                torch.save(state, temporary)
        except OSError as error:
            logger.warning("this state of the pretraining could not be saved: %s", error)
            return
        self.saved_step = self.step

    def next_start(self) -> str:
        """Where the same command would start, in words."""
        if self.saved_step is None:
            return "its state could not be saved: the same command starts again"
        if self.saved_step < self.step:
            place = f"step {self.saved_step} of {self.step}, in {self.state_path}"
            return f"its state could not be saved: the same command continues from {place}"
        return f"the same command continues from {self.state_path}"

    def resume(self) -> None:
        """Continue from the state file, if one is there and belongs to these settings."""
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
        step, without_gain, best = (
            int(state["step"]),
            int(state["evaluations_without_gain"]),
            state["best_loss"],
        )
        lowest, best_weights = float(state["lowest_loss"]), state["best_weights"]
        for weights in filter(None, (state["network"], best_weights)):
            if not all(weight.isfinite().all() for weight in weights.values()):
                raise ValueError("weights that are not finite")
            self.network.load_state_dict(weights)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best_loss = step, float(best)
        self.evaluations_without_gain = without_gain
        self.lowest_loss, self.best_weights = lowest, best_weights
        self.saved_step = step
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
        """Write the best network and remove the state file.

        Raises:
            NotSaved: the file cannot be written.
            Diverged: there is no best network.
        """
        if self.scores is None:  # resumed at its very end
            self.evaluate()
        if not self.best_weights:
            self.state_path.unlink(missing_ok=True)
            raise Diverged(
                f"--learning_rate = {self.options.learning_rate}: the held-out loss of the "
                f"contextualizer was {self.scores.loss} at every evaluation; take a lower rate, "
                "and check that the text encoder's weights are finite"
            )
        if not self.scores.loss <= self.lowest_loss:  # NaN compares as false
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
                "captions": checksum(self.corpus.captions),
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
            "captions": checksum(self.corpus.captions),
        }


def _autocast(device: torch.device) -> AbstractContextManager:
    """Half precision where the GPU has bf16; older ones compute it in fp32, slower than fp32."""
    use_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
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


class frozen:  # noqa: N801 - reads as a statement: with frozen(text_encoder)
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
