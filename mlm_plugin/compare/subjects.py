"""The subjects: a folder for each, in kohya's layout or as plain photos with a class word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlm_plugin.config.datasets import folder_name
from mlm_plugin.config.nearest import did_you_mean
from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.data.images import list_images
from mlm_plugin.errors import UserError
from mlm_plugin.files import atomic_path, read_text

__all__ = ["Subject", "find_subjects"]

SUBJECT_FILE = "subject.toml"
DREAMBENCH_CLASSES = "prompts_and_classes.txt"  # beside the folders of google/dreambooth
PLACEHOLDER = "sks"


@dataclass(frozen=True)
class Subject:
    """Something to learn.

    Attributes:
        name: of its folder.
        placeholder_token: its name in prompts.
        class_token: what it is.
        folder: holds its photos, or folders such as ``10_sks dog``.
        is_kohya: which of the two.
    """

    name: str
    placeholder_token: str
    class_token: str
    folder: Path
    is_kohya: bool

    def options(self, output: Path) -> dict[str, str]:
        """Options that name its photos and words; plain photos need a file in ``output``."""
        words = {"placeholder_token": self.placeholder_token, "class_token": self.class_token}
        if self.is_kohya:
            return {"train_data_dir": str(self.folder), **words}
        path = output / "subjects" / f"{self.name}.json"
        subset = {
            "image_dir": str(self.folder.resolve()),
            "class_tokens": f"{self.placeholder_token} {self.class_token}",
            "num_repeats": 1,
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"datasets": [{"subsets": [subset]}]}, indent=2))
        return {"dataset_config": str(path), **words}


def find_subjects(root: Path) -> list[Subject]:
    """The subjects of a folder, by name.

    Raises:
        UserError: there are none, or a folder lacks photos or a class word.
    """
    if not root.is_dir():
        raise UserError(f"--subjects {root}: there is no such folder")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if list_images(root) or any(folder_name(folder.name) for folder in folders):
        raise UserError(
            f"--subjects {root}: is the folder of one subject; give the folder above it"
        )
    if not folders:
        raise UserError(f"--subjects {root}: holds no folders; make one for each subject")
    classes = _dreambench_classes(root / DREAMBENCH_CLASSES)
    return [_subject(folder, classes) for folder in folders]


def _subject(folder: Path, classes: Mapping[str, str]) -> Subject:
    names = [folder_name(path.name) for path in sorted(folder.iterdir()) if path.is_dir()]
    texts = list(dict.fromkeys(" ".join(name.class_tokens.split()) for name in names if name))
    if texts:
        placeholder, _, class_token = texts[0].partition(" ")
        if len(texts) > 1 or not class_token:
            raise UserError(
                f"--subjects {folder}: its folders name {', '.join(map(repr, texts))}; one subject "
                "is named by placeholder and class word, like '10_sks dog'"
            )
        return Subject(folder.name, placeholder, class_token, folder, is_kohya=True)
    if not list_images(folder):
        raise UserError(f"--subjects {folder}: holds neither photos nor a folder like '10_sks dog'")
    words = _words(folder / SUBJECT_FILE)
    class_token = words.get("class_token") or classes.get(folder.name)
    if not class_token:
        raise UserError(
            f"--subjects {folder}: what it shows is not named; write {SUBJECT_FILE} into it, with "
            'class_token = "dog"'
        )
    placeholder = words.get("placeholder_token", PLACEHOLDER)
    return Subject(folder.name, placeholder, class_token, folder, is_kohya=False)


def _words(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    words = read_toml(path)
    for name, value in words.items():
        if name not in ("placeholder_token", "class_token"):
            hint = did_you_mean(name, ("placeholder_token", "class_token"))
            raise UserError(f"{path}: unknown key {name!r}{hint}")
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{path}: {name} = {value!r} is not allowed; it must be a word")
    return words


def _dreambench_classes(path: Path) -> dict[str, str]:
    """Class words by folder, where the subjects are those of DreamBench.

    Source: google/dreambooth dataset/prompts_and_classes.txt: lines such as ``duck_toy,toy``.
    """
    if not path.is_file():
        return {}
    lines = read_text(path).partition("Prompts")[0].splitlines()
    return dict(line.strip().split(",") for line in lines if line.count(",") == 1)
