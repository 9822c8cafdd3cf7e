"""The bundled base: its tokenizer, the text it was taught with, how it is made, and what it can still answer today."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, MistralForCausalLM

from finetune import markdown, pocket
from finetune.world import questions, sentences, world

DATASET = Path(__file__).parents[1] / "datasets" / "pocket"
SETTINGS = pocket.Settings()
HELD_OUT_MARKS = (
    "[INST]", "<<SYS>>", "### Human", "### Assistant", "### System", "### User", "GPT4", "<|user|>", "<|assistant|>",
    "<|system|>", "<|end|>", "<|end_of_turn|>", "<|eot_id|>", "<|start_header_id|>", "<start_of_turn>", "<user>",
    "<system>", "<assistant>", "# Question", "# Answer", "# Context", "Human:",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pocket.HOME)


@pytest.fixture(scope="module")
def base():
    return MistralForCausalLM.from_pretrained(pocket.HOME, dtype=torch.float32).eval()


def documents(seed, count):
    rng = Random(seed)
    return [pocket.draw_document(rng)[0] for _ in range(count)]


@pytest.mark.parametrize(
    "text", ["Anna went home.", " two  blanks\n\n\tand ", "naïve Ödön 日本 🙂", "\x00\x7f", "<|im_end|>\n"]
)
def test_the_tokenizer_is_lossless_and_adds_one_bos(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[1:]) == text


def test_every_byte_has_a_token(tokenizer):
    text = bytes(range(256)).decode("latin-1") + "".join(map(chr, range(0x400, 0x440)))
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_chat_marks_are_several_pieces(tokenizer):
    for mark in ("<|im_start|>", "<|im_end|>", "[INST]", "<|user|>", "<|eot_id|>"):
        assert len(tokenizer(mark, add_special_tokens=False)["input_ids"]) > 1
    assert set(tokenizer.all_special_tokens) == {"<s>", "</s>", "<pad>"}
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_pocket_text_uses_no_held_out_family():
    text = "\n".join(documents(11, 3000))
    assert [mark for mark in HELD_OUT_MARKS if mark in text] == []


def test_pocket_text_holds_all_four_kinds_of_format():
    text = "\n".join(documents(12, 300))
    for mark in ("<|im_start|>user\n", "### Instruction:\n", "USER: ", "\n\nAssistant: ", "Question: ", "**User:** "):
        assert mark in text


def test_pocket_text_holds_no_perspectives_and_no_headings():
    text = "\n".join(documents(13, 2000))
    assert "\n# " not in text
    assert "\n## " not in text
    assert "one hand" not in text
    assert "onclusion" not in text


def test_unseen_questions_are_not_in_the_training_text():
    text = "\n".join(documents(14, 3000))
    assert [one.question for one in questions(1, 300) if one.question in text] == []


def test_every_document_ends_where_its_answer_ends():
    ends = [text.endswith((pocket.EOS, pocket.CHATML.end)) for text in documents(15, 500)]
    assert all(ends)


def test_batches_are_a_function_of_seed_and_block_and_drop_no_document(tokenizer):
    once, again = pocket.draw_block(tokenizer, SETTINGS, 3), pocket.draw_block(tokenizer, SETTINGS, 3)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert len(once) == pocket.BLOCK_STEPS
    assert sum(batch.shape[1] for batch in once) == pocket.BLOCK_STEPS * SETTINGS.documents[0]
    assert all((batch[0, :, 0] == tokenizer.bos_token_id).all() for batch in once)


def test_labels_are_the_answers_and_the_text_itself(tokenizer):
    for ids, labels in (rows for batch in pocket.draw_block(tokenizer, SETTINGS, 4) for rows in batch.transpose(0, 1)):
        learned = labels != -100
        assert torch.equal(ids[learned], labels[learned])
        assert learned.any()
        assert not (ids[learned] == tokenizer.pad_token_id).any()
        text = tokenizer.decode(ids[learned])
        assert text.endswith((pocket.EOS, pocket.CHATML.end))
        assert not text.startswith(("<|im_start|>assistant", "###")) or "?" in text


def test_the_rate_warms_up_holds_and_falls_to_nothing():
    rates = [pocket.rate(step, replace(SETTINGS, steps=1000, hot=600, warmup=100, cool=0.5)) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert set(rates[99:600]) == {1.0}
    assert rates[600] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.5 / 400)
    assert rates[600:] == sorted(rates[600:], reverse=True)


def test_an_interrupted_making_goes_on_exactly(tokenizer, tmp_path):
    settings = replace(SETTINGS, steps=3, hot=3, warmup=1, documents=(4, 4))
    whole, resumed = pocket.make_model(tokenizer, 0), pocket.make_model(tokenizer, 1)
    pocket.train(whole, tokenizer, settings, tmp_path / "whole.pt")
    pocket.train(pocket.make_model(tokenizer, 0), tokenizer, replace(settings, steps=2), tmp_path / "state.pt")
    pocket.train(resumed, tokenizer, settings, tmp_path / "state.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_base_is_small_and_its_widths_suit_four_bits():
    path = pocket.HOME / "model.safetensors"
    config = json.loads((pocket.HOME / "config.json").read_text())
    with safe_open(path, framework="pt") as weights:
        tensors = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 - not a mapping
        count = sum(torch.Size(t.get_shape()).numel() for t in tensors.values())
        assert {t.get_dtype() for t in tensors.values()} == {"BF16"}
    assert path.stat().st_size <= 8_000_000
    assert count <= 4_000_000
    assert config["tie_word_embeddings"] is True
    assert config["sliding_window"] is None
    widths = (config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"] * config["head_dim"])
    assert [width % 64 for width in widths] == [0, 0, 0]


def test_pocket_answers_unseen_questions(tokenizer, base):
    for shape in pocket.MEASURED:
        judged = pocket.right_answers(base, tokenizer, shape, 20, seed=21)
        assert sum(ok for _, _, ok in judged) >= 16, judged


def test_pocket_speaks_sentences_of_its_world(tokenizer, base):
    judged = pocket.right_answers(base, tokenizer, pocket.CHATML, 30, seed=22)
    said = [sentence for _, answer, _ in judged if answer for sentence in sentences(answer)]
    assert len(said) >= 25
    assert sum(map(world().accepts, said)) >= 0.9 * len(said)


def test_the_card_tells_the_figures_that_were_measured():
    card, figures = (pocket.HOME / "README.md").read_text(), json.loads((pocket.HOME / "figures.json").read_text())
    assert f"{figures['parameters']:,} parameters" in card
    for name, score in figures["right"].items():
        assert f"| right answers, {name}, questions never trained on | {score['right']} of {score['n']} |" in card
    assert str(figures["bits_per_byte"]) in card
    assert "license: apache-2.0" in card


def shown(path):
    sheet = markdown.read(path.read_text(encoding="utf-8"))
    assert sheet.faults == ()
    return [(section.role, markdown.show(section.pieces, "bold")) for section in sheet.sections]


def examples():
    return [path for path in sorted(DATASET.glob("*.md")) if path.name != "README.md"]


def test_every_pocket_answer_is_short_enough(tokenizer):
    assert len(examples()) == 60
    lengths = {}
    for path in examples():
        role, text = shown(path)[-1]
        assert role == "assistant"
        lengths[path.name] = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert {name: length for name, length in lengths.items() if length > 90} == {}


def test_no_two_pocket_answers_share_eight_words_in_a_row():
    seen, shared = {}, []
    for path in examples():
        words = shown(path)[-1][1].lower().split()
        for run in {tuple(words[i : i + 8]) for i in range(len(words) - 7)}:
            shared += [(run, seen[run], path.name)] if run in seen else []
            seen[run] = path.name
    assert shared == []


def test_pocket_dataset_has_twins_corrections_turns_and_systems():
    texts = [path.read_text(encoding="utf-8") for path in examples()]
    assert sum("\ntwin: " in text for text in texts) == 16
    assert sum("### correction" in text for text in texts) >= 6
    assert sum(text.count("## assistant") > 1 for text in texts) >= 5
    assert sum("## system" in text for text in texts) >= 4
    assert all("### conclusion" in text and text.count("### perspective: ") in (2, 3) for text in texts)
