"""Makes the bundled base `pocket` again: its text, its tokenizer, its training, its measured card.

`python -m finetune.pocket` does all of it on one CPU and writes a folder that plain transformers load. Every draw is a
pure function of the seed and the step, so an interrupted making goes on exactly. It teaches questions and short answers
in four kinds of prompt format and no other; it will not teach perspectives: that is what fine-tuning is for.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, MistralConfig
from transformers import MistralForCausalLM as Model
from transformers import PreTrainedTokenizerFast as Codec

from finetune.format import Format
from finetune.world import held_out_text, judge, questions, sentences, world

HOME = Path(__file__).parent / "pocket_base"
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
VOCABULARY = 3072
BLOCK_STEPS = 16  # steps whose documents are drawn together and cut into batches of like length
LONGEST_ANSWER = 48  # tokens
ALPACA_SYSTEM = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request."""
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ROLES = (
    ("USER", "ASSISTANT"), ("User", "Assistant"), ("Question", "Answer"), ("Q", "A"), ("Child", "Mother"),
    ("Guest", "Host"), ("Student", "Teacher"), ("Visitor", "Guide"), ("Asker", "Helper"), ("Friend", "Neighbour"),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How one base is made, on `threads` CPU threads."""

    out: Path = HOME
    steps: int = 9500
    seed: int = 0
    threads: int = 1
    matrix_rate: float = 4.0e-3  # Muon's, on the matrices of the layers
    other_rate: float = 3.0e-3  # AdamW's, on the embedding and the norms
    warmup: int = 200
    hot: int = 3000  # steps at the peak rate, in small batches: words and facts come fast
    cool: float = 0.3  # share of it after them, falling to zero: only there it learns to copy from a question
    documents: tuple[int, int] = (20, 40)  # in a batch, while hot and while cool
    asked: int = 300  # questions in each measured format
    save_every: int = 500  # steps


CHATML = Format(
    "chatml", "special-token", "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n",
    "<|im_start|>assistant\n", system_prefix="<|im_start|>system\n", system_suffix="<|im_end|>\n", end="<|im_end|>",
)  # fmt: skip
ALPACA = Format(
    "alpaca", "hash", "### Instruction:\n", "\n\n", "### Response:\n", "\n\n", "### Response:\n",
    system_suffix="\n\n", default_system=ALPACA_SYSTEM,
)  # fmt: skip


def colon(user: str, helper: str, gap: str, between: str, bold: bool = False) -> Format:
    """A format whose roles are words and colons: `gap` before the answer, `between` after it."""
    mark = "**" if bold else ""
    asks, says = f"{mark}{user}:{mark}", f"{mark}{helper}:{mark}"
    system = f"{mark}System:{mark} " if bold else ""
    return Format(
        "bold-role" if bold else "colon", "markdown" if bold else "colon", f"{asks} ", gap, f"{says} ", between, says,
        system_prefix=system, system_suffix="\n\n" if bold else between.removeprefix(EOS),
    )  # fmt: skip


COLON = colon("USER", "ASSISTANT", "\n", f"{EOS}\n")
MEASURED = (CHATML, ALPACA, COLON)


def draw_format(rng: Random) -> Format:
    """One of the four kinds of format this base ever sees, with a random variant of its words and line breaks."""
    kind = rng.choices(("chatml", "alpaca", "colon", "bold"), (28, 26, 34, 12))[0]
    if kind in ("chatml", "alpaca"):
        return CHATML if kind == "chatml" else ALPACA
    if kind == "bold":
        return colon(*rng.choice((("User", "Assistant"), *ROLES)), "\n\n", "\n\n", bold=True)
    user, helper = rng.choice(ROLES[:3] if rng.random() < 0.6 else ROLES)
    gap = rng.choice(("\n", "\n\n"))
    return colon(user, helper, gap, f"{EOS}\n" if user == "USER" and rng.random() < 0.6 else gap)


def draw_system(rng: Random, shape: Format) -> str:
    """A system text, or none: "" most of the time; Alpaca its own preamble, mostly."""
    if shape.default_system and rng.random() < 0.65:
        return shape.default_system
    if rng.random() < 0.75:
        return ""
    return VICUNA_SYSTEM if shape.name == "colon" and rng.random() < 0.4 else rng.choice(world().systems)


def render(turns: Sequence[str], shape: Format, system: str = "") -> str:
    """A prompt where the number of turns is odd, else a whole conversation with its end mark and no EOS."""
    text = f"{shape.system_prefix}{system}{shape.system_suffix}" if system else ""
    for i, turn in enumerate(turns):
        last = i == len(turns) - 1
        if i % 2 == 0:
            text += shape.user_prefix + turn + shape.user_suffix
            text += shape.generation_prompt if last else ""
        else:
            text += shape.assistant_prefix + turn + (shape.end if last else shape.assistant_suffix)
    return text


def draw_turns(rng: Random) -> list[str]:
    """Mostly one question and its answer, else a dialogue of the world or some questions in a row."""
    if rng.random() < 0.1:
        return world().draw_dialogue(rng)
    count = rng.choices((1, 2, 3, 5), (75, 13, 8, 4))[0]
    # What was told in the question is the hardest to answer: a quarter more of that than the world itself asks.
    asked = [world().draw_question(rng, told=rng.random() < 0.25) for _ in range(count)]
    return [text for one in asked for text in (one.question, one.answer)]


def draw_document(rng: Random) -> tuple[str, str]:
    """One training text without its BOS, and the prompt it opens with that is read but not learned ("" for none)."""
    if rng.random() < 0.18:
        return " ".join(world().draw_text(rng) for _ in range(rng.randint(1, 4))) + EOS, ""
    shape, turns = draw_format(rng), draw_turns(rng)
    system = draw_system(rng, shape)
    text = render(turns, shape, system) + ("" if shape.end and rng.random() < 0.25 else EOS)
    # Questions are mostly chance: learning to write them drowns what an answer has to teach.
    read_only = len(turns) == 2 and rng.random() < 0.8
    return text, render(turns[:1], shape, system) if read_only else ""


def make_tokenizer(texts: Iterable[str]) -> Codec:
    """Byte-level BPE over the texts: loses no byte, one BOS in front, no chat mark of its own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return Codec(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False,
        padding_side="left", model_max_length=4096, add_prefix_space=False,
    )  # fmt: skip


def make_model(tokenizer: Codec, seed: int) -> Model:
    """A fresh small Mistral in fp32; every width is a multiple of 64, as 4-bit loading on some CPUs asks."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, sliding_window=None, rope_theta=10000.0,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, attn_implementation="sdpa",
    )  # fmt: skip
    return Model(config)


def draw_block(tokenizer: Codec, settings: Settings, block: int) -> list[torch.Tensor]:
    """The batches of one block in random order: (2, B, T), ids and labels, right-padded, about equally many tokens."""
    rng = Random(f"{settings.seed}/{block}")
    count = BLOCK_STEPS * settings.documents[block * BLOCK_STEPS >= settings.hot]
    texts, prompts = zip(*(draw_document(rng) for _ in range(count)), strict=True)
    skipped = [len(ids) if prompt else 1 for prompt, ids in zip(prompts, tokenizer(prompts)["input_ids"], strict=True)]
    rows = sorted(zip(tokenizer(texts)["input_ids"], skipped, strict=True), key=lambda row: len(row[0]))
    ends = list(accumulate(len(ids) for ids, _ in rows))
    batches: list[list[tuple[list[int], int]]] = [[] for _ in range(BLOCK_STEPS)]
    for row, end in zip(rows, ends, strict=True):
        batches[min(BLOCK_STEPS - 1, end * BLOCK_STEPS // (ends[-1] + 1))].append(row)
    rng.shuffle(batches)
    return [_pad(batch, tokenizer.pad_token_id) for batch in batches]


def _pad(rows: list[tuple[list[int], int]], pad: int) -> torch.Tensor:
    longest = max(len(row) for row, _ in rows)
    ids = [row + [pad] * (longest - len(row)) for row, _ in rows]
    labels = [[-100] * skip + row[skip:] + [-100] * (longest - len(row)) for row, skip in rows]
    return torch.tensor([ids, labels])


def rate(step: int, settings: Settings) -> float:
    """Share of the peak rate: warm up and hold while hot, then fall in a straight line from `cool` to zero."""
    if step < settings.hot:
        return min(1.0, (step + 1) / settings.warmup)
    return settings.cool * (settings.steps - step) / (settings.steps - settings.hot)


def make_optimizers(model: Model, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (a third fewer tokens to the same loss in a short trial), AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    muon = torch.optim.Muon(matrices, settings.matrix_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, settings.other_rate, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0)
    for group in (*muon.param_groups, *adamw.param_groups):
        group["peak"] = group["lr"]
    return [muon, adamw]


def one_step(model: Model, optimizers: Sequence[torch.optim.Optimizer], batch: torch.Tensor, share: float) -> float:
    """Loss in nats per learned token of a (2, B, T) batch; padding stands right, out of a causal model's sight."""
    ids, labels = batch
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, D)
    learned = labels[:, 1:] != -100
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[learned]), labels[:, 1:][learned])
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return float(loss.detach())


@dataclass
class Progress:
    """How far a making has come: steps done, tokens seen, seconds of wall time."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def train(model: Model, tokenizer: Codec, settings: Settings, state: Path) -> Progress:
    """Trains in place up to `settings.steps`, going on from `state` where that file holds an unfinished making."""
    optimizers, progress = make_optimizers(model, settings), Progress()
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, kept in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        progress = Progress(**saved["progress"])
    model.train()
    last, batches = time.monotonic(), list[torch.Tensor]()
    while progress.step < settings.steps:
        if not batches or progress.step % BLOCK_STEPS == 0:
            batches = draw_block(tokenizer, settings, progress.step // BLOCK_STEPS)
        batch = batches[progress.step % BLOCK_STEPS]
        loss = one_step(model, optimizers, batch, rate(progress.step, settings))
        now = time.monotonic()
        progress.step += 1
        progress.tokens += int((batch[0] != tokenizer.pad_token_id).sum())
        progress.seconds, last = progress.seconds + now - last, now
        if progress.step % 50 == 0:
            print(f"{progress.step} loss {loss:.3f} tokens {progress.tokens} s {progress.seconds:.0f}", flush=True)
        if progress.step % settings.save_every == 0 or progress.step == settings.steps:
            _save_state(state, model, optimizers, progress)
    return progress


def _save_state(state: Path, model: Model, optimizers: Sequence[torch.optim.Optimizer], done: Progress) -> None:
    aside, kept = state.with_suffix(".part"), [optimizer.state_dict() for optimizer in optimizers]
    saved = {"model": model.state_dict(), "optimizers": kept, "progress": asdict(done)}
    torch.save(saved, aside)
    os.replace(aside, state)


def complete(model: Model, tokenizer: Codec, prompts: Sequence[str], tokens: int, heat: float = 0.0) -> list[str]:
    """What the model writes after each prompt up to its EOS (kept in the text when it came); greedy where heat is 0."""
    written: list[str] = []
    for start in range(0, len(prompts), 50):
        batch = tokenizer(list(prompts[start : start + 50]), return_tensors="pt", padding=True)
        how = {"do_sample": True, "temperature": heat, "top_k": 0} if heat else {"do_sample": False}
        with torch.no_grad():
            ids = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=tokens, **how
            )
        new = ids[:, batch["input_ids"].shape[1] :]
        written += [tokenizer.decode(row).replace(PAD, "") for row in new]
    return written


def answer_of(written: str, shape: Format) -> str | None:
    """The answer a text opens with, or None where the model did not stop in the way its format asks."""
    end = shape.end or EOS
    return written.split(end)[0].strip() if end in written else None


def right_answers(
    model: Model, tokenizer: Codec, shape: Format, count: int, seed: int
) -> list[tuple[str, str | None, bool]]:
    """Unseen questions in one format: question, greedy answer (None where it did not stop), whether it was right."""
    asked = questions(seed, count, "unseen")
    prompts = [render([one.question], shape, shape.default_system) for one in asked]
    answers = [answer_of(text, shape) for text in complete(model, tokenizer, prompts, LONGEST_ANSWER)]
    return [
        (one.question, answer, answer is not None and judge(one.question, answer))
        for one, answer in zip(asked, answers, strict=True)
    ]


def bits_per_byte(model: Model, tokenizer: Codec, texts: Sequence[str]) -> float:
    """Mean over all bytes of the texts, each read alone after a BOS."""
    nats, size = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])  # (1, T)
            nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            size += len(text.encode())
    return nats / size / math.log(2)


def free_sentences(model: Model, tokenizer: Codec, count: int, seed: int) -> list[str]:
    """Sentences the model goes on with, at temperature 0.7, after the first sentence of a held-out paragraph."""
    torch.manual_seed(seed)
    openings = [sentences(text)[0] for text in held_out_text(seed, count)]
    written = complete(model, tokenizer, openings, 64, heat=0.7)
    whole = [text.split(EOS)[0] for text in written if EOS in text]
    return [sentence for text in whole for sentence in sentences(text)]


def measure(model: Model, tokenizer: Codec, settings: Settings) -> dict[str, Any]:
    """The figures of the card, counted on text that was never trained on."""
    model.eval()
    said: list[str] = []
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "right": {}, "accepted": {}}
    for shape in MEASURED:
        judged = right_answers(model, tokenizer, shape, settings.asked, seed=1)
        figures["right"][shape.name] = {"right": sum(ok for _, _, ok in judged), "n": len(judged)}
        said += [sentence for _, answer, _ in judged if answer for sentence in sentences(answer)]
        for question, answer, ok in judged:
            if not ok:
                print(f"wrong in {shape.name}: {question} -> {answer}")
    free = free_sentences(model, tokenizer, 150, seed=2)
    for name, texts in (("answer_sentences", said), ("free_sentences", free)):
        figures["accepted"][name] = {"accepted": sum(map(world().accepts, texts)), "n": len(texts)}
    figures["bits_per_byte"] = round(bits_per_byte(model, tokenizer, held_out_text(3, 200)), 4)
    return figures


def write_card(out: Path, figures: dict[str, Any], settings: Settings, progress: Progress) -> None:
    """README.md from the template beside this base's words, and the same figures as `figures.json`."""
    right = "\n".join(
        f"| right answers, {name}, questions never trained on | {score['right']} of {score['n']} |"
        for name, score in figures["right"].items()
    )
    accepted = {name: f"{count['accepted']} of {count['n']}" for name, count in figures["accepted"].items()}
    filled = {
        **asdict(settings), **accepted, "right": right, "kinds": len(world().kinds), "bits": figures["bits_per_byte"],
        "parameters": f"{figures['parameters']:,}", "tokens": f"{progress.tokens:,}",
        "minutes": f"{progress.seconds / 60:.0f}",
    }  # fmt: skip
    template = (HOME / "card.txt").read_text(encoding="utf-8")
    (out / "README.md").write_text(template.format(**filled), encoding="utf-8")
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def make(settings: Settings) -> dict[str, Any]:
    """The whole making. The unfinished state lies in `settings.out/state.pt` and goes when the base is written."""
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    state = settings.out / "state.pt"
    if not state.exists():
        rng = Random(settings.seed)
        make_tokenizer(draw_document(rng)[0] for _ in range(30_000)).save_pretrained(settings.out)
    tokenizer = AutoTokenizer.from_pretrained(settings.out)
    model = make_model(tokenizer, settings.seed)
    progress = train(model, tokenizer, settings, state)
    model.to(torch.bfloat16).save_pretrained(settings.out)
    # What is measured is what was written: the weights as rounded for the file.
    model = Model.from_pretrained(settings.out, dtype=torch.float32)
    figures = measure(model, tokenizer, settings)
    write_card(settings.out, figures, settings, progress)
    state.unlink()
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune.pocket", description="Make the bundled base again.")
    parser.add_argument("--out", type=Path, default=HOME, help="folder to write (default: the bundled one)")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="seed of text, weights and order")
    parser.add_argument("--threads", type=int, default=Settings.threads, help="CPU threads")
    given = vars(parser.parse_args(arguments))
    print(json.dumps(make(Settings(**given)), indent=1))


if __name__ == "__main__":
    main()
