"""Every way to a verdict, by name; from rows of a run folder and from plain facts."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune import chance, evidence, rules, runs, verdict, yamlfile
from finetune.errors import UserError
from finetune.evidence import Change, Count, Course, Echo, Facts, Leak, Setting
from finetune.keeping import Keeper
from finetune.runs import RunFolder
from finetune.starters import find
from finetune.verdict import Judgement, Verdict, judge

BY = rules.read()
CONTRACT = {"version", "verdict", "reason", "next", "epoch", "step", "axes", "run"}
ALWAYS = {"learned", "recites", "leak", "harmed", "script"}
WOBBLE = (-0.02, 0.02, -0.01, 0.01, 0.0, 0.015, -0.015, 0.005, -0.005, 0.0)

NO_ECHO = Echo(Count(0, 40), Count(0, 40), Count(0, 10), (0.0, 0.0), None, 10.0)
HEAVY = replace(NO_ECHO, whole=Count(3, 40), long=Count(5, 40), p=0.001)


def around(middle: float) -> tuple[float, ...]:
    return tuple(middle + one for one in WOBBLE)


def course(*rises: float, looks: int = 8, best: float = 2.0, **more: Any) -> Course:
    """Rises above the best look, one look after the other, spread evenly over a travel of 1."""
    changes = tuple(Change((i + 1) / len(rises), around(rise)) for i, rise in enumerate(rises))
    return Course(looks, best, changes, 10.0, **more)


STEADY = course(0.0, 0.0)
WORSE = course(0.1, 0.12)
GOOD = Facts(100, 10.0, 1.0, 10, 1.8, around(0.2), around(0.1), {"nll": STEADY}, NO_ECHO)


def word(facts: Facts) -> str:
    return judge(facts, BY).verdict


def told(facts: Facts) -> Verdict:
    one = judge(facts, BY)
    found = verdict.conclude([one], BY, "epochs", one)
    assert found is not None
    return found


# overfit


def test_a_confirmed_leak_is_overfit_at_any_n() -> None:
    leak = Leak("confirmed", Count(2, 60))
    assert word(replace(GOOD, leak=leak)) == "overfit"
    assert word(Facts(1, 1.0, 0.1, leak=leak)) == "overfit"
    assert word(Facts(1, 1.0, 0.1, leak=leak, elsewhere=True)) == "overfit"


def test_heavy_reciting_and_harm_together_are_overfit() -> None:
    found = told(replace(GOOD, echo=HEAVY, courses={"nll": WORSE}))
    assert found.verdict == "overfit"
    assert "3 of 40" in found.reason
    assert "0.120 higher" in found.reason


def test_heavy_reciting_and_harm_are_overfit_even_with_few_examples() -> None:
    echo = replace(HEAVY, whole=Count(2, 4))
    assert word(replace(GOOD, held_out=3, echo=echo, courses={"nll": WORSE})) == "overfit"


# watch


def test_heavy_reciting_alone_is_watch() -> None:
    assert word(replace(GOOD, echo=HEAVY)) == "watch"


@pytest.mark.parametrize(
    "echo",
    [
        replace(NO_ECHO, whole=Count(1, 40), p=0.8),
        replace(NO_ECHO, long=Count(1, 40)),
        replace(NO_ECHO, windows=(0.06, 0.01)),
    ],
    ids=["one whole", "one long", "windows"],
)
def test_a_little_reciting_is_watch(echo: Echo) -> None:
    assert word(replace(GOOD, echo=echo)) == "watch"


def test_windows_also_echoed_when_held_out_are_no_reciting() -> None:
    assert word(replace(GOOD, echo=replace(NO_ECHO, windows=(0.30, 0.27)))) == "ok"


def test_many_whole_echoes_that_chance_explains_are_not_heavy() -> None:
    for p in (0.2, None):
        echo = replace(HEAVY, p=p)
        assert word(replace(GOOD, echo=echo, courses={"nll": WORSE})) == "watch"


def test_a_chance_too_small_for_three_places_is_not_called_nought() -> None:
    said = told(replace(GOOD, echo=replace(HEAVY, p=1e-9), courses={"nll": WORSE})).reason
    assert "further than held-out ones (p below 0.001)" in said
    assert "p 0.000" not in said


def test_two_of_a_hundred_whole_echoes_are_not_heavy() -> None:
    few = replace(HEAVY, whole=Count(2, 100))
    assert not judge(replace(GOOD, echo=few), BY).signs.heavy
    assert judge(replace(GOOD, echo=replace(few, whole=Count(5, 100))), BY).signs.heavy


@pytest.mark.parametrize("name", ["nll", "format", "drift_neutral"])
def test_harm_alone_is_watch(name: str) -> None:
    assert word(replace(GOOD, courses={"nll": STEADY, name: WORSE})) == "watch"


def test_one_point_of_accuracy_is_the_least_harm() -> None:
    exact = tuple(Change(one, (0.009,) * 10) for one in (0.5, 1.0))
    more = tuple(Change(one, (0.011,) * 10) for one in (0.5, 1.0))
    assert word(replace(GOOD, courses={"accuracy": Course(8, 0.5, exact, 10.0)})) == "ok"
    assert word(replace(GOOD, courses={"accuracy": Course(8, 0.5, more, 10.0)})) == "watch"


def test_one_percent_is_the_least_harm() -> None:
    change = tuple(Change(one, (0.019,) * 10) for one in (0.5, 1.0))
    assert word(replace(GOOD, courses={"nll": Course(8, 2.0, change, 10.0)})) == "ok"
    assert word(replace(GOOD, courses={"nll": Course(8, 1.8, change, 10.0)})) == "watch"


def test_harm_within_two_standard_errors_is_none() -> None:
    wild = tuple(10 * one + 0.05 for one in WOBBLE)
    changes = tuple(Change(one, wild) for one in (0.5, 1.0))
    assert word(replace(GOOD, courses={"nll": Course(8, 2.0, changes, 10.0)})) == "ok"


def test_one_bad_look_is_not_harm() -> None:
    assert word(replace(GOOD, courses={"nll": course(0.0, 0.2)})) == "ok"


def test_two_bad_looks_close_together_are_not_harm() -> None:
    close = tuple(Change(one, around(0.2)) for one in (0.96, 1.0))
    apart = tuple(Change(one, around(0.2)) for one in (0.95, 1.0))
    assert word(replace(GOOD, courses={"nll": Course(8, 2.0, close, 10.0)})) == "ok"
    assert word(replace(GOOD, courses={"nll": Course(8, 2.0, apart, 10.0)})) == "watch"


def test_harm_is_unresolved_before_five_looks() -> None:
    facts = replace(GOOD, courses={"nll": course(0.1, 0.2, looks=4)})
    found = told(facts)
    assert found.verdict == "ok"
    assert not found.axes["harmed"].resolved
    assert "not resolvable: 4 looks" in found.reason


def test_an_only_look_is_held_against_the_base() -> None:
    facts = replace(GOOD, courses={"format": course(0.1, looks=1, name="zephyr")}, alone=True)
    found = told(facts)
    assert found.verdict == "watch"
    assert "(zephyr) is 0.100 higher than the base's" in found.reason
    assert word(replace(facts, alone=False)) == "ok"


def test_drift_does_not_gate_until_calibrated() -> None:
    facts = replace(GOOD, courses={"drift_neutral": course(0.1, 0.12, cut=None)})
    found = told(facts)
    assert found.verdict == "ok"
    assert found.axes["drift_neutral"].value == pytest.approx(0.12)


def test_calibrated_drift_alarms_only_with_its_bound_above_the_cut() -> None:
    assert word(replace(GOOD, courses={"drift_neutral": course(0.1, 0.12, cut=0.115)})) == "ok"
    assert word(replace(GOOD, courses={"drift_neutral": course(0.1, 0.12, cut=0.05)})) == "watch"


def test_a_wrong_script_is_always_harm() -> None:
    facts = replace(GOOD, script=Count(1, 60))
    assert word(facts) == "watch"
    assert word(replace(facts, echo=HEAVY)) == "overfit"
    assert "neither the data nor the prompt" in told(facts).reason


def test_a_single_leak_is_watch() -> None:
    found = told(replace(GOOD, leak=Leak("single", Count(1, 60))))
    assert found.verdict == "watch"
    assert "--only leak" in found.next
    assert found.axes["leak"].value == pytest.approx(1 / 60)


# ok, undertrained, underpowered


def test_learned_and_nothing_else_is_ok() -> None:
    assert word(GOOD) == "ok"
    assert word(replace(GOOD, leak=Leak("none", Count(0, 60)))) == "ok"


def test_a_leak_not_measured_blocks_nothing() -> None:
    found = told(GOOD)
    assert found.verdict == "ok"
    assert not found.axes["leak"].resolved
    assert "Leaks were not looked for." in found.reason


def test_no_gain_is_undertrained() -> None:
    facts = replace(GOOD, gain=around(0.0), gain_accuracy=around(0.0))
    found = told(facts)
    assert found.verdict == "undertrained"
    assert "--more 10" in found.next


def test_accuracy_alone_is_enough_to_have_learned() -> None:
    assert word(replace(GOOD, gain=around(-0.1))) == "ok"


def test_worse_than_the_base_is_told_to_go_slower() -> None:
    found = told(replace(GOOD, gain=around(-0.3), gain_accuracy=around(-0.1)))
    assert found.verdict == "undertrained"
    assert "a tenth of the learning rate" in found.next


def test_underpowered_replaces_only_ok_and_undertrained() -> None:
    few = replace(GOOD, held_out=7)
    assert word(few) == "underpowered"
    assert word(replace(few, gain=around(0.0), gain_accuracy=())) == "underpowered"
    assert word(replace(few, echo=HEAVY)) == "watch"
    assert word(replace(few, echo=HEAVY, courses={"nll": WORSE})) == "overfit"
    assert word(replace(GOOD, echo=replace(NO_ECHO, whole=Count(0, 7)))) == "underpowered"


def test_an_axis_never_measured_is_unresolved_not_healthy() -> None:
    found = told(replace(GOOD, echo=None))
    assert found.verdict == "underpowered"
    for name in ("recites", "recites_50", "recites_8", "leak", "script", "harmed_accuracy", "harmed_format"):
        axis = found.axes[name]
        assert (axis.value, axis.resolved) == (None, False), name
    assert "not measured" in found.reason


def test_nothing_scored_is_not_zero() -> None:
    found = told(Facts(1, 1.0, 0.1))
    assert found.verdict == "underpowered"
    assert all(axis.value is None and not axis.resolved for axis in found.axes.values())


def test_a_loss_that_is_not_finite_leaves_its_axis_unresolved() -> None:
    found = judge(replace(GOOD, gain=(*around(0.2), math.nan), gain_accuracy=(math.inf, 0.1)), BY)
    assert found.signs.learned is None
    assert found.verdict == "underpowered"


def test_the_training_set_is_a_census() -> None:
    axis = told(replace(GOOD, echo=HEAVY)).axes["recites"]
    assert (axis.value, axis.low, axis.high, axis.n, axis.resolved) == (3 / 40, None, None, 40, True)


# made elsewhere


def test_an_adapter_made_elsewhere_is_at_most_watch() -> None:
    facts = replace(GOOD, elsewhere=True, echo=HEAVY, courses={"nll": WORSE})
    assert word(facts) == "watch"
    assert word(replace(facts, script=Count(1, 60))) == "watch"
    found = told(replace(facts, echo=NO_ECHO))
    assert found.verdict == "underpowered"
    assert not found.axes["learned"].resolved
    assert not found.axes["harmed"].resolved


# which look


def look(step: int, loss: float | None = 1.8, **more: Any) -> Judgement:
    return judge(replace(GOOD, step=step, nll_tstar=loss, **more), BY)


UNTRAINED: dict[str, Any] = {"gain": around(0.0), "gain_accuracy": around(0.0)}


def test_the_best_look_is_ok_with_the_lowest_held_out_loss() -> None:
    looks = [look(1, 1.9), look(2, 1.7), look(3, 1.8), look(4, 1.5, echo=HEAVY)]
    assert verdict.chosen(looks) is looks[1]


def test_underpowered_but_learned_ranks_with_ok() -> None:
    looks = [look(1, 1.9), look(2, 1.7, held_out=5)]
    assert verdict.chosen(looks) is looks[1]


def test_of_undertrained_looks_the_latest_is_kept() -> None:
    looks = [look(1, 1.9, **UNTRAINED), look(2, 1.95, **UNTRAINED)]
    assert verdict.chosen(looks) is looks[1]


def test_watch_comes_before_undertrained_and_overfit_last() -> None:
    harmed: dict[str, Any] = {"echo": HEAVY, "courses": {"nll": WORSE}}
    looks = [look(1, **UNTRAINED), look(2, 1.9, echo=HEAVY), look(3, 1.7, **harmed)]
    assert [one.verdict for one in looks] == ["undertrained", "watch", "overfit"]
    assert verdict.chosen(looks) is looks[1]
    assert verdict.chosen([looks[0], looks[2]]) is looks[0]


def test_a_wrecked_look_is_not_preferred_to_an_untouched_one() -> None:
    wrecked = look(2, 4.0, gain=around(-2.0), gain_accuracy=around(-0.3), courses={"nll": WORSE})
    looks = [look(1, 2.0, **UNTRAINED), wrecked]
    assert wrecked.verdict == "watch"
    assert verdict.chosen(looks) is looks[0]


def test_only_a_look_whose_checkpoint_is_left_is_chosen() -> None:
    looks = [look(1, 1.9), look(2, 1.7)]
    assert verdict.chosen(looks, {1}) is looks[0]
    assert verdict.chosen([]) is None


def test_at_most_three_checkpoints_are_tested_for_leaks() -> None:
    looks = [look(step, 1.5 + step / 10) for step in range(1, 6)]
    tested = []
    while (step := verdict.to_test(looks, len(tested), BY)) is not None:
        tested.append(step)
        looks[step - 1] = look(step, looks[step - 1].facts.nll_tstar, leak=Leak("confirmed", Count(3, 60)))
    assert tested == [1, 2, 3]
    best = verdict.chosen(looks)
    assert best is not None
    assert (best.facts.step, best.verdict) == (1, "overfit")
    going_on = verdict.chosen(looks, running=True)
    assert going_on is not None
    assert going_on.facts.step == 4


def test_testing_ends_with_the_first_clean_checkpoint() -> None:
    looks = [look(1, 1.7, leak=Leak("none", Count(0, 60))), look(2, 1.8)]
    assert verdict.to_test(looks, 1, BY) is None
    assert verdict.chosen(looks) is looks[0]


def test_stop_at_watch_also_stops_at_overfit() -> None:
    assert [verdict.asks_to_stop("overfit", at) for at in ("overfit", "watch", "never")] == [True, True, False]
    assert [verdict.asks_to_stop("watch", at) for at in ("overfit", "watch", "never")] == [False, True, False]


# rows of a run folder


SETTING = Setting("chatml", ("zephyr",))
STEPS = (10, 20, 30, 40, 50, 60)


def metrics() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"kind": "step", "step": 1, "epoch": 0.1, "loss": 2.0}]
    return rows + [{"kind": "look", "step": step, "epoch": step / 10, "travel": step * 1e-4} for step in (0, *STEPS)]


def example(step: int, name: int, loss: float, split: str = "held_out", **more: Any) -> dict[str, Any]:
    row = {"step": step, "epoch": step / 10, "id": f"{split}-{name}", "split": split, "format": "chatml", "map": "full"}
    scored = {"nll": loss, "nll_tstar": loss, "tokens": 100, "hits": round(100 - 20 * loss), "bytes": 400}
    echo = {"run_max": 5, "echo_whole": False, "long": False, "windows": [0, 60], "masked_share": 0.0}
    return {**row, **scored, **echo, **more}


def examples(losses: dict[int, float], format_: str = "chatml") -> list[dict[str, Any]]:
    """Ten held-out and twenty trained examples at every step; held-out losses as given."""
    held_out = [
        example(step, n, loss + 0.01 * (n % 3) + 0.002 * ((n + step) % 5), format=format_)
        for step, loss in losses.items()
        for n in range(10)
    ]
    return held_out + [example(step, n, 1.0, "train") for step in losses if step for n in range(20)]


LEARNING = {0: 2.0, 10: 1.9, 20: 1.8, 30: 1.7, 40: 1.68, 50: 1.66, 60: 1.66}
TURNING = {0: 2.0, 10: 1.8, 20: 1.6, 30: 1.62, 40: 1.7, 50: 1.8, 60: 1.9}


def run(rows: list[dict[str, Any]], findings: list[dict[str, Any]] | None = None, **more: Any) -> Verdict:
    found = verdict.of_run(metrics(), rows, findings or [], replace(SETTING, **more), "epochs")
    assert found is not None
    return found


def test_a_learning_run_is_ok_and_its_last_look_is_kept() -> None:
    found = run(examples(LEARNING))
    assert (found.verdict, found.run["verdict"], found.run["stopped_by"]) == ("ok", "ok", "epochs")
    assert found.step in (50, 60)
    assert found.axes["learned"].value == pytest.approx(0.34, abs=0.01)


def test_a_run_that_turns_is_watched_at_its_end_and_kept_at_its_best() -> None:
    found = run(examples(TURNING))
    assert (found.verdict, found.step) == ("ok", 20)
    assert found.run == {"verdict": "watch", "epoch": 6.0, "stopped_by": "epochs"}


def test_no_look_sees_a_later_one() -> None:
    whole = verdict.judgements(metrics(), examples(TURNING), [], SETTING)
    cut = [row for row in metrics() if row["step"] <= 30]
    part = verdict.judgements(cut, [row for row in examples(TURNING) if row["step"] <= 30], [], SETTING)
    assert [one.verdict for one in part] == [one.verdict for one in whole[:3]]


def test_the_best_look_is_the_middle_of_three_not_a_lucky_one() -> None:
    lucky = {**LEARNING, 20: 1.2}
    facts = evidence.facts(metrics(), examples(lucky), [], SETTING)
    assert facts[-1].courses["nll"].best == pytest.approx(1.67, abs=0.02)


def test_a_run_worse_than_the_base_from_the_start_is_harmed() -> None:
    wrecked = {0: 2.0} | dict.fromkeys(STEPS, 4.0)
    assert run(examples(wrecked)).run["verdict"] == "watch"


def test_over_confidence_is_not_harm() -> None:
    rows = examples(dict.fromkeys(TURNING, 1.7) | {0: 2.0})
    for row in rows:
        row["nll"] += row["step"] / 20
    assert run(rows).run["verdict"] == "ok"


def test_the_worst_held_out_format_is_named() -> None:
    rows = examples(LEARNING) + examples(TURNING, "zephyr")[:70]
    found = judge(evidence.facts(metrics(), rows, [], SETTING)[-1], BY)
    assert found.signs.harms == ("harmed_format",)
    assert found.facts.courses["format"].name == "zephyr"


def test_a_light_look_carries_the_last_full_ones_formats() -> None:
    zephyr = {step: loss for step, loss in TURNING.items() if step <= 50}
    rows = examples(LEARNING) + [row for row in examples(zephyr, "zephyr") if row["split"] == "held_out"]
    last = judge(evidence.facts(metrics(), rows, [], SETTING)[-1], BY)
    assert last.signs.axes["harmed_format"].epoch == 5.0
    assert last.facts.epoch == 6.0


def test_the_free_map_counts_between_looks() -> None:
    rows = examples(LEARNING)
    rows += [example(58, 0, 0.1, "train", map="free", format="alpaca", echo_whole=True, run_max=100)]
    facts = evidence.facts(metrics(), [row for row in rows if row["split"] != "train" or row["step"] < 60], [], SETTING)
    assert facts[-1].echo is not None
    assert facts[-1].echo.whole == Count(1, 20)
    assert facts[-1].echo.epoch == 5.0


def test_a_row_that_measured_no_echo_hides_none() -> None:
    unheard: dict[str, Any] = {"echo_whole": None, "long": None, "windows": None, "map": "free"}
    rows = [*examples(LEARNING), example(40, 0, 0.1, "train", echo_whole=True), example(60, 0, 0.1, "train", **unheard)]
    rows = [row for row in rows if row["split"] != "train" or row["step"] in (40, 60)]
    rows = [row for row in rows if row["id"] != "train-0" or row.get("echo_whole") is not False]
    facts = evidence.facts(metrics(), rows, [], SETTING)
    assert facts[-1].echo is not None
    assert facts[-1].echo.whole == Count(1, 20)
    assert facts[-1].echo.epoch == 4.0


def test_echoes_in_other_formats_are_not_in_the_census() -> None:
    rows = [*examples(LEARNING), example(60, 0, 0.1, "train", format="alpaca", echo_whole=True)]
    assert run(rows).verdict == "ok"


def test_two_whole_echoes_among_long_runs_are_heavy() -> None:
    rows = examples(TURNING)
    for row in rows:
        if row["split"] == "train" and row["step"] >= 50:
            row["run_max"] = 60
            row["echo_whole"] = row["id"] in ("train-0", "train-1")
    found = run(rows)
    assert (found.run["verdict"], found.verdict) == ("overfit", "ok")


def test_a_missing_temperature_column_leaves_loss_unmeasured() -> None:
    rows = [{key: value for key, value in row.items() if key != "nll_tstar"} for row in examples(LEARNING)]
    found = run(rows)
    assert not found.axes["learned"].resolved
    assert found.axes["learned_accuracy"].resolved


def test_one_example_without_a_number_leaves_the_look_unmeasured() -> None:
    rows = examples(LEARNING)
    next(row for row in rows if row["step"] == 60)["nll_tstar"] = None
    facts = evidence.facts(metrics(), rows, [], SETTING)
    assert facts[-1].gain == ()
    assert facts[-2].gain != ()


def test_leaks_and_scripts_are_read_from_findings() -> None:
    leak = [{"probe": "leak", "step": 60, "leak": said} for said in ("none", "single")]
    drift = [
        {"probe": "drift", "step": 60, "look": kind, "id": name, "prompt": "Hi", "wrong_script": name == "b"}
        for kind, names in (("full", "ab"), ("closing", "b"))
        for name in names
    ]
    last = evidence.facts(metrics(), examples(LEARNING), leak + drift, SETTING)[-1]
    assert last.leak == Leak("single", Count(1, 2))
    assert last.script == Count(1, 2)
    other = evidence.facts(metrics(), examples(LEARNING), leak, SETTING)[-2]
    assert other.leak is None


def test_drift_is_read_from_findings() -> None:
    def row(step: int, text: int, cut: float | None) -> dict[str, Any]:
        score = 1.0 + step / 1000 + text / 10_000 * (step % 20)
        return {"probe": "drift", "axis": "neutral", "id": text, "step": step, "score": score, "base": 1.0, "cut": cut}

    for cut, expected in ((None, ()), (0.02, ("drift_neutral",))):
        findings = [row(step, text, cut) for step in STEPS for text in range(10)]
        last = judge(evidence.facts(metrics(), examples(LEARNING), findings, SETTING)[-1], BY)
        assert last.signs.harms == expected
        assert last.signs.axes["drift_neutral"].resolved


def test_without_a_split_every_row_counts_as_trained() -> None:
    rows = [row for row in examples({60: 1.0}) if row["split"] == "held_out"]
    looks = [row for row in metrics() if row["step"] == 60]
    found = verdict.of_run(looks, rows, [], replace(SETTING, elsewhere=True), "")
    assert found is not None
    assert (found.verdict, found.axes["recites"].n) == ("underpowered", 10)


def test_before_the_first_look_there_is_no_verdict() -> None:
    assert verdict.of_run([row for row in metrics() if not row["step"]], [], [], SETTING, "user") is None


def test_the_first_look_of_a_run_is_not_yet_its_only_one() -> None:
    looks = [row for row in metrics() if row["step"] <= 10]
    rows = examples({0: 2.0, 10: 2.5})
    assert verdict.judgements(looks, rows, [], replace(SETTING, running=True))[-1].verdict == "undertrained"
    assert verdict.judgements(looks, rows, [], SETTING)[-1].verdict == "watch"


# the file


def test_the_file_has_the_contracts_keys_and_is_json() -> None:
    found = run(examples(TURNING)).to_json()
    assert found.keys() == CONTRACT
    assert found["run"].keys() == {"verdict", "epoch", "stopped_by"}
    assert all(axis.keys() == {"value", "low", "high", "n", "resolved"} for axis in found["axes"].values())
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_thresholds_are_all_in_the_file(tmp_path: Any) -> None:
    shipped = find("verdict", "suites")
    assert yamlfile.read(shipped).data.keys() == rules.Rules.model_fields.keys()
    path = tmp_path / "verdict.yaml"
    path.write_text(shipped.read_text().replace("enough: 8", "enuff: 8").replace("looks: 5", "looks: 0"))
    with pytest.raises(UserError) as error:
        rules.read(path)
    assert {one.key for one in error.value.problems} == {("looks",), ("enough",), ("enuff",)}
    assert "verdict.yaml:" in str(error.value)


# bounds


def test_rates_have_exact_bounds() -> None:
    found = chance.rate(0, 10)
    assert found is not None
    assert (found.low, found.high) == (0.0, pytest.approx(1 - 0.05**0.1))
    some = chance.rate(3, 40)
    assert some is not None
    below = sum(math.comb(40, k) * some.high**k * (1 - some.high) ** (40 - k) for k in range(4))
    above = sum(math.comb(40, k) * some.low**k * (1 - some.low) ** (40 - k) for k in range(3, 41))
    assert (below, above) == (pytest.approx(0.05), pytest.approx(0.05))
    assert chance.rate(0, 0) is None


@pytest.mark.parametrize(("freedom", "t"), [(1, 6.3138), (4, 2.1318), (9, 1.8331), (29, 1.6991), (1000, 1.6464)])
def test_t_is_that_of_the_tables(freedom: int, t: float) -> None:
    assert chance.t_quantile(0.95, freedom) == pytest.approx(t, abs=1e-4)


def test_an_even_sample_has_students_bounds_and_a_skewed_one_wider() -> None:
    even = chance.mean([-1.0, 1.0] * 5)
    assert even is not None
    assert even.high == pytest.approx(1.8331 * math.sqrt(10 / 9 / 10), abs=1e-4)
    skewed = chance.mean([0.0] * 9 + [10.0])
    assert skewed is not None
    assert skewed.high - skewed.value > 2 * (skewed.value - skewed.low)
    assert skewed.approximate
    assert chance.mean([1.0]) is None


# whatever the facts


numbers = st.floats(allow_nan=True, allow_infinity=True)
finite = st.floats(0, 1e6)
differences = st.lists(numbers | st.floats(-1, 1), max_size=6).map(tuple)
changes = st.builds(Change, finite, differences)
courses = st.builds(
    Course, st.integers(0, 9), numbers, st.lists(changes, max_size=4).map(tuple), finite, st.none() | finite
)
counts = st.integers(0, 60).flatmap(lambda of: st.builds(Count, st.integers(0, of), st.just(of)))
shares = st.floats(0, 1)
windows = st.none() | st.tuples(shares, shares)
anything = st.builds(
    Facts,
    step=st.integers(0, 10**6),
    epoch=finite,
    travel=finite,
    held_out=st.integers(0, 60),
    nll_tstar=st.none() | numbers,
    gain=differences,
    gain_accuracy=differences,
    courses=st.dictionaries(st.sampled_from(["nll", "accuracy", "format", "drift_neutral"]), courses),
    echo=st.none() | st.builds(Echo, counts, counts, counts, windows, st.none() | shares, finite),
    leak=st.none() | st.builds(Leak, st.sampled_from(["none", "single", "confirmed"]), counts),
    script=st.none() | counts,
    alone=st.booleans(),
    elsewhere=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(anything)
def test_any_facts_give_exactly_one_verdict(facts: Facts) -> None:
    found = told(facts).to_json()
    assert found["verdict"] in ("ok", "watch", "overfit", "undertrained", "underpowered")
    assert found.keys() == CONTRACT
    assert found["axes"].keys() >= ALWAYS
    assert found["reason"]
    assert found["next"]
    json.dumps(found, allow_nan=False)
    if facts.elsewhere and (facts.leak is None or facts.leak.found != "confirmed"):
        assert found["verdict"] in ("watch", "underpowered")


@settings(max_examples=12, deadline=None)
@given(st.lists(anything, min_size=1, max_size=4))
def test_always_one_look_is_chosen(facts: list[Facts]) -> None:
    looks = [judge(one, BY) for one in facts]
    assert verdict.chosen(looks) in looks
    assert verdict.chosen(looks, running=True) in looks


def test_who_recites_is_told_by_the_format_in_which_an_example_echoes_most(tmp_path: Path) -> None:
    rows = [{**row, "map": "full", "run_max": 0, "excess_bits": 0.0} for row in examples(LEARNING)]
    heard = {"step": STEPS[-1], "epoch": 9.0, "split": "train", "id": "a", "map": "full", "run_start": 0}
    heard |= {"tokens": 60, "bytes": 200, "hits": 60, "nll": 0.1, "nll_tstar": 0.1, "masked_share": 0.0}
    whole = {"format": "chatml", "run_max": 60, "excess_bits": 90.0, "echo_whole": True, "long": True}
    weak = {"format": "alpaca", "run_max": 9, "excess_bits": 12.0, "echo_whole": False, "long": False}
    rows += [{**heard, **one, "windows": [1, 50]} for one in (whole, weak)]
    run = RunFolder(tmp_path)
    runs.write_json(run.run_json, {})
    runs.append_lines(run.metrics, metrics())
    runs.append_lines(run.examples, rows)
    keeper = Keeper(run, SETTING)
    keeper.judge()
    recited = keeper.document("epochs", None, lambda row: str(row["format"]))["run"]["recited"]
    assert [(one["id"], one["echo_whole"], one["words"]) for one in recited] == [("a", True, "chatml")]
