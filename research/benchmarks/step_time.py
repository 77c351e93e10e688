"""The cost of the MLM term: step time and peak memory of LoRA training with and without it.

The real trainer with random weights. The steps of one run in one process alternate: on, off, on,
off. So other load on the machine affects both equally.

    python -m research.benchmarks.step_time --shape sd15 --resolution 512 --output F.json \
        --tokenizer FOLDER

``ratio_time`` is the ratio of the medians, ``ratio_time_paired`` the median of the ratios of
neighbouring steps. For a busy machine, with ``OMP_NUM_THREADS=1``: ``ratio_time_fastest`` compares
the fastest steps, ``ratio_cpu_time`` the medians of this process's processor time.

Memory is the weights of the base model (without the VAE: latents are cached), adapters, optimizer
and, for "on", the contextualizers where the target needs them, plus the peak of a step above that.
How it was measured is in ``memory_method``.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.data.dataset import Batch
from mlm_plugin.files import atomic_path
from mlm_plugin.methods.lora import LoRAMethod
from mlm_plugin.mlm.contextualizer import Contextualizer, ContextualizerSizes, default_width
from mlm_plugin.mlm.prompts import JointPrompts, PromptPair
from mlm_plugin.mlm.regularizer import MLMRegularizer
from mlm_plugin.mlm_setup import MLMSetup, PreparedEncoder
from mlm_plugin.models.checkpoints import SDXL_CLIP_SKIP, SDXL_VERSION, StableDiffusion
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.models.tokenizers import load_tokenizer, second_tokenizer
from mlm_plugin.setup.term import attach_term
from mlm_plugin.toy import build_toy_tokenizer, toy_corpus
from mlm_plugin.training.callbacks import Callback, StepResult
from mlm_plugin.training.diffusion_loss import DiffusionLoss
from mlm_plugin.training.optimizers import create_optimizer
from mlm_plugin.training.plan import MLMTerm, Objective, Optimization, TrainPlan
from mlm_plugin.training.schedulers import create_scheduler
from mlm_plugin.training.state import RunIdentity
from mlm_plugin.training.trainer import Trainer
from research.benchmarks import make_sd15, make_sdxl

CONCEPT = Concept("sks", "dog")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes")
SEED = 0
NUM_TARGETS = 64
SHAPES = {"tiny": make_sd15, "sd15": make_sd15, "tiny_sdxl": make_sdxl, "sdxl": make_sdxl}
"""The modules that make the models; ``tiny`` in the name means few channels."""


class Alternating:
    """Replaces the trainer's schedule: the term acts in every even step."""

    def __init__(self, weight: float):
        self.weight = weight

    def weight_at(self, step: int) -> float:
        """The weight in even steps, 0.0 in odd ones."""
        return 0.0 if step % 2 else self.weight


class OneBatch:
    """Replaces the trainer's loader and its order: always the same cached latents."""

    def __init__(self, *, resolution: int, length: int):
        size, latent = (resolution, resolution), resolution // 8
        self.sampler, self.length = self, length
        self.batch = Batch(
            pixel_values=None,
            latents=torch.randn(1, 4, latent, latent),
            loss_masks=None,
            valid_masks=None,
            loss_weights=torch.ones(1),
            captions=[f"a photo of {CONCEPT.text}"],
            original_sizes=[size],
            crop_top_lefts=[(0, 0)],
            target_sizes=[size],
            is_reg=[False],
            image_paths=[""],
            custom_attributes=[{}],
        )

    def start_epoch(self, epoch: int, *, skip: int = 0, step: int = 0) -> None:
        """Nothing to do: every epoch is the same."""

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.length)


class StepClock(Callback):
    """Seconds of every step and, in the steps in ``measures``, the peak above the start."""

    def __init__(self, device: torch.device, *, measures: Iterable[int]):
        self.measures = frozenset(measures)
        self.meter = CudaPeak() if device.type == "cuda" else CpuPeak()
        self.device = device
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.peaks: dict[int, int] = {}

    def on_train_start(self, trainer: Trainer) -> None:
        self._begin(0)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        self._wait()
        self.seconds.append(time.perf_counter() - self.started)
        self.cpu_seconds.append(time.process_time() - self.cpu_started)
        step = trainer.progress.current_step
        if step - 1 in self.measures:
            self.peaks[step - 1] = self.meter.end()
        if step < trainer.plan.num_steps:
            self._begin(step)

    def _begin(self, step: int) -> None:
        if step in self.measures:
            self.meter.begin()
        self._wait()
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class CudaPeak:
    """Highest level of the caching allocator above the level at the start."""

    method = "torch.cuda.max_memory_allocated, reset before every step"

    def begin(self) -> None:
        """Start a measurement."""
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def end(self) -> int:
        """Bytes between the level at the start and the peak since."""
        return torch.cuda.max_memory_allocated() - self.before


class CpuPeak:
    """Highest running sum of the allocator's events, as torch's profiler records them."""

    method = (
        "torch.profiler memory events (PyTorch's CPU allocator) of two extra steps that are not "
        "timed: highest running sum; memory allocated by libraries themselves is not seen"
    )

    def begin(self) -> None:
        """Start a measurement; the step becomes slower."""
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.start()

    def end(self) -> int:
        """Bytes between the level at the start and the peak since."""
        self.profile.stop()
        events = self.profile.profiler.kineto_results.events()
        changes = sorted(
            (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
        )
        return max(accumulate((nbytes for _, nbytes in changes), initial=0))


@dataclass
class Bench:
    """A trainer ready to run, and its parts."""

    trainer: Trainer
    clock: StepClock
    contextualizers: list[Contextualizer]
    num_prompt_tokens: float

    def resident_bytes(self, *, mlm: bool) -> int:
        """Bytes in memory between two steps."""
        models, optimizer = self.trainer.models, self.trainer.optimizer
        parts: list[nn.Module] = [models.unet, *(te.model for te in models.text_encoders)]
        tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
        tensors += [
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        if mlm:
            tensors += [p for network in self.contextualizers for p in network.parameters()]
        return storage_bytes(tensors)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once; those on "meta" have none."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.device.type != "meta"
    }
    return sum(storages.values())


def build_bench(args: argparse.Namespace, tokenizer_folder: Path) -> Bench:
    """The trainer of a LoRA run whose steps alternate.

    Like ``commands/train.py``, but with models from memory instead of a file.
    """
    config = config_of(args)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.device == "cpu")
    device, dtype = accelerator.device, DTYPES[args.mixed_precision]
    set_seed(SEED)
    models = random_models(args, tokenizer_folder, device=device, dtype=dtype)
    setup = prepared_setup(args, config, models)
    method = LoRAMethod.prepare(models, config, [CONCEPT])
    regularizer = attach_term(setup, config, method, accelerator)
    enable_checkpointing(models, args.gradient_checkpointing)
    num_steps = 2 * (args.num_warmup + args.num_pairs + args.num_memory_pairs)
    optimizer = create_optimizer(
        config.optimizer.optimizer_type,
        method.parameter_groups(config.optimizer),
        learning_rate=config.optimizer.learning_rate,
    )
    scheduler = create_scheduler(optimizer, config.optimizer, num_training_steps=num_steps)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    clock = StepClock(device, measures=range(num_steps - 2 * args.num_memory_pairs, num_steps))
    trainer = Trainer(
        accelerator=accelerator,
        method=method,
        loader=OneBatch(resolution=args.resolution, length=num_steps),
        objective=Objective(
            DiffusionLoss(
                models.noise_scheduler,
                config.loss,
                prediction_type=models.prediction_type,
                device=device,
            ),
            mlm=MLMTerm(regularizer, Alternating(config.mlm.mlm_loss_weight), setup.read_at),
        ),
        optimization=Optimization(optimizer, scheduler),
        plan=TrainPlan(num_steps=num_steps, batches_per_epoch=num_steps),
        identity=RunIdentity(seed=0),
        callbacks=[clock],
    )
    contextualizers = [e.contextualizer for e in setup.encoders if e.contextualizer]
    return Bench(trainer, clock, contextualizers, mean_tokens(regularizer, num_calls=50))


def prepared_setup(
    args: argparse.Namespace, config: TrainConfig, models: StableDiffusion
) -> MLMSetup:
    """The set-up of the term with untrained contextualizers."""
    count = len(models.text_encoders)
    read_at = LoRAMethod.mlm_read_at(config, num_text_encoders=count)
    trained = LoRAMethod.trained_text_encoders(config, num_text_encoders=count)
    setup = MLMSetup(config.mlm, seed=0, read_at=read_at, num_targets=NUM_TARGETS)
    setup.use_concepts([CONCEPT])
    setup.encoders = [
        PreparedEncoder(
            text_encoder,
            None
            if config.mlm.mlm_target == "states"
            else untrained_contextualizer(text_encoder, args),
            is_trained,
        )
        for text_encoder, is_trained in zip(models.text_encoders, trained, strict=True)
        if setup.reads(is_trained)
    ]
    first = setup.encoders[0].text_encoder
    setup.prompts = LongPrompts(setup.prompts, args.mlm_prompt_tokens, first)
    return setup


def config_of(args: argparse.Namespace) -> TrainConfig:
    """The options of the measured run."""
    clip_l_alone = {"text_encoder_lr": (1e-4, 0.0)} if args.num_text_encoders == 1 else {}
    return TrainConfig.from_flat(
        {
            **(clip_l_alone if SHAPES[args.shape] is make_sdxl else {}),
            "network_dim": args.network_dim,
            "network_alpha": args.network_dim,
            "learning_rate": 1e-4,
            "optimizer_type": args.optimizer_type,
            "mlm_batch_size": args.mlm_batch_size,
            "mlm_target": args.mlm_target,
            "mlm_read_at": args.mlm_read_at,
            "network_train_unet_only": args.network_train_unet_only,
            "placeholder_token": (CONCEPT.placeholder_token,),
            "class_token": (CONCEPT.class_token,),
        }
    )


def random_models(
    args: argparse.Namespace, tokenizer_folder: Path, *, device: torch.device, dtype: torch.dtype
) -> StableDiffusion:
    """The model with random weights, frozen. The VAE has no storage: latents are cached."""
    maker = SHAPES[args.shape]
    made = maker.build_models(tiny=args.shape.startswith("tiny"), dtype=dtype)
    for module in made:
        module.requires_grad_(False)
    tokenizer = load_tokenizer(tokenizer_folder)
    if maker is make_sdxl:
        tokenizers = tokenizer, second_tokenizer(tokenizer)
        clips = made.text_encoder, made.text_encoder_2
        settings = {"clip_skip": SDXL_CLIP_SKIP, "final_norm": False}
    else:
        tokenizers, clips, settings = (tokenizer,), (made.text_encoder,), {}
    return StableDiffusion(
        text_encoders=[
            TextEncoder(*pair, **settings)
            for pair in zip(tokenizers, [clip.to(device) for clip in clips], strict=True)
        ],
        vae=made.vae.to("meta"),
        unet=made.unet.to(device),
        noise_scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
        version=SDXL_VERSION if maker is make_sdxl else "sd_v1",
        prediction_type="epsilon",
        source=f"random {args.shape}",
    )


class LongPrompts:
    """Replaces the trainer's prompts: several are joined to reach a length.

    Args:
        prompts: source of the prompts.
        length: number of tokens, BOS and EOS included; 0 leaves prompts alone.
        text_encoder: counts them.
    """

    def __init__(self, prompts: JointPrompts, length: int, text_encoder: TextEncoder):
        self.prompts, self.length, self.text_encoder = prompts, length, text_encoder

    def sample(self, rng: random.Random) -> PromptPair:
        """A prompt of at least this length, and the same with the class word."""
        pairs = [self.prompts.sample(rng)]
        while self.text_encoder.count_tokens(joined(pairs).text) + 2 < self.length:
            pairs.append(self.prompts.sample(rng))
        return joined(pairs)


def joined(pairs: Sequence[PromptPair]) -> PromptPair:
    """Prompts concatenated."""
    return PromptPair(*(" ".join(texts) for texts in zip(*pairs, strict=True)))


def untrained_contextualizer(text_encoder: TextEncoder, args: argparse.Namespace) -> Contextualizer:
    """An untrained contextualizer of the default size."""
    table_VD = text_encoder.token_embedding.weight.detach().cpu()
    vocab_size, hidden_size = table_VD.shape
    sizes = ContextualizerSizes(
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        width=args.contextualizer_width or default_width(hidden_size),
        num_layers=args.contextualizer_layers,
    )
    contextualizer = Contextualizer(sizes)
    contextualizer.start_from(table_VD, torch.ones(vocab_size))
    return contextualizer


def enable_checkpointing(models: StableDiffusion, enabled: bool) -> None:
    """Gradient checkpointing as the standalone trainer sets it."""
    if not enabled:
        return
    models.unet.enable_gradient_checkpointing()
    for text_encoder in models.text_encoders:
        text_encoder.enable_gradient_checkpointing()


def mean_tokens(regularizer: MLMRegularizer, *, num_calls: int) -> float:
    """Mean number of tokens of a padded prompt batch, BOS and EOS included."""
    rng, encoder = random.Random(0), regularizer.encoders[0]
    batches = [
        [regularizer.sample_prompt(rng) for _ in range(regularizer.batch_size)]
        for _ in range(num_calls)
    ]
    return statistics.mean(encoder.tokenize(prompts).shape[1] for prompts in batches)


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Run the trainer and summarize: times without warm-up, memory of the last pairs."""
    bench.trainer.run()
    clock = bench.clock
    first, last = 2 * args.num_warmup, 2 * (args.num_warmup + args.num_pairs)
    on, off = clock.seconds[first:last:2], clock.seconds[first + 1 : last : 2]
    cpu = [statistics.median(clock.cpu_seconds[first + i : last : 2]) for i in (0, 1)]
    resident = {name: bench.resident_bytes(mlm=name == "on") for name in ("on", "off")}
    working = {
        "on": max(peak for step, peak in clock.peaks.items() if step % 2 == 0),
        "off": max(peak for step, peak in clock.peaks.items() if step % 2 == 1),
    }
    peak = {name: resident[name] + working[name] for name in ("on", "off")}
    return {
        "ratio_time": statistics.median(on) / statistics.median(off),
        "ratio_time_paired": statistics.median(a / b for a, b in zip(on, off, strict=True)),
        "ratio_time_fastest": min(on) / min(off),
        "ratio_memory": peak["on"] / peak["off"],
        "median_seconds": {"on": statistics.median(on), "off": statistics.median(off)},
        "ratio_cpu_time": cpu[0] / cpu[1],
        "median_cpu_seconds": {"on": cpu[0], "off": cpu[1]},
        "seconds": {"on": on, "off": off},
        "quartiles_seconds": {"on": quartiles(on), "off": quartiles(off)},
        "peak_bytes": peak,
        "resident_bytes": resident,
        "working_bytes": working,
        "memory_method": clock.meter.method,
        "num_steps": {"on": len(on), "off": len(off)},
        "num_warmup": {"on": args.num_warmup, "off": args.num_warmup},
    }


def quartiles(values: list[float]) -> list[float]:
    """Lower and upper quartile."""
    if len(values) < 2:
        return values * 2
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def describe(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, and the environment."""
    device = bench.trainer.accelerator.device
    cuda = device.type == "cuda"
    return {
        "shape": args.shape,
        "resolution": args.resolution,
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
        "num_threads": torch.get_num_threads(),
        "dtype": str(DTYPES[args.mixed_precision]).removeprefix("torch."),
        "mlm_batch_size": args.mlm_batch_size,
        "mlm_target": args.mlm_target,
        "mlm_read_at": args.mlm_read_at,
        "network_train_unet_only": args.network_train_unet_only,
        "mlm_tokens_per_prompt": bench.num_prompt_tokens,
        "tokenizer": "CLIP vocabulary" if args.tokenizer else "toy vocabulary (longer prompts)",
        "num_text_encoders": len(bench.trainer.regularizer.encoders),
        "contextualizers": [asdict(network.sizes) for network in bench.contextualizers],
        "network_dim": args.network_dim,
        "optimizer": args.optimizer_type,
        "gradient_checkpointing": args.gradient_checkpointing,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "command": shlex.join(["python", "-m", "research.benchmarks.step_time", *sys.argv[1:]]),
    }


@contextmanager
def tokenizer_folder(given: Path | None) -> Iterator[Path]:
    """The given vocabulary, or a temporary toy one."""
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        build_toy_tokenizer(Path(folder), toy_corpus())
        yield Path(folder)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--resolution", type=int, default=512, help="pixels, a multiple of 64")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--tokenizer", type=Path, help="folder of the real CLIP tokenizer")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--mixed_precision", choices=DTYPES, help="default: bf16 on a GPU, else no")
    defaults = TrainConfig().mlm
    parser.add_argument("--mlm_batch_size", type=int, default=defaults.mlm_batch_size)
    parser.add_argument(
        "--mlm_prompt_tokens", type=int, default=0, help="minimum number; 0: as drawn"
    )
    parser.add_argument(
        "--mlm_target", choices=("class", "word", "states"), default=defaults.mlm_target
    )
    parser.add_argument(
        "--mlm_read_at", choices=("auto", "encoder", "cross_attention", "both"), default="auto"
    )
    parser.add_argument("--network_train_unet_only", action="store_true")
    parser.add_argument(
        "--num_text_encoders", type=int, choices=(1, 2), default=2, help="SDXL; 1: CLIP-L alone"
    )
    parser.add_argument("--contextualizer_width", type=int, default=0, help="0: as pretrain does")
    parser.add_argument("--contextualizer_layers", type=int, default=4)
    parser.add_argument("--network_dim", type=int, default=16)
    parser.add_argument("--optimizer_type", default="AdamW8bit")
    parser.add_argument(
        "--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True
    )
    parser.add_argument("--num_warmup", type=int, default=2, help="pairs of steps not counted")
    parser.add_argument("--num_pairs", type=int, default=10, help="pairs of steps that are timed")
    parser.add_argument("--num_memory_pairs", type=int, default=1, help="pairs measured for memory")
    args = parser.parse_args(argv)
    if args.resolution < 64 or args.resolution % 64:
        parser.error(f"--resolution {args.resolution}: must be a multiple of 64")
    if args.mlm_prompt_tokens and not 8 <= args.mlm_prompt_tokens <= 77:
        parser.error(f"--mlm_prompt_tokens {args.mlm_prompt_tokens}: must be 0 or from 8 to 77")
    if args.num_pairs < 1 or args.num_memory_pairs < 1:
        parser.error("--num_pairs and --num_memory_pairs must be at least 1")
    if args.device == "auto" and not torch.cuda.is_available():
        args.device = "cpu"
    args.mixed_precision = args.mixed_precision or ("no" if args.device == "cpu" else "bf16")
    return args


def main() -> None:
    """Measure, write the JSON and print the ratios."""
    args = parse(sys.argv[1:])
    with tokenizer_folder(args.tokenizer) as folder:
        bench = build_bench(args, folder)
        result = describe(bench, args) | measure(bench, args)
    with atomic_path(args.output) as temporary:
        Path(temporary).write_text(json.dumps(result, indent=2) + "\n")
    seconds, peak = result["median_seconds"], result["peak_bytes"]
    print(
        f"time {seconds['on']:.3f} s : {seconds['off']:.3f} s = {result['ratio_time']:.3f} "
        f"(paired {result['ratio_time_paired']:.3f}); memory {peak['on'] / 2**20:.0f} MiB : "
        f"{peak['off'] / 2**20:.0f} MiB = {result['ratio_memory']:.4f}"
    )


if __name__ == "__main__":
    main()
