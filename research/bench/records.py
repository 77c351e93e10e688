"""Records of finished trials: small JSON files, one per stage and arm, committed to the repository.

A trial is identified by its place in the plan, so a record of another plan is not taken for it. The
fingerprint does not cover code, captions and pictures: where those change, records are dropped by
hand. Does not import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm_plugin.errors import UserError
from mlm_plugin.files import atomic_path, read_text
from research.bench.plan import PLAN, Trial

__all__ = ["RECORDS", "Record", "Records", "key_of"]

RECORDS = Path(__file__).parents[1] / "results" / "bench"
Record = Mapping[str, Any]


def key_of(trial: Trial) -> str:
    """Fingerprint of a trial's place in the plan.

    Trainings of other lengths have the same; their records are in stages of their own.
    """
    arm, setting, concept, seed = trial
    facts = [
        arm.family.method,
        dict(arm.family.flags),
        arm.regularizer,
        dict(arm.flags),
        arm.grammar,
        dict(setting),
        concept.name,
        seed,
        *PLAN,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


class Records:
    """Reads and adds records.

    A record has ``key``, ``setting``, ``concept``, ``seed``, ``evaluations`` (step, prompt fidelity
    and identity of each), ``ms_per_step``, ``seconds`` of the whole trial, and
    the ``commit`` it ran at, which the earliest lack.

    Args:
        folder: has a folder for each stage.
        model: fingerprint of the pocket model; ``None``: reading only, of any model.
    """

    def __init__(self, folder: Path = RECORDS, model: str | None = None):
        self.folder, self.model = folder, model

    def of(self, stage: str, name: str) -> dict[str, Record]:
        """Records of an arm by key, empty if there are none.

        Raises:
            UserError: they are those of another model.
        """
        path = self._path(stage, name)
        if not path.exists():
            return {}
        content = json.loads(read_text(path))
        if self.model not in (None, content["model"]):
            raise UserError(f"{path}: has results of another model; choose another --records")
        return {record["key"]: record for record in content["trials"]}

    def of_reports(self, stage: str, name: str) -> dict[str, Record]:
        """Like :meth:`of`; what was reported counts for other rates of the U-Net too."""
        reported = self.of("report", name) if stage == "rates" else {}
        return {**reported, **self.of(stage, name)}

    def add(self, stage: str, name: str, record: Record) -> None:
        """Add the record of a trial, or replace an earlier one."""
        records = {**self.of(stage, name), record["key"]: record}
        lines = ",\n".join("  " + json.dumps(value) for value in records.values())
        header = json.dumps({"arm": name, "model": self.model})[:-1]
        with atomic_path(self._path(stage, name)) as temporary:
            temporary.write_text(f'{header}, "trials": [\n{lines}\n]}}\n', encoding="utf-8")

    def _path(self, stage: str, name: str) -> Path:
        return self.folder / stage / f"{name.replace(' ', '-').replace('/', '_')}.json"
