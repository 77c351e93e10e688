"""Pages and records agree, and the tables say what the records hold."""

import re

import pytest

from mlm_plugin.pocket.concepts import REPORTED
from research.bench.pages import PAGES, blocks, rewritten
from research.bench.plan import (
    ARMS,
    CLAIMS,
    PLAN,
    RATES,
    UNTRAINED,
    shorter,
    trials_at_rates,
    trials_to_report,
    tuning_trials,
)
from research.bench.records import RECORDS, Records, key_of
from research.bench.search import search

STORED = sorted(RECORDS.glob("*/*.json"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_say_what_the_records_say(page):
    text = page.read_text(encoding="utf-8")
    assert rewritten(text, blocks(Records())) == text, "run python -m research.bench.pages"


def test_every_block_has_a_place():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"<!-- bench:(\w+) -->", text)) == set(blocks(Records()))


def test_no_record_is_of_another_plan():
    names = {arm.name: arm for arm in (*ARMS.values(), UNTRAINED)}
    for stage in ("tuning", "report", "rates", *map(shorter, PLAN.evaluation_steps[:-1])):
        for name, arm in names.items():
            if stage == "tuning":
                trials = tuning_trials(arm, arm.settings, slice(None))
            elif stage == "rates":
                trials = trials_at_rates(arm) if name in RATES else []
            else:
                trials = [t for setting in arm.settings for t in trials_to_report(arm, setting)]
            assert set(Records().of(stage, name)) <= {key_of(trial) for trial in trials}, name
    known = {f"{name.replace(' ', '-').replace('/', '_')}" for name in names}
    assert {path.stem for path in STORED} <= known


@pytest.fixture
def records(tmp_path):
    """Complete records of every arm; terms have more fidelity, the more the later the concept."""
    records = Records(tmp_path, "a model")

    def add(stage, trials):
        for trial in trials:
            arm = trial.arm
            gain = 0.0
            if arm.regularizer == "mlm":
                gain = 0.1 + 0.01 * trial.seed
                gain += 0.01 * REPORTED.index(trial.concept) if stage == "report" else 0
            step = 0 if arm is UNTRAINED else 200
            evaluation = [step, 0.95, 0.15] if arm is UNTRAINED else [step, 0.6 + gain, 0.6]
            records.add(
                stage,
                arm.name,
                {
                    "key": key_of(trial), "setting": dict(trial.setting),
                    "concept": trial.concept.name, "seed": trial.seed, "evaluations": [evaluation],
                    "ms_per_step": 100.0, "seconds": 30.0,
                },
            )  # fmt: skip

    for name in ("lora plain", "lora both/states", "lora core"):
        arm = ARMS[name]
        while trials := search(arm, records.of("tuning", name)).missing:
            add("tuning", trials)
        add("report", trials_to_report(arm, arm.grid[0]))
    for setting in UNTRAINED.grid:
        add("report", trials_to_report(UNTRAINED, setting))
    return records


def test_tables_hold_means_over_concepts_and_corrected_p(records):
    found = blocks(records)
    assert (
        "| lora plain | unet_lr 2.5e-3, text_encoder_lr 1.5e-4 | 60.0 | 60.0 | – |"
        in (found["report"])
    )
    assert "| untrained model, class word | – | 95.0 | 15.0 |" in found["report"]
    gain = 100 * (0.1 + 0.005 + 0.01 * 5.5)
    row = next(line for line in found["claims"].splitlines() if "| lora plain |" in line)
    assert f"| +{gain:.1f} ± " in row
    assert f"| +{gain:.1f} | 0.0005 |" in row
    assert f"| 0.0005 | {2 / 4096 * len(CLAIMS):.4f} |" in row
    values, gains = (
        next(line for line in found["concepts"].splitlines() if line.startswith(f"| {start} |"))
        for start in ("lora both/states", "lora both/states – lora plain")
    )
    assert "| 70 / 60 | 72 / 60 |" in values  # 70.5 and 71.5, to even
    assert "| +10.5 | +11.5 |" in gains
    assert values.count("|") == gains.count("|") == len(REPORTED) + 2
    assert "| LoRA | 60.0 %, likeness 60.0 | 76.0 %, likeness 60.0 |" in found["readme"]


def test_shorter_trainings_are_the_points_of_the_curve_they_are_compared_with(records):
    """Both arms end at .8 and .7 with an identity of .3 and .6 there, the term above by .05."""
    for name, above in (("lora plain", 0), ("lora both/states", 0.05)):
        for steps, identity, fidelity in ((50, 0.3, 0.8), (100, 0.6, 0.7)):
            assert blocks(records)["settled"] == "No results of the current plan yet.\n"
            for trial in trials_to_report(ARMS[name], ARMS[name].grid[0]):
                record = {
                    **records.of("report", name)[key_of(trial)],
                    "evaluations": [[steps, fidelity + above, identity]],
                }
                records.add(shorter(steps), name, record)
    (row,) = (line for line in blocks(records)["settled"].splitlines() if "both/states" in line)
    # at .6, the last two are pooled: (.76 + .75) / 2 with the term, (.6 + .7) / 2 without
    assert "| 0 + 0 of 12 | +10.5 ± " in row


def test_the_setting_of_the_second_search_is_claimed_and_that_of_the_first_shown_too(records):
    """With 0.7 instead of 0.6, plain training loses 10 points less."""
    arm = ARMS["lora plain"]
    better = arm.second_grid[1]
    trials = [*tuning_trials(arm, (better,), slice(None)), *trials_to_report(arm, better)]
    for trial in trials:
        record = {
            "key": key_of(trial), "setting": dict(trial.setting), "concept": trial.concept.name,
            "seed": trial.seed, "evaluations": [[200, 0.7, 0.6]], "ms_per_step": 1.0,
            "seconds": 1.0,
        }  # fmt: skip
        stage = "report" if trial.concept in REPORTED else "tuning"
        records.add(stage, arm.name, record)
    found = blocks(records)
    (claim,) = (line for line in found["claims"].splitlines() if "| lora plain |" in line)
    (first,) = (line for line in found["first"].splitlines() if "| lora plain:" in line)
    assert "| +6.0 ± " in claim
    assert "| lora plain: unet_lr 2.5e-3, text_encoder_lr 1.5e-4 | +16.0 ± " in first
    assert "| lora plain | unet_lr 6.25e-4, text_encoder_lr 1.5e-4 | 70.0 |" in found["report"]
    assert "| lora plain, first search | unet_lr 2.5e-3, " in found["report"]


def test_every_rate_of_the_unet_has_a_row_of_its_own(records):
    """Plain training draws .5 and .4 of the prompt there, the term .52 and .42."""
    for name, above in (("lora plain", 0), ("lora both/states", 0.02)):
        for trial in trials_at_rates(ARMS[name]):
            fidelity = {"1.25e-3": 0.5, "5e-3": 0.4}[trial.setting["unet_lr"]] + above
            record = {
                "key": key_of(trial), "setting": dict(trial.setting),
                "concept": trial.concept.name, "seed": trial.seed,
                "evaluations": [[200, fidelity, 0.6]], "ms_per_step": 1.0, "seconds": 1.0,
            }  # fmt: skip
            records.add("rates", name, record)
    rows = blocks(records)["rates"].splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| 1.25e-3", "| 2.5e-3", "| 5e-3"]
    assert "| 1.25e-3 | 50.0 / 60.0 | 52.0 / 60.0 | +2.0 ± " in rows[0]
    assert "| 2.5e-3 | 60.0 / 60.0 | 76.0 / 60.0 | +16.0 ± " in rows[1]
    assert "| 5e-3 | 40.0 / 60.0 | 42.0 / 60.0 | +2.0 ± " in rows[2]


def test_searches_that_end_at_an_edge_are_named(records):
    """All settings of the fixture score alike, so that the first in the grid is found."""
    rows = blocks(records)["edges"].splitlines()[2:]
    edges = "highest unet_lr (2.5e-3), lowest text_encoder_lr (1.5e-4), lowest weight (0.03)"
    assert f"| lora core | {edges} |" in rows
    # the second grid has a lower rate of the U-Net and a lower one of the text encoder
    assert not any(row.startswith("| lora plain |") for row in rows)


def test_an_arm_that_lacks_a_trial_is_not_shown(records):
    (path,) = (records.folder / "report").glob("lora-core.json")
    path.unlink()
    found = blocks(records)
    assert "lora core" not in found["report"]
    assert "| lora both/states | lora core | not run | – |" in found["claims"]
    assert "lora core" in found["tuning"]


def test_without_records_a_block_says_so(tmp_path):
    assert set(blocks(Records(tmp_path)).values()) == {"No results of the current plan yet.\n"}


def test_only_blocks_are_rewritten_and_keep_their_indent():
    text = "a\n  <!-- bench:claims -->\nold\n  <!-- /bench:claims -->\nb\n"
    new = "a\n  <!-- bench:claims -->\n\n  new\n\n  <!-- /bench:claims -->\nb\n"
    assert rewritten(text, {"claims": "new\n", "report": "x\n"}) == new
    assert rewritten(new, {"claims": "new\n"}) == new
