"""The base's own answers to everyday questions, written once before training and mixed in, so that its voice is kept.

Drawn, not greedy: what is to be kept is a distribution. Answers that ran into the limit are left out, for a cut answer
would teach to stop in the middle; nothing else is chosen, and nobody judges whether an answer is good.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune import prompts, runs, suite
from finetune.batches import Epochs, Item
from finetune.conversation import Conversation, Origin, Turn
from finetune.errors import refuse
from finetune.estimate import steps_per_epoch
from finetune.masks import encode
from finetune.odds import Sampler
from finetune.plan import Plan
from finetune.speak import Speaker

NAME = "self_replay.jsonl"  # in a run folder
_DRAWN = Sampler(temperature=0.7)
_QUESTIONS = 64


def replies(speaker: Speaker, plan: Plan, count: int = _QUESTIONS) -> list[dict[str, Any]]:
    """Rows of id, format, prompt, answer: each question in one trained format, in turn. Pure, given the seed."""
    asked = suite.everyday(plan.recipe.base, suite.read(), count, plan.recipe.seed)
    names, found = list(plan.recipe.formats.train), []
    for turn, name in enumerate(names):
        format_, some = plan.formats[name], asked[turn :: len(names)]
        texts = [prompts.render_prompt((Turn("user", text),), format_, plan.vocabulary) for text in some]
        ids = [encode(text, plan.vocabulary).ids for text in texts]
        stops = prompts.stops(format_, plan.vocabulary)
        said = speaker.complete(ids, stops, plan.answer_limit(), True, _DRAWN, plan.recipe.seed)
        pairs = enumerate(zip(some, said, strict=True))
        kept = [(n, text, one.text.strip()) for n, (text, one) in pairs if one.ended and one.text.strip()]
        found += [{"id": f"{name}:{n}", "format": name, "prompt": text, "answer": own} for n, text, own in kept]
    return found


def items(rows: Sequence[Mapping[str, Any]], plan: Plan) -> list[Item]:
    """Token ids, the answer in the loss; no longer than what is taught may be."""
    made = []
    for row in rows:
        one = Conversation(row["id"], (Turn("user", row["prompt"]), Turn("assistant", row["answer"])), Origin(NAME))
        tokens = encode(prompts.render(one, plan.formats[row["format"]], plan.vocabulary), plan.vocabulary)
        made.append(Item(f"self:{row['id']}", "", tokens.ids, tokens.trained))
    return [one for one in made if len(one.ids) <= plan.recipe.data.max_tokens]


def write(path: Path, speaker: Speaker, plan: Plan) -> int:
    """All of a run's, whole or not at all; how many. UserError where the base ends none of its answers."""
    rows = replies(speaker, plan)
    if not rows:
        what = "regularise.self_replay: the base never ends an answer in these formats, so none can be replayed."
        raise refuse(what, "Leave it out, or use data.replay with text of your own.")
    runs.write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def mixed(plan: Plan, path: Path) -> Plan:
    """The same plan with the answers in a file mixed in, to about `regularise.self_replay` of the supervised tokens."""
    recipe, wardrobe = plan.recipe, plan.texts.wardrobe
    texts = replace(plan.texts, replay=tuple(items(runs.read_lines(path), plan)))
    epochs = Epochs(
        wardrobe.item,
        plan.split.train,
        wardrobe.worn,
        recipe.seed,
        recipe.shuffle,
        recipe.batch_size,
        texts.replay,
        recipe.regularise.self_replay,
    )
    per_epoch = steps_per_epoch(epochs.size, recipe.batch_size)
    length = replace(plan.length, per_epoch=per_epoch, total=per_epoch * recipe.epochs)
    return replace(plan, texts=texts, epochs=epochs, length=length)
