"""A LoRA of a full-size Stable Diffusion XL with random weights, from checkpoint to diffusers.

Runs `train_network_mlm.py` on real shapes with both text encoders, the MLM term, an 8-bit
optimizer, gradient checkpointing and cached latents, and loads the result in a
``StableDiffusionXLPipeline``. It shows that training runs, how fast, and in how much memory.

    python -m research.benchmarks.full_size_sdxl --work FOLDER --tokenizer FOLDER --output F.json

FOLDER needs 8 GB and keeps the model for the next run. Each stage is a separate process limited to
``--limit_gib`` of memory. The contextualizers have random weights too (hours of pretraining on a
CPU would not change what is measured), and their files say so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STAGES = ("model", "contextualizers", "train", "load")
PARTS = ("lora_te1_", "lora_te2_", "lora_unet_")
COMPONENTS = ("text_encoder", "text_encoder_2", "unet")


def stage_commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command line of every stage, in order."""
    work, model = args.work, args.work / "diffusers"
    size = ["--tiny"] if args.tiny else []
    myself = [str(HERE / "full_size_sdxl.py"), "--work", str(work), "--stage"]
    make = ["--output", str(work), "--tokenizer", str(args.tokenizer), "--form", "folder", *size]
    probe = [str(HERE / "probe.py"), str(work / "steps.json"), "--"]
    train = train_flags(args, model=model, contextualizers=contextualizer_files(work))
    return {
        "model": [str(HERE / "make_sdxl.py"), *make],
        "contextualizers": [*myself, "contextualizers"],
        "train": [*probe, str(ROOT / "train_network_mlm.py"), *train],
        "load": [*myself, "load"],
    }


def train_flags(
    args: argparse.Namespace, *, model: Path, contextualizers: Iterable[Path]
) -> list[str]:
    """Options of the training, like ``presets/sdxl_8gb.toml`` as far as a CPU allows."""
    options = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": args.work / "data",
        "resolution": args.resolution,
        "network_dim": 8,
        "network_alpha": 4,
        "unet_lr": 1e-4,
        "text_encoder_lr": 5e-5,
        "optimizer_type": "AdamW8bit",
        "mixed_precision": "bf16",
        "max_train_steps": args.num_steps,
        "mlm_batch_size": 4,
        "mlm_loss_weight": 1e-3,
        "mlm_target": "class",
        "mlm_contextualizer": ",".join(map(str, contextualizers)),
        "seed": 0,
        "host": "standalone",
        "save_precision": "fp16",
        "max_data_loader_n_workers": 0,
        "output_dir": args.work / "out",
        "output_name": "lora",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [*flags, "--gradient_checkpointing", "--cache_latents"]


def contextualizer_files(work: Path) -> list[Path]:
    """One for each text encoder."""
    return [work / f"contextualizer_te{number}.safetensors" for number in (1, 2)]


def run_stage(command: list[str], *, limit_gib: float, log: Path) -> dict[str, float]:
    """Run a stage in a separate process.

    Returns:
        seconds, processor seconds and the peak of its resident set.
    """
    limit = int(limit_gib * 2**30)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            # RLIMIT_AS would count memory-mapped files
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{log.stem} failed, see {log}:\n{log.read_text()[-3000:]}")
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def make_contextualizers(work: Path) -> None:
    """Write an untrained contextualizer for each text encoder, initialized from its table."""
    import torch

    from mlm_plugin.contextualizer_file import ContextualizerFacts, save_contextualizer
    from mlm_plugin.mlm.contextualizer import Contextualizer, ContextualizerSizes, default_width
    from mlm_plugin.models.checkpoints import ModelSettings, load_stable_diffusion

    torch.manual_seed(0)
    models = load_stable_diffusion(work / "diffusers", ModelSettings(dtype=torch.bfloat16))
    for text_encoder, path in zip(models.text_encoders, contextualizer_files(work), strict=True):
        table_VD = text_encoder.token_embedding.weight.detach()
        vocab_size, hidden_size = table_VD.shape
        sizes = ContextualizerSizes(hidden_size, vocab_size, width=default_width(hidden_size))
        network = Contextualizer(sizes)
        network.start_from(table_VD, torch.ones(vocab_size))
        facts = ContextualizerFacts(
            text_encoder=text_encoder.fingerprint(),
            tokenizer=text_encoder.tokenizer_fingerprint(),
            num_steps=0,
            accuracy=0.0,
            loss=float("inf"),
            training={"note": "random weights, for measurements of time and memory"},
        )
        save_contextualizer(path, network, facts)


def load_in_diffusers(work: Path) -> None:
    """Load the saved LoRA into the pipeline and write the number of modules of each part."""
    import torch
    from diffusers import StableDiffusionXLPipeline
    from peft.tuners.tuners_utils import BaseTunerLayer

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        work / "diffusers", torch_dtype=torch.bfloat16, local_files_only=True
    )
    pipeline.load_lora_weights(work / "out", weight_name="lora.safetensors", adapter_name="lora")
    counts = {
        name: sum(isinstance(m, BaseTunerLayer) for m in getattr(pipeline, name).modules())
        for name in COMPONENTS
    }
    adapters = pipeline.get_list_adapters()
    (work / "loaded.json").write_text(json.dumps({"modules": counts, "adapters": adapters}))


def saved_modules(path: Path) -> dict[str, Any]:
    """Contents of the LoRA file: modules by part, how many have changed, whether all is finite."""
    from safetensors.torch import load_file

    state = load_file(path)
    ups = {name: value for name, value in state.items() if name.endswith(".lora_up.weight")}
    return {
        "modules": module_counts(state),
        "modules_that_learned": module_counts(name for name in ups if ups[name].any()),
        "is_finite": all(bool(value.isfinite().all()) for value in state.values()),
        "bytes": path.stat().st_size,
    }


def module_counts(names: Iterable[str]) -> dict[str, int]:
    """Modules of a LoRA file by the prefix of their part."""
    modules = {name.partition(".")[0] for name in names}
    found = Counter(next(p for p in PARTS if module.startswith(p)) for module in modules)
    return {part.strip("_"): found[part] for part in PARTS}


def summary(result: Mapping[str, Any]) -> str:
    """The result in a few lines."""
    lines = [
        f"{name}: {stage['seconds']:.0f} s, {stage['peak_bytes'] / 2**30:.1f} GiB"
        for name, stage in result["stages"].items()
    ]
    steps, saved = result["steps"], result["saved"]
    lines.append(
        f"steps: {', '.join(f'{s:.1f}' for s in steps['cpu_seconds'])} s of processor time, "
        f"peak {steps['peak_bytes'] / 2**30:.1f} GiB"
    )
    lines.append(f"saved: {saved['modules']}; loaded: {result['loaded']['modules']}")
    return "\n".join(lines)


def main() -> None:
    """Run the stages and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for model and results")
    parser.add_argument("--tokenizer", type=Path, help="folder of the CLIP tokenizer")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--num_steps", type=int, default=3, help="the first is warm-up")
    parser.add_argument("--limit_gib", type=float, default=18, help="memory of a stage")
    parser.add_argument("--tiny", action="store_true", help="32 and 64 channels: a rehearsal")
    parser.add_argument("--stage", choices=("contextualizers", "load"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        {"contextualizers": make_contextualizers, "load": load_in_diffusers}[args.stage](args.work)
        return
    if not (args.tokenizer and args.output):
        parser.error("--tokenizer and --output are needed")
    if args.num_steps < 2:
        parser.error(f"--num_steps {args.num_steps}: must be at least 2, the first is warm-up")
    if shutil.disk_usage(args.work.parent).free < 9 * 2**30 and not args.tiny:
        parser.error(f"--work {args.work}: needs 9 GB")
    args.output.write_text(json.dumps(result := measure(args), indent=2) + "\n")
    print(summary(result))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all stages; an existing model is reused."""
    from mlm_plugin.toy import build_toy_data

    work: Path = args.work
    shutil.rmtree(work / "data", ignore_errors=True)
    build_toy_data(work / "data")
    stages = {}
    for name, command in stage_commands(args).items():
        if name == "model" and (work / "diffusers" / "model_index.json").is_file():
            continue
        print(f"{name} ...", flush=True)
        log = work / f"{name}.log"
        stages[name] = run_stage(command, limit_gib=args.limit_gib, log=log)
    steps = json.loads((work / "steps.json").read_text())
    # the probe resets the peak after the warm-up, and the kernel discards the first one
    peaks = stages["train"]["peak_bytes"], steps["loading_peak_bytes"], steps["peak_bytes"]
    stages["train"]["peak_bytes"] = max(peaks)
    return {
        "shape": "tiny_sdxl" if args.tiny else "sdxl",
        "resolution": args.resolution,
        "stages": stages,
        "steps": steps,
        "saved": saved_modules(work / "out" / "lora.safetensors"),
        "loaded": json.loads((work / "loaded.json").read_text()),
        "machine": platform.machine(),
        "num_cores": os.cpu_count(),
        "train_flags": shlex.join(stage_commands(args)["train"]),
        "command": shlex.join(
            ["python", "-m", "research.benchmarks.full_size_sdxl", *sys.argv[1:]]
        ),
    }


if __name__ == "__main__":
    main()
