"""The `merged` export: a folder that transformers, vLLM and others load, and what was found when it was read again.

Weights are merge's work, figures reread's; this room puts them together and says what they mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from finetune import ear, jinjaform, merge, model, prompts, reread
from finetune.bundle import Bundle
from finetune.errand import Errand
from finetune.masks import encode
from finetune.merge import Count, Merge
from finetune.reread import Files, Gap, Scores

_SWALLOWED = 0.1  # share of the adapter's change that may be lost to rounding before it is warned of
_TEMPLATED = 20  # prompts whose tokens are compared with training's
Tell = Callable[[str], None]


def planned(errand: Errand, dtype: str | None) -> Merge:
    """What is merged into what. Errors: UserError."""
    where = errand.opened
    worn = errand.worn().model if errand.wish.onto == "dequantised" else None
    return merge.plan(where.base.folder, where.adapter, dtype, worn)


def to_merged(errand: Errand, plan: Merge, made: Bundle, tell: Tell) -> None:
    """Fill the folder."""
    base = errand.opened.base.folder
    template = jinjaform.chat_template(errand.format, errand.vocabulary)
    dtype = _main_dtype(plan)
    made.facts |= {**errand.facts(), "onto": errand.wish.onto, "dtype": dtype}
    merge.write(plan, made.folder, lambda name: tell(f"writing {name}"))
    merge.copy_rest(base, made.folder, template, ends(errand), merge.DTYPES[dtype])
    told_of_rounding(made, plan.count, dtype)
    _check_template(errand, made)
    if errand.wish.check:
        tell("reading the files again, layer by layer")
        _check_scores(errand, made)
    else:
        made.warnings.append("the files were not scored (check=no)")
    made.next += _next(errand)


def _main_dtype(plan: Merge) -> str:
    """Of the largest tensor."""
    largest = max(plan.tensors, key=lambda one: merge.numel(one))
    return next(name for name, kind in merge.DTYPES.items() if kind == plan.kind(largest))


def ends(errand: Errand) -> list[int]:
    """Tokens that end an answer: the format's mark where it is one token of the vocabulary, and the EOS."""
    known = errand.vocabulary
    mark = end_mark(errand)
    found = [known.marks[mark].id] if mark is not None else []
    return list(dict.fromkeys([*found, *([] if known.eos_id is None else [known.eos_id])]))


def end_mark(errand: Errand) -> str | None:
    """The mark that ends an answer, where it is one token."""
    stops = prompts.stops(errand.format, errand.vocabulary)
    return stops[0] if stops and stops[0] in errand.vocabulary.marks else None


def spelled_end(errand: Errand) -> str | None:
    """The mark that ends an answer, where it is several tokens and a program must be told of it."""
    fmt = errand.format
    if not fmt.end and fmt.name != prompts.NATIVE.name:
        return None  # the EOS ends it
    stops = prompts.stops(fmt, errand.vocabulary)
    return stops[0] if stops and stops[0] not in errand.vocabulary.marks else None


def told_of_rounding(made: Bundle, count: Count, dtype: str) -> None:
    """What became of the adapter's change to each weight."""
    if count.lost is None or count.still_share is None:
        return
    made.facts |= {"weights_meant": count.entries, "weights_unchanged": count.still, "change_lost": count.lost}
    told = f"{count.still:,} of {count.entries:,} weights stayed as they were"
    told += f"; {max(count.lost, 0):.1%} of the change is lost"
    if count.lost > _SWALLOWED:
        finer = "--dtype f32" if dtype in ("f32", "f16") else "--dtype f16 or f32"
        where = "keep the adapter beside its base (adapter/, or --to gguf and --to ollama)"
        made.warnings.append(f"rounding to {dtype} swallowed the adapter: {told}. Use {finer}, or {where}.")
    else:
        made.verified.append(f"rounding to {dtype}: {told}")


def _check_template(errand: Errand, made: Bundle) -> None:
    """The tokens that transformers makes of questions, against those of training."""
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(made.folder, trust_remote_code=False)
    asked = errand.questions(_TEMPLATED)
    same = 0
    for turns, _ in asked:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        rendered = prompts.render_prompt(turns, errand.format, errand.vocabulary)
        same += list(given) == list(encode(rendered, errand.vocabulary).ids)
    told = f"chat template: {same} of {len(asked)} questions get the tokens of training from transformers"
    (made.verified if same == len(asked) else made.warnings).append(told)


def _check_scores(errand: Errand, made: Bundle) -> None:
    worn, passages = errand.worn(), errand.passages()
    device = model.pick_device()
    files = Files(made.folder, device)
    unpacked = errand.opened.recipe.quantization != "none" and errand.wish.onto == "base"
    plain = Files(errand.opened.base.folder, device) if unpacked else None
    held = [one for one in passages if one.key[0] == "held_out"] or passages
    reader = reread.speaker(files, errand.vocabulary.tokenizer, [one.ids for one in passages])
    found = reread.gap(worn, files, held, plain)
    heard = ear.ear(errand.opened.plan)
    base = reread.base_readings(worn, passages)
    before, after = (reread.scores(heard, one, passages, base) for one in (worn.speaker, reader))
    if found is not None:
        _told_of_gap(made, found, f"{errand.opened.recipe.quantization} weights" if unpacked else "")
    _told_of_scores(made, before, after)


def _told_of_gap(made: Bundle, gap: Gap, trained_in: str) -> None:
    """`trained_in`: what the base was packed in, where the files hold another one."""
    made.facts["logits"] = vars(gap)
    made.verified.append(
        f"logits at {gap.tokens} answer tokens: the files are {gap.gap:.4f} (rms; largest {gap.largest:.3f}) from the"
        f" trained model, which is {gap.effect:.4f} from its base; the same first choice at {gap.same_top:.1%}"
    )
    made.verified.append(f"KL from the trained model, nats per token: files {gap.kl:.5f}, base {gap.kl_effect:.5f}")
    if gap.lost is not None and gap.lost > _SWALLOWED:
        told = f"{min(gap.lost, 1):.0%} of what the adapter does to the logits differs in the files"
        made.warnings.append(
            f"{told}: it was trained on {trained_in}. Closer: --onto dequantised" if trained_in else told
        )


def _told_of_scores(made: Bundle, before: Scores, after: Scores) -> None:
    if before.nll is not None and after.nll is not None:
        made.facts["held_out_nll"] = {"trained": before.nll, "files": after.nll}
        made.verified.append(f"held-out loss, nats per token: {before.nll:.4f} trained, {after.nll:.4f} in the files")
    own, theirs = before.of("train"), after.of("train")
    if own is not None and theirs is not None:
        made.facts["echo_whole"] = {"trained": list(own.whole), "files": list(theirs.whole)}
        made.facts["echo_words"] = {"trained": list(own.r8x), "files": list(theirs.r8x)}
        told = "; ".join(
            f"{words} {_share(one)} trained, {_share(other)} in the files"
            for words, one, other in (
                ("answers recited whole", own.whole, theirs.whole),
                ("eight words in a row", own.r8x, theirs.r8x),
            )
        )
        made.verified.append(f"reciting of trained examples: {told}")


def _share(pair: Sequence[int]) -> str:
    yes, of = pair
    return f"{yes} of {of}"


def _next(errand: Errand) -> list[tuple[str, str]]:
    found = [
        ("transformers", "AutoModelForCausalLM.from_pretrained(folder) and AutoTokenizer, apply_chat_template"),
        ("vLLM", "vllm serve folder"),
        ("text-generation-webui", "put the folder into user_data/models"),
        ("llama.cpp", "sft export RUN --to gguf"),
    ]
    if mark := spelled_end(errand):
        stop = (
            f'answers end in {mark}, several tokens here: give stop_strings=["{mark}"], tokenizer=tokenizer to generate'
        )
        found[0] = ("transformers", f"{found[0][1]}; {stop}")
        found[1] = ("vLLM", f'vllm serve folder, and "stop": ["{mark}"] with every request')
    return found
