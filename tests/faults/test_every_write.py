"""Every write of the package meets every fault; what must hold then is stated once, for all.

``WRITES`` is the table of writes, ``FAULTS`` that of faults, ``KILLS`` that of the moments at which
the process dies. ``must_hold`` says what a folder may hold afterwards. A write that does not go
through one of these functions is found by ``test_nothing_is_written_under_its_final_name``.
"""

import ast
import errno
import json
import os
import resource
import signal
import stat
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from mlm_plugin.commands.train import check_run, trainer_of
from mlm_plugin.compare.subjects import Subject
from mlm_plugin.config.loading import load_config, write_options
from mlm_plugin.contextualizer_file import ContextualizerFacts, save_contextualizer
from mlm_plugin.data.latents import CachedLatents, cache_latents
from mlm_plugin.data.sources import ImageInfo
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.generate import claim_folder
from mlm_plugin.evaluation.rendering import write_report
from mlm_plugin.evaluation.results import write_results
from mlm_plugin.export.checkpoint import save_checkpoint, save_diffusers_folder
from mlm_plugin.export.custom_diffusion_files import save_delta
from mlm_plugin.export.embedding_files import EMBEDDING_KEYS, save_embedding, save_xti
from mlm_plugin.export.lora_files import save_lora
from mlm_plugin.export.sidecar import write_preview, write_sidecar
from mlm_plugin.files import cached_folder, copy_file, remove_temporaries
from mlm_plugin.mlm.contextualizer import Contextualizer, ContextualizerSizes
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.models.weights_files import write_weights
from mlm_plugin.pocket.prompt_labels import write_labels
from mlm_plugin.training import draw_class_images
from mlm_plugin.training.samples import save_sample

PACKAGE = Path(__file__).parents[2] / "mlm_plugin"


# --- the table of writes: each writes its version 1, or replaces it by version 2 ---


class Parts(NamedTuple):
    """What the writes need besides a folder; loaded once."""

    models: object
    trainer: object
    info: ImageInfo
    contextualizer: Contextualizer


def weights_of(version):
    """Large enough that half a file is a torn one."""
    return {"lora_unet_x.lora_down.weight": torch.full((64, 64), float(version))}


def picture_of(version):
    noise = np.random.default_rng(version).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def checkpoint(folder, version, parts):
    metadata = {"version": str(version)}
    networks, family = parts.models.components, parts.models.family
    save_checkpoint(folder / "dog.safetensors", networks, family=family, metadata=metadata)


def diffusers_folder(folder, version, parts):
    models = parts.models
    save_diffusers_folder(
        folder / "dog",
        models.components,
        tokenizers=[encoder.tokenizer for encoder in models.text_encoders],
        noise_scheduler=models.noise_scheduler,
        prediction_type=("epsilon", "v_prediction")[version - 1],
    )


def state(folder, version, parts):
    parts.trainer.progress.current_step = version
    parts.trainer.save_state(folder / "dog-state")


def delta(folder, version, parts):
    unet = parts.models.unet
    matrices = {
        name: tensor.detach() + version
        for name, tensor in unet.named_parameters()
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    save_delta(folder / "dog.safetensors", matrices, unet=unet, metadata={})


def latents(folder, version, parts):
    info = parts.info
    moved = type(info)(**{**vars(info), "path": folder / "dog.png"})

    def encode(pixels):
        size = (len(pixels), 4, pixels.shape[2] // 8, pixels.shape[3] // 8)
        return torch.full(size, float(version))

    Image.new("RGB", info.size).save(folder / "dog.png")
    (entry,) = cache_latents([moved], encode, vae_id=str(version), to_disk=True)
    if isinstance(entry, CachedLatents):
        raise OSError("kept in memory")  # the write failed, and the run goes on


def contextualizer(folder, version, parts):
    facts = ContextualizerFacts("te", "tok", version, accuracy=0.5, loss=1.0)
    save_contextualizer(folder / "dog.safetensors", parts.contextualizer, facts)


def built_folder(folder, version, parts):
    """A built model in the cache: made once, so there is no older version."""

    def build(unfinished):
        write_weights(unfinished / "a.safetensors", weights_of(version), metadata={})

    os.environ["MLM_PLUGIN_CACHE"] = str(folder)
    cached_folder("dog", build)


def subject(folder, version, parts):
    Subject("dog", "sks", f"dog{version}", Path("photos"), is_kohya=False).options(folder)


def options(folder, version, parts):
    (folder / "dog.toml").unlink(missing_ok=True)  # an old file is never replaced
    write_options({"output_name": f"dog{version}"}, folder / "dog.toml")


def class_images(folder, version, parts):
    prompt = f"a photo of dog {version}"
    (folder / "dog.txt").unlink(missing_ok=True)
    draw_class_images._write_caption(folder / "dog.png", prompt, ".txt")
    settings = draw_class_images.ClassImageSettings(prompt, "toy", seed=1, size=(64, 64))
    draw_class_images._write_settings(folder, settings)
    draw_class_images._save(folder / "dog.png", picture_of(version), torch.float32)


def results(folder, version, parts):
    scores = [{"prompt": "a", "text": "a", "scores": {"x": float(version)}}] * 40
    write_results(folder, {"prompts": scores, "text": {}})


class Write(NamedTuple):
    """One kind of write; ``fresh``: it never replaces an older file."""

    call: Callable[[Path, int, Parts], None]
    fresh: bool = False


def _lora(suffix):
    def write(folder, version, parts):
        save_lora(folder / f"dog{suffix}", weights_of(version), metadata={}, dtype=None)

    return write


WRITES = {
    "LoRA": Write(_lora(".safetensors")),
    "intermediate LoRA": Write(_lora("-step00000004.safetensors")),
    "pickle": Write(_lora(".pt")),
    "embedding": Write(
        lambda folder, version, parts: save_embedding(
            folder / "dog_embedding.safetensors",
            {EMBEDDING_KEYS[1][0]: torch.full((8, 32), float(version))},
            metadata={},
        )
    ),
    "XTI": Write(
        lambda folder, version, parts: save_xti(
            folder / "dog.safetensors", torch.full((16, 1, 32), float(version)), metadata={}
        )
    ),
    "Custom Diffusion": Write(delta),
    "checkpoint": Write(checkpoint),
    "diffusers folder": Write(diffusers_folder),
    "state": Write(state),
    "sidecar": Write(
        lambda folder, version, parts: write_sidecar(
            folder / "dog.safetensors", base_model_version="sd_v1", activation_text=f"x{version}"
        )
    ),
    "preview": Write(
        lambda folder, version, parts: write_preview(
            folder / "dog.safetensors", picture_of(version)
        ),
        fresh=True,
    ),
    "sample": Write(
        lambda folder, version, parts: save_sample(folder / "dog.png", picture_of(version))
    ),
    "latents": Write(latents),
    "contextualizer": Write(contextualizer),
    "built model": Write(built_folder, fresh=True),
    "options": Write(options, fresh=True),
    "class images": Write(class_images, fresh=True),
    "evaluation settings": Write(
        lambda folder, version, parts: claim_folder(folder, {"model": f"dog{version}"}), fresh=True
    ),
    "evaluation results": Write(results),
    "copy of the best": Write(
        lambda folder, version, parts: copy_file(
            PACKAGE / ("files.py", "cli.py")[version - 1], folder / "dog-best.safetensors"
        )
    ),
    "page": Write(lambda folder, version, parts: write_report(folder, f"<p>{version}</p>" * 20)),
    "subject": Write(subject),
    "labels": Write(
        lambda folder, version, parts: write_labels(folder / "dog.json", f"dog{version}", [])
    ),
}


@pytest.fixture(scope="module")
def parts(toy_folder, toy_pictures, toy_text_encoder_size, tmp_path_factory):
    from accelerate.state import AcceleratorState

    flags = [
        *("--pretrained_model_name_or_path", str(toy_folder)),
        *("--train_data_dir", str(toy_pictures), "--method", "textual_inversion"),
        *("--resolution", "64", "--max_train_steps", "2", "--seed", "1"),
        *("--mlm_loss_weight", "0", "--output_name", "dog"),
        *("--output_dir", str(tmp_path_factory.mktemp("unused"))),
    ]
    trainer = trainer_of(check_run(load_config(flags)))
    (info, *_) = trainer.loader.dataset.images
    network = Contextualizer(ContextualizerSizes(**toy_text_encoder_size))
    network.start_from(torch.ones(64, 32), torch.ones(64))
    yield Parts(load_stable_diffusion(str(toy_folder)), trainer, info, network)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def toy_text_encoder_size():
    sizes = {"hidden_size": 32, "vocab_size": 64, "width": 16, "num_layers": 1}
    return sizes | {"max_length": 77}


# --- what must hold ---


def contents(folder):
    """What everything holds that has its final name, by path."""
    return {
        str(path.relative_to(folder)): content_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part[0] == "." for part in path.relative_to(folder).parts)
    }


def content_of(path):
    """The bytes of a file; safetensors writes metadata in any order."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    if path.suffix != ".safetensors" or end > len(content):
        return content
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    return header + content[end:]


def hidden(folder):
    return [path for path in folder.rglob(".*")]


def must_hold(folder, old, new, *, killed):
    """No torn file has a final name, the old one is whole or replaced by the whole new one.

    A folder is all old or all new. What a kill leaves has a hidden name and is removed by the next
    run; what fails leaves nothing.
    """
    if killed:
        for path in hidden(folder):
            os.utime(path, (0, 0))
        for below in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
            remove_temporaries(below, lambda _: True)
    assert hidden(folder) == []
    found = contents(folder)
    assert found.keys() <= new.keys() | old.keys()
    assert found.keys() >= old.keys()
    for names in units(found):
        unit = {name: found[name] for name in names}
        whole = [{name: x.get(name) for name in names} for x in (old, new)]
        assert unit in whole, f"torn: {names}"


def units(found):
    """What gets its name at once: single files, and whole folders of models and states."""
    folders = ("dog/", "dog-state/")
    for start in folders:
        if names := [name for name in found if name.startswith(start)]:
            yield names
    yield from ([name] for name in found if not name.startswith(folders))


@pytest.fixture
def before_and_after(parts, tmp_path, monkeypatch):
    """A folder with version 1 of a write, and the contents of both versions."""
    monkeypatch.setenv("MLM_PLUGIN_CACHE", str(tmp_path))

    def prepare(write):
        folder, other = tmp_path / "out", tmp_path / "other"
        folder.mkdir()
        other.mkdir()
        if not write.fresh:
            write.call(folder, 1, parts)
            write.call(other, 1, parts)
        old = contents(folder)
        write.call(other, 2, parts)
        return folder, old, contents(other)

    return prepare


# --- faults ---


def raising(code):
    def fail(*_values, **_settings):
        raise OSError(code, os.strerror(code))

    return fail


@contextmanager
def full_disk(folder, old, new):
    """No file may grow beyond half of the largest one: a real error in the middle of a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (half_of(old, new), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def half_of(old, new):
    changed = [len(content) for name, content in new.items() if old.get(name) != content]
    return max(changed) // 2


def failing(code, *names):
    """The lowest layer raises: creating a temporary, syncing it, or giving it its name."""

    @contextmanager
    def fault(folder, old, new):
        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                owner = tempfile if hasattr(tempfile, name) else os
                patch.setattr(owner, name, raising(code))
            yield

    return fault


FAULTS = {"full in the middle": full_disk} | {
    f"{errno.errorcode[code]} at {moment}": failing(code, *names)
    for code in (errno.ENOSPC, errno.EIO, errno.EACCES)
    for moment, names in {
        "create": ("mkstemp", "mkdtemp", "mkdir"),
        "sync": ("fsync",),
        "rename": ("replace",),
    }.items()
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_fails(before_and_after, parts, name, fault):
    write = WRITES[name]
    folder, old, new = before_and_after(write)
    with pytest.raises((OSError, UserError)), FAULTS[fault](folder, old, new):
        write.call(folder, 2, parts)
    must_hold(folder, old, new, killed=False)


# --- kills ---


def kill(*_values, **_settings):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(call):
    def killed(*values, **settings):
        call(*values, **settings)
        kill()

    return killed


def kill_in_the_middle(patch, old, new):
    """The kernel kills the process when a file reaches half of its size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (half_of(old, new), resource.RLIM_INFINITY))


KILLS = {
    "before the write": lambda patch, *_: [
        patch.setattr(tempfile, "mkstemp", kill),
        patch.setattr(os, "mkdir", kill),
    ],
    "during the write": kill_in_the_middle,
    "before the rename": lambda patch, *_: patch.setattr(os, "replace", kill),
    "after the rename": lambda patch, *_: patch.setattr(os, "replace", kill_after(os.replace)),
    "after a rename of the old folder": lambda patch, *_: patch.setattr(
        os, "rename", kill_after(os.rename)
    ),
}


def run_killed(action):
    """Run it in a child process; returns the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.parametrize("moment", KILLS)
@pytest.mark.parametrize("name", WRITES)
def test_a_process_that_is_killed(before_and_after, parts, name, moment):
    write = WRITES[name]
    folder, old, new = before_and_after(write)

    def action():
        KILLS[moment](pytest.MonkeyPatch(), old, new)
        write.call(folder, 2, parts)

    ended_by = run_killed(action)
    if not moment.startswith("after a"):  # only folders are renamed twice
        assert ended_by in (signal.SIGKILL, signal.SIGXFSZ)
    must_hold(folder, old, new, killed=True)
    if moment == "after the rename" and len(new) == 1 and "/" not in next(iter(new)):
        assert contents(folder) == new


@pytest.mark.parametrize("name", WRITES)
def test_what_is_renamed_is_on_the_disk_before_and_its_folder_after(
    before_and_after, parts, monkeypatch, name
):
    write = WRITES[name]
    folder, old, new = before_and_after(write)
    synced, replace, fsync = set(), os.replace, os.fsync

    def note(handle):
        synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def check(source, target):
        source = Path(source)
        files = [source] if source.is_file() else [source, *source.rglob("*")]
        assert not {path for path in files if path.resolve() not in synced}
        replace(source, target)
        synced.add("due")

    monkeypatch.setattr(os, "fsync", lambda handle: (note(handle), synced.discard("due")))
    monkeypatch.setattr(os, "replace", check)
    write.call(folder, 2, parts)
    assert "due" not in synced


@pytest.mark.parametrize("name", WRITES)
def test_files_have_the_permissions_of_their_neighbours(before_and_after, parts, name):
    write = WRITES[name]
    before = os.umask(0o027)
    try:
        folder, _, _ = before_and_after(write)
        write.call(folder, 2, parts)
    finally:
        os.umask(before)
    for path in folder.rglob("*"):
        wanted = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path.name


# --- that the table is complete ---

WRITING = {
    *("write_text", "write_bytes", "save", "savez", "save_file", "save_pretrained", "save_config"),
    *("copytree", "copyfile", "savefig"),
}
TEMPORARY = {"atomic_path", "_whole_folder"}
IN_A_TEMPORARY_FOLDER = {  # functions that are given one by their caller
    ("export/checkpoint.py", "_write_network"),
    ("export/checkpoint.py", "_write_json"),
    ("export/checkpoint.py", "_write_tokenizer"),
    ("pocket/shipped.py", "unpack"),
    ("pocket/shipped.py", "save_text_encoder"),
    ("toy.py", "build_toy_model"),
    ("toy.py", "build_toy_tokenizer"),
    ("toy.py", "build_toy_data"),
    ("training/state.py", "_write_parts"),
}
NO_FILE = {
    ("contextualizer_file.py", "in_memory"),
    ("evaluation/rendering.py", "embed_picture"),
    ("evaluation/charts.py", "svg"),
    ("export/lora_files.py", "kohya_hashes"),
    ("export/thumbnails.py", "thumbnail"),
    ("setup/saving.py", "_elsewhere"),
}
GROWING = {("setup/console.py", "output_to")}  # logs grow under their names


def names_called(node):
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            yield getattr(call.func, "attr", getattr(call.func, "id", ""))


def writes_in(node, function="", covered=False):
    """Functions that write outside of a temporary file."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        function = node.name
    if isinstance(node, ast.With):
        covered |= any(TEMPORARY & set(names_called(item)) for item in node.items)
    if isinstance(node, ast.Call) and not covered:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
        if name in WRITING or (name == "open" and set("wax") & set("".join(map(str, modes)))):
            yield function
    for child in ast.iter_child_nodes(node):
        yield from writes_in(child, function, covered)


def test_nothing_is_written_under_its_final_name():
    found = {
        (path.relative_to(PACKAGE).as_posix(), function)
        for path in PACKAGE.rglob("*.py")
        for function in writes_in(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found <= IN_A_TEMPORARY_FOLDER | NO_FILE | GROWING
