"""Step time and peak memory of the standalone trainer against those of diffusers and sd-scripts.

Three programs train a LoRA of U-Net and text encoders on the same random model of real shape and
the same pictures, with the same batch size, precision, rank, optimizer and gradient checkpointing.
They take turns for some steps each, in several rounds, so that other load on the machine affects
all of them. The peers are local checkouts; one is enough:

    python -m research.benchmarks.peers --shape sd15 --tokenizer FOLDER --output F.json \
        --work FOLDER --diffusers_examples diffusers/examples/dreambooth --sd_scripts sd-scripts

The MLM term is off, because no peer has it. Each peer is compared with a run of ours in the same
interpreter (``--diffusers_python``, ``--sd_scripts_python``) that caches latents if the peer does:
the examples of diffusers encode the pictures in every step. They also train fewer modules than
kohya's trainers and ours; here they get the same ones, unless ``--own_modules`` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHAPES = ("tiny", "sd15", "tiny_sdxl", "sdxl")
CAPTION = "sks dog"
NUM_PICTURES = 8
KOHYAS_MODULES = {
    "to_k": [
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
        *("ff.net.0.proj", "ff.net.2"),
    ],
    "q_proj": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
"""The modules that ``networks.lora`` adapts in the U-Net and in CLIP, by their names in peft."""

SCRIPTS = {
    "sd_scripts": ("train_network.py", "sdxl_train_network.py"),
    "diffusers": ("train_dreambooth_lora.py", "train_dreambooth_lora_sdxl.py"),
}
"""Of Stable Diffusion 1.5 and of XL."""


@dataclass(frozen=True)
class Run:
    """One program with its arguments.

    Attributes:
        name: name in files and output.
        python: interpreter.
        script: the script to run.
        flags: flags of the script.
        probe: flags of ``probe.py``.
    """

    name: str
    python: str
    script: Path
    flags: tuple[str, ...]
    probe: tuple[str, ...] = ()

    def command(self, report: Path, *, num_warmup: int, num_steps: int) -> list[str]:
        """The command line that writes ``report``."""
        counts = ["--num_warmup", str(num_warmup), "--num_steps", str(num_warmup + num_steps)]
        probe = [str(HERE / "probe.py"), str(report), *counts, *self.probe]
        return [self.python, *probe, "--", str(self.script), *self.flags]


@dataclass(frozen=True)
class Pair:
    """A peer and the matching run of ours."""

    ours: Run
    theirs: Run


def pairs_of(args: argparse.Namespace) -> dict[str, Pair]:
    """The comparisons by the name of the peer."""
    pairs = {}
    for peer, folder, python in (
        ("sd_scripts", args.sd_scripts, args.sd_scripts_python),
        ("diffusers", args.diffusers_examples, args.diffusers_python),
    ):
        if folder is None:
            continue
        is_cached = peer == "sd_scripts"
        flags = sd_scripts_flags(args) if is_cached else diffusers_flags(args)
        probe = () if is_cached else ("--any_diffusers", *module_flags(args))
        pairs[peer] = Pair(
            ours=Run(
                f"ours_beside_{peer}",
                python,
                ROOT / "train_network_mlm.py",
                (*our_flags(args), *(["--cache_latents"] if is_cached else [])),
            ),
            theirs=Run(peer, python, script_of(peer, folder, args.shape), flags, probe),
        )
    return pairs


def script_of(peer: str, folder: Path, shape: str) -> Path:
    """The peer's script for a shape.

    Raises:
        FileNotFoundError: it is not in the folder.
    """
    path = folder.resolve() / SCRIPTS[peer][is_sdxl(shape)]
    if not path.is_file():
        raise FileNotFoundError(path)
    return path


def is_sdxl(shape: str) -> bool:
    """Whether a shape is one of Stable Diffusion XL."""
    return shape.endswith("sdxl")


def kohyas_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """Flags that ours and sd-scripts share."""
    options = {
        "train_data_dir": args.work / "data",
        "resolution": args.resolution,
        "network_dim": args.network_dim,
        "network_alpha": args.network_dim,
        "train_batch_size": args.train_batch_size,
        "mixed_precision": args.mixed_precision,
        "optimizer_type": args.optimizer_type,
        "learning_rate": 1e-4,
        "max_train_steps": 1000,  # the probe ends it
        "max_data_loader_n_workers": 0,
        "seed": 0,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return (*flags, *(["--gradient_checkpointing"] if args.gradient_checkpointing else []))


def our_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """Flags of the standalone trainer, without the MLM term."""
    return (
        *kohyas_flags(args),
        f"--pretrained_model_name_or_path={args.work / 'diffusers'}",
        f"--output_dir={args.work / 'out_ours'}",
        "--host=standalone",
        "--mlm_loss_weight=0",
    )


def sd_scripts_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """Flags of ``train_network.py`` and its SDXL version."""
    name = "sdxl.safetensors" if is_sdxl(args.shape) else "sd15.safetensors"
    return (
        *kohyas_flags(args),
        f"--pretrained_model_name_or_path={args.work / name}",
        f"--output_dir={args.work / 'out_sd_scripts'}",
        f"--tokenizer_cache_dir={args.work / 'tokenizers'}",
        "--network_module=networks.lora",
        "--save_model_as=safetensors",
        "--cache_latents",
        "--sdpa",
    )


def diffusers_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """Flags of ``train_dreambooth_lora.py`` and its SDXL version."""
    options = {
        "pretrained_model_name_or_path": args.work / "diffusers",
        "instance_data_dir": picture_folder(args.work),
        "instance_prompt": CAPTION,
        "output_dir": args.work / "out_diffusers",
        "resolution": args.resolution,
        "rank": args.network_dim,
        "train_batch_size": args.train_batch_size,
        "mixed_precision": args.mixed_precision,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": 1000,
        "checkpointing_steps": 100000,
        "dataloader_num_workers": 0,
        "seed": 0,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += ["--train_text_encoder", "--center_crop"]
    flags += ["--gradient_checkpointing"] if args.gradient_checkpointing else []
    return (*flags, *(["--use_8bit_adam"] if args.optimizer_type == "AdamW8bit" else []))


def module_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """Flags that make the examples adapt the same modules as kohya's trainers."""
    return () if args.own_modules else ("--modules", json.dumps(KOHYAS_MODULES))


def picture_folder(work: Path) -> Path:
    """One folder for all three: repeats and caption are in its name."""
    return work / "data" / f"10_{CAPTION}"


def prepare(args: argparse.Namespace) -> None:
    """Create models, tokenizers for sd-scripts, and pictures, unless they exist."""
    from PIL import Image

    environment = environment_of_runs()
    if not (args.work / "diffusers" / "model_index.json").is_file():
        make = HERE / ("make_sdxl.py" if is_sdxl(args.shape) else "make_sd15.py")
        size = ["--tiny"] if args.shape.startswith("tiny") else []
        flags = ["--output", args.work, "--tokenizer", args.tokenizer, "--dtype", args.model_dtype]
        subprocess.run([sys.executable, make, *flags, *size], check=True, env=environment)
    for name in ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"):
        if not (place := args.work / "tokenizers" / name).is_dir():
            shutil.copytree(args.tokenizer, place)
    shutil.rmtree(args.work / "data", ignore_errors=True)
    picture_folder(args.work).mkdir(parents=True)
    for number in range(NUM_PICTURES):
        picture = Image.effect_noise((args.resolution, args.resolution), 20 + 10 * number)
        picture.convert("RGB").save(picture_folder(args.work) / f"{number}.png")


def environment_of_runs() -> dict[str, str]:
    """Environment with this package first in the path, and without network access."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def execute(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Run one turn of one program."""
    report, log = args.work / f"{run.name}.json", args.work / f"{run.name}.log"
    report.unlink(missing_ok=True)
    command = run.command(report, num_warmup=args.num_warmup, num_steps=args.num_steps)
    with log.open("w") as output:
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment_of_runs()
        )
    if done.returncode or not report.is_file():
        raise SystemExit(f"{run.name} failed, see {log}:\n{log.read_text()[-3000:]}")
    return json.loads(report.read_text())


def in_turn(pairs: Mapping[str, Pair], args: argparse.Namespace) -> dict[str, list[dict]]:
    """The reports of every program, one per round; every other round is in reverse order."""
    runs = [run for pair in pairs.values() for run in (pair.ours, pair.theirs)]
    reports: dict[str, list[dict]] = {run.name: [] for run in runs}
    for number in range(args.num_rounds):
        for run in reversed(runs) if number % 2 else runs:
            reports[run.name].append(execute(run, args))
            seconds = statistics.median(reports[run.name][-1]["seconds"])
            print(f"round {number + 1}: {run.name} {seconds:.3f} s", flush=True)
    return reports


def summed_up(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the steps of all rounds; for memory, over rounds."""
    steps = {key: [v for one in reports for v in one[key]] for key in ("seconds", "cpu_seconds")}
    return {
        "median_seconds": statistics.median(steps["seconds"]),
        "median_cpu_seconds": statistics.median(steps["cpu_seconds"]),
        "peak_bytes": statistics.median(one["peak_bytes"] for one in reports),
        "loading_peak_bytes": statistics.median(one["loading_peak_bytes"] for one in reports),
        "load_average": [round(one["load_average"], 1) for one in reports],
        "device": reports[-1]["device"],
        "num_threads": reports[-1]["num_threads"],
        "versions": reports[-1]["versions"],
        **steps,
    }


def compare(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Ratios of ours to theirs: below 1 is faster or leaner."""
    left, right = summed_up(ours), summed_up(theirs)
    paired = [
        statistics.median(a["cpu_seconds"]) / statistics.median(b["cpu_seconds"])
        for a, b in zip(ours, theirs, strict=True)
    ]
    return {
        "ratio_time": left["median_seconds"] / right["median_seconds"],
        "ratio_cpu_time": left["median_cpu_seconds"] / right["median_cpu_seconds"],
        "ratio_cpu_time_of_rounds": paired,
        "ratio_memory": left["peak_bytes"] / right["peak_bytes"],
        "ours": left,
        "theirs": right,
    }


def markdown_table(peers: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each peer."""
    headings = ("peer", "time", "processor time", "peak memory", "ours", "theirs")
    rows = [headings, ("---",) * len(headings)]
    for name, found in peers.items():
        ratios = (found[key] for key in ("ratio_time", "ratio_cpu_time", "ratio_memory"))
        rows.append(
            (
                name,
                *(f"{ratio:.2f}" for ratio in ratios),
                *(
                    f"{side['median_cpu_seconds']:.2f} s, {side['peak_bytes'] / 2**20:.0f} MiB"
                    for side in (found["ours"], found["theirs"])
                ),
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def parse(argv: Iterable[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and logs")
    parser.add_argument("--tokenizer", type=Path, required=True, help="of the real CLIP")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--diffusers_examples", type=Path, help="diffusers/examples/dreambooth")
    parser.add_argument("--sd_scripts", type=Path, help="checkout of sd-scripts")
    parser.add_argument("--diffusers_python", default=sys.executable)
    parser.add_argument("--sd_scripts_python", default=sys.executable)
    parser.add_argument("--own_modules", action="store_true", help="leave the examples their own")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="bf16")
    parser.add_argument("--model_dtype", choices=("fp32", "fp16", "bf16"), default="bf16")
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--network_dim", type=int, default=16)
    parser.add_argument("--optimizer_type", choices=("AdamW8bit", "AdamW"), default="AdamW8bit")
    parser.add_argument(
        "--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True
    )
    parser.add_argument("--num_warmup", type=int, default=2, help="steps not counted, each turn")
    parser.add_argument("--num_steps", type=int, default=10, help="steps of each turn")
    parser.add_argument("--num_rounds", type=int, default=3)
    args = parser.parse_args(list(argv))
    if args.sd_scripts is None and args.diffusers_examples is None:
        parser.error("give --diffusers_examples, --sd_scripts or both")
    if args.sd_scripts is not None and args.shape.startswith("tiny"):
        parser.error(f"--shape {args.shape}: sd-scripts has its sizes in its code, use a real one")
    if min(args.num_warmup, args.num_steps, args.num_rounds) < 1:
        parser.error("--num_warmup, --num_steps and --num_rounds must be at least 1")
    args.work = args.work.resolve()
    return args


def main() -> None:
    """Measure, write the JSON and print the table."""
    args = parse(sys.argv[1:])
    try:
        pairs = pairs_of(args)
    except FileNotFoundError as error:
        raise SystemExit(f"{error} is not there: give the folder of the peer's scripts") from error
    prepare(args)
    reports = in_turn(pairs, args)
    peers = {
        name: compare(reports[pair.ours.name], reports[pair.theirs.name])
        for name, pair in pairs.items()
    }
    result = {
        "shape": args.shape,
        "resolution": args.resolution,
        "mixed_precision": args.mixed_precision,
        "optimizer": args.optimizer_type,
        "same_modules": not args.own_modules,
        "num_rounds": args.num_rounds,
        "num_steps": args.num_steps,
        "command": shlex.join(["python", "-m", "research.benchmarks.peers", *sys.argv[1:]]),
        "peers": peers,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(markdown_table(peers))


if __name__ == "__main__":
    main()
