"""The doctor's page, from the facts of ``report.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlm_plugin.doctor.diagnosis import percent
from mlm_plugin.evaluation.charts import Bar, Line, Point, bar_chart, scatter_chart
from mlm_plugin.evaluation.rendering import render
from mlm_plugin.mlm.kept_context import KEPT

__all__ = ["doctor_page"]


def doctor_page(facts: Mapping[str, Any]) -> str:
    """A self-contained page: verdict, shares, curve, blocks and contents."""
    findings = facts["findings"]
    blocks = findings["with_trigger"]["unet_blocks"] if findings else {}
    return render(
        "doctor.html",
        facts=facts,
        findings=findings,
        percent=percent,
        curve=_curve(findings["curve"]) if findings and findings["curve"] else None,
        blocks=_blocks(blocks) if blocks else None,
    )


def _curve(curve):
    points = [
        Point(strength, 100 * kept, f"{strength:g}: {percent(kept)}", curve="kept")
        for strength, kept in curve
    ]
    return scatter_chart(
        points,
        x_title="strength of the text encoder part",
        y_title="context kept, %",
        joined=True,
        lines=[Line(100 * KEPT, "harmless")],
    )


def _blocks(shares: Mapping[str, float]):
    bars = [Bar(block, 100 * share, percent(share)) for block, share in shares.items()]
    return bar_chart(bars, title="context kept in the keys and values of each block")
