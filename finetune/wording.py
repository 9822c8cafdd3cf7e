"""A verdict in words: a paragraph with the numbers it rests on, and what to do next. Decides nothing.

Losses are nats per token at the best single temperature. What was not measured is said not to be.
"""

from __future__ import annotations

from collections.abc import Iterator

from finetune import forgotten
from finetune.evidence import Count, Echo, Facts
from finetune.rules import Rules
from finetune.signs import Axis, Signs

_NAMES = {
    "harmed": "held-out loss",
    "harmed_accuracy": "the share of held-out tokens missed",
    "harmed_format": "held-out loss in a format that was never trained",
    **{f"drift_{axis}": told for axis, (told, _) in forgotten.NAMES.items()},
}


def headline(verdict: str, facts: Facts, signs: Signs) -> str:
    """The verdict in half a sentence."""
    if verdict == "overfit":
        return "it gives training text away" if signs.leak == "confirmed" else "it recites, and got worse elsewhere"
    if verdict == "watch":
        return _watched(signs)
    if verdict == "underpowered":
        told = {True: "it learned; ", False: "no gain seen; ", None: ""}[signs.learned]
        return f"{told}too few examples to say more"
    if verdict == "undertrained":
        return "no gain on held-out examples yet"
    return "it learned, and recites nothing"


def _watched(signs: Signs) -> str:
    if signs.leak == "single":
        return "it gave training text away once"
    if not signs.some:
        return "something got worse"
    if signs.harms:
        return "it begins to recite, and something got worse"
    return "memorised, still generalising" if signs.learned else "memorised, nothing gained elsewhere"


def choice(verdict: str, facts: Facts, looks: int) -> str:
    """Why a look's adapter was chosen of so many."""
    if facts.nll_tstar is None:
        return f"{verdict}; the last look: nothing was held out"
    if verdict == "undertrained":
        return f"{verdict}; the last look: none was surely better than the base on held-out examples"
    return f"{verdict}, with the lowest held-out loss of such; {looks} looked at"


def reason(facts: Facts, signs: Signs, rules: Rules) -> str:
    """Why: learned, recites, harmed, leaks, and whether there was enough to tell."""
    parts = (_learned(facts, signs), *_recites(facts, signs), _harmed(facts, signs, rules), *_said(facts))
    return " ".join((*parts, *_too_little(facts, rules)))


def _learned(facts: Facts, signs: Signs) -> str:
    gain, accuracy = signs.axes["learned"], signs.axes["learned_accuracy"]
    if facts.elsewhere:
        return "The adapter comes without a record of what it was trained on: whether it learned is not measured."
    if signs.learned is None:
        return "Whether it learned is not measured: it takes two or more held-out examples, scored with and without it."
    told = [f"in loss {_bounds(gain)} nats per token"] if gain.resolved else []
    told += [f"in accuracy {_bounds(accuracy)}"] if accuracy.resolved else []
    learned = "it learned" if signs.learned else "that is no gain that could be told from luck"
    return f"Gain over the base on {max(gain.n, accuracy.n)} held-out examples: {'; '.join(told)}; {learned}."


def _bounds(axis: Axis) -> str:
    about = ", approximate" if axis.approximate else ""
    return f"{axis.value:+.3f} (between {axis.low:+.3f} and {axis.high:+.3f}{about})"


def _recites(facts: Facts, signs: Signs) -> Iterator[str]:
    echo = facts.echo
    if echo is None:
        yield "Whether it recites was not measured."
        return
    when = f" (at epoch {echo.epoch:g})" if echo.epoch != facts.epoch else ""
    long = f" and {_of(echo.long)} for 50 tokens or more" if echo.long.of else ""
    held_out = f", of held-out ones {_of(echo.held_out_whole)}" if echo.held_out_whole.of else ""
    if echo.whole.of:
        yield f"It echoes {_of(echo.whole)} trained answers whole{long}{held_out}{when}."
    if echo.windows and max(echo.windows) > 0:
        shares = f"{echo.windows[0]:.1%} where trained, {echo.windows[1]:.1%} where held out"
        yield f"Of all 8-word windows it echoes {shares}."
    if echo.whole.yes:
        yield _against(echo, signs)


def _against(echo: Echo, signs: Signs) -> str:
    if echo.p is None:
        return "There is nothing held out to compare that with."
    if signs.heavy:
        return f"Trained answers are repeated further than held-out ones ({_p(echo.p)}): that is heavy."
    return f"Longest runs on trained against held-out answers: {_p(echo.p)}."


def _p(value: float) -> str:
    return f"p {value:.3f}" if value >= 0.0005 else "p below 0.001"  # never a chance of nought


def _harmed(facts: Facts, signs: Signs, rules: Rules) -> str:
    worse = [_worse(name, facts, signs.axes[name]) for name in signs.harms if name != "script"]
    if worse:
        text = "; ".join(worse)
        return f"{text[0].upper()}{text[1:]}."
    if facts.elsewhere:
        return "Whether anything got worse in training is not measured."
    if not signs.axes["harmed"].resolved:
        looks = facts.courses["nll"].looks if "nll" in facts.courses else 0
        return (
            f"Whether anything got worse is not resolvable: {looks} looks with held-out loss, {rules.looks} are needed."
        )
    names = {"harmed_format": "formats that were never trained", "drift_": "neutral text"}
    missing = [
        told for name, told in names.items() if not any(k.startswith(name) for k, a in signs.axes.items() if a.n)
    ]
    left_out = f" ({' and '.join(missing)} not measured)" if missing else ""
    return f"Nothing that was measured is surely worse than at its best{left_out}."


def _worse(name: str, facts: Facts, axis: Axis) -> str:
    course = facts.courses.get({"harmed": "nll"}.get(name, name.removeprefix("harmed_")))
    which = f" ({course.name})" if course and course.name else ""
    what = _NAMES.get(name, name)
    since = "the base's" if facts.alone else "at its best"
    when = f", as of epoch {axis.epoch:g}" if axis.epoch is not None else ""
    return f"{what}{which} is {axis.value:.3f} higher than {since} (at least {axis.low:.3f}{when})"


def _said(facts: Facts) -> Iterator[str]:
    """What generations showed."""
    if facts.script and facts.script.yes:
        yield f"{_of(facts.script)} answers are in a script that neither the data nor the prompt nor the base shows."
    if facts.leak is None:
        yield "Leaks were not looked for."
    elif facts.leak.found == "none":
        yield f"None of {facts.leak.prompts.of} unrelated prompts brought out training text."
    else:
        again = "and again when asked twice" if facts.leak.found == "confirmed" else "once, and not again"
        yield f"{_of(facts.leak.prompts)} unrelated prompts brought out training text, {again}."


def _too_little(facts: Facts, rules: Rules) -> Iterator[str]:
    eligible = facts.echo.whole.of if facts.echo else 0
    if facts.held_out < rules.enough and not facts.elsewhere:
        yield f"Only {facts.held_out} held-out examples were measured; a good verdict takes {rules.enough}."
    if facts.echo and eligible < rules.enough:
        yield f"Only {eligible} trained answers are long enough to be asked for by heart; {rules.enough} are needed."


def _of(count: Count) -> str:
    return f"{count.yes} of {count.of}"


# what to do


def following(verdict: str, facts: Facts, signs: Signs, rules: Rules) -> str:
    """The next step, in words and commands; RUN stands for the run's folder."""
    steps = {"overfit": _overfit, "watch": _watch, "undertrained": _undertrained}
    if verdict in steps:
        return " ".join(steps[verdict](facts, signs))
    if verdict == "underpowered":
        return " ".join(_underpowered(facts, signs, rules))
    return " ".join(_ok(facts))


def _ok(facts: Facts) -> Iterator[str]:
    yield "Talk to it: `sft chat RUN`. It may be used."
    if facts.leak is None:
        yield "Before it is published, look for leaks: `sft eval RUN --only leak`."


def _overfit(facts: Facts, signs: Signs) -> Iterator[str]:
    yield "Do not publish this adapter."
    if signs.leak == "confirmed":
        yield "The report shows what leaked and where it was trained; take private text out of the data."
    yield "Train again with a lower optimizer.learning_rate (a third) or fewer epochs, or write more examples."
    yield "regularise.goldfish keeps whole answers from being learnt by heart."


def _watch(facts: Facts, signs: Signs) -> Iterator[str]:
    if signs.leak == "single":
        yield "Look for leaks again, with other seeds: `sft eval RUN --only leak`."
    if signs.some:
        yield "Read the echoed answers in the report: spans that may be recited belong in data.intended."
        yield "Against the rest, write more examples or stop earlier; do not train on."
    if "script" in signs.harms:
        yield "Answers in another script are a sign of too high a learning rate: lower it, or take an earlier epoch."
    if [one for one in signs.harms if one != "script"]:
        yield "Stop here, or train again with a lower optimizer.learning_rate: what got worse does not come back."
    if signs.learned is False:
        yield "Nothing was gained on held-out examples: it takes more of them, or clearer ones."


def _undertrained(facts: Facts, signs: Signs) -> Iterator[str]:
    high = signs.axes["learned"].high
    if high is not None and high < 0:
        yield "Held-out loss is above the base's: train again with a tenth of the learning rate."
        return
    yield f"Train on: `sft train RUN --more {max(1, round(facts.epoch))}`, if the learning rate is constant;"
    yield "else raise epochs, or optimizer.learning_rate threefold. If that changes nothing, write more examples."


def _underpowered(facts: Facts, signs: Signs, rules: Rules) -> Iterator[str]:
    if facts.elsewhere:
        yield "Echo and leaks can be measured against your own texts; for more, train it with `sft train`."
        return
    if facts.held_out < rules.enough:
        yield f"Hold out {rules.enough} or more examples (data.held_out), and write more of them."
    if facts.echo is None:
        yield "Measure echo: `sft eval RUN --only echo`."
    elif facts.echo.whole.of < rules.enough:
        yield f"Write longer answers, or more: {rules.enough} trained ones must be long enough to be recited."
    if signs.learned:
        yield "What there is looks good: read its answers yourself, `sft chat RUN`."
    elif signs.learned is False:
        yield f"It may also need more training: `sft train RUN --more {max(1, round(facts.epoch))}`."
    else:
        yield "Held-out loss was not measured with and without the adapter; a look of a new run does both."
