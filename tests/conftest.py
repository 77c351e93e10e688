"""Shared by all tests: stored digests of trained weights, small tokenizers, readers of pages."""

from __future__ import annotations

import hashlib
import json
import platform
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mlm_plugin.errors import UserError
from mlm_plugin.mlm.prompts import PromptSet

ASSETS = Path(__file__).parent / "assets"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture
def refused() -> Callable[[Sequence[str]], AbstractContextManager]:
    """``with refused(parts):`` the block ends in a ``UserError`` of one line that holds them."""

    @contextmanager
    def refused(parts: Sequence[str]) -> Iterator[None]:
        with pytest.raises(UserError) as caught:
            yield
        assert "\n" not in str(caught.value)
        for part in parts:
            assert part in str(caught.value)

    return refused


@pytest.fixture
def same_weights(request) -> Callable[[str, str, Sequence[Path]], None]:
    """``same_weights(store, run, files)``: the files hold the weights that ``store`` has of a run.

    With ``--write-digests`` they are stored instead.
    """
    write = request.config.getoption("--write-digests")

    def same_weights(store: str, run: str, files: Sequence[Path]) -> None:
        path = ASSETS / store
        if write:
            _write(path, run, summary_of(files))
        else:
            _compare(json.loads(path.read_text()), run, summary_of(files))

    return same_weights


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A tokenizer of Qwen's kind: byte-level BPE, no BOS or EOS, padding on the right."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    prompts = PromptSet.load("person")
    rng = random.Random(0)
    texts = [prompts.sample(rng, "girl") for _ in range(200)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=511,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        padding_side="right",
    )


@pytest.fixture(scope="session")
def t5_tokenizer():
    """A tokenizer of T5's kind that knows some letters: SentencePiece, EOS at the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789,._'()"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)


def summary_of(files: Sequence[Path]) -> dict:
    """Digest and sums of everything trained that a run wrote."""
    digest, sums = hashlib.sha256(), {}
    for path in sorted(files):
        weights = load_file(path)
        for name in sorted(weights):
            digest.update(f"{path.name}/{name}{tuple(weights[name].shape)}".encode())
            digest.update(weights[name].reshape(-1).view(torch.uint8).numpy().tobytes())
        sums[path.name] = sum(float(w.double().abs().sum()) for w in weights.values())
    return {"digest": digest.hexdigest(), "sums": sums}


def machine() -> dict[str, str]:
    """What a digest depends on besides the code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "diffusers": version("diffusers"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": (models or [platform.processor()])[0],
    }


def _write(path: Path, run: str, found: dict) -> None:
    runs = json.loads(path.read_text())["runs"] if path.is_file() else {}
    values = {"machine": machine(), "runs": runs | {run: found}}
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


def _compare(values: dict, run: str, found: dict) -> None:
    expected = values["runs"][run]
    assert found["sums"].keys() == expected["sums"].keys()
    for file, value in found["sums"].items():
        assert value == pytest.approx(expected["sums"][file], rel=1e-4), file
    if values["machine"] == machine():
        assert found["digest"] == expected["digest"]


# --- pages ------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, addresses and text of a page; complains of tags that do not close."""

    VOID = {"meta", "img"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.open, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="session")
def page_of():
    """Reads a report: its tags close, and it needs nothing from outside."""

    def read(path):
        text = path.read_text(encoding="utf-8")
        page = Page(text)
        assert "script" not in page.tags
        assert all(address.startswith("data:image/") for address in page.addresses)
        assert not re.search(r"url\(|@import", text)
        return page

    return read


@pytest.fixture
def screenshot_of(tmp_path):
    """A report in a browser, ``(1200, 1000, 3)``: on paper, and nothing runs out of the page."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)})")

    def show(report):
        shot = tmp_path / "report.png"
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'browser'}", "--hide-scrollbars",
            "--window-size=1000,1200", f"--screenshot={shot}",
        ]  # fmt: skip
        command = [browser, *flags, report.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
        assert pixels.shape == (1200, 1000, 3)
        paper = pixels[5, 5]
        assert paper.min() > 230 or paper.max() < 40, "light or dark, as the style sheet says"
        assert (abs(pixels[:, :20] - paper) < 8).all(), "nothing runs out of the page on the left"
        assert (abs(pixels[:, 980:] - paper) < 8).all(), "nor on the right"
        return pixels

    return show
