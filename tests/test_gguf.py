"""llama.cpp itself, on the CPU: our files load, texts are cut into training's tokens, greedy answers are equal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf import GGUFWriter
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from finetune import gguffile, llamacpp, merge, model, wordlist
from finetune.errors import UserError
from finetune.gguffile import Weight
from finetune.masks import Vocabulary

TEXTS = ["A wet coat.", " two  spaces\n\nand\ta tab ", "Ünïcode — 漢字 🙂", "don't <s> x</s>y [INST]"]


def write(base: Path, path: Path, dtype: str = "f32") -> None:
    """A base as it lies there."""
    shape = gguffile.shape(AutoConfig.from_pretrained(base))
    writer = GGUFWriter(None, gguf.MODEL_ARCH_NAMES[shape.arch])
    gguffile.model_head(writer, shape, "tiny", dtype)
    wordlist.write(writer, wordlist.read(base, shape.config.vocab_size), Vocabulary.load(base), None, None)
    stored = [one for one in merge.stored(base) if one.name != "lm_head.weight" or not shape.config.tie_word_embeddings]
    tensors = [Weight(one.name, one.shape, lambda one=one: one.read().float().numpy()) for one in stored]  # type: ignore[misc]
    gguffile.write_model(path, writer, shape, tensors, dtype)


def greedy(net: Any, ids: list[int], tokens: int, vocabulary: Vocabulary) -> str:
    """Hugging Face's own."""
    with torch.no_grad():
        found = net.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0][len(ids) :].tolist()
    return str(vocabulary.tokenizer.decode(found, skip_special_tokens=True))


PROMPTS = [[256, 104, 105], [256, 1, 2, 3, 4, 5], [256, *range(40, 100)]]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "llama3-rope", "linear-rope"])
def test_greedy_text_equals_hugging_face(kind: str, tmp_path: Path) -> None:
    base = merging(tiny.base(tmp_path / "base", kind if kind in tiny.KINDS else "llama"))
    if kind not in tiny.KINDS:
        scaled(base, kind)
    write(base, tmp_path / "m.gguf")
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    vocabulary = Vocabulary.load(base)
    heard = llamacpp.hear(tmp_path / "m.gguf", PROMPTS, 24, texts=TEXTS[:3])
    assert list(heard.answers) == [greedy(net, ids, 24, vocabulary) for ids in PROMPTS]
    for text, ids in zip(TEXTS, heard.ids, strict=False):
        assert list(ids) == [256, *vocabulary.tokenizer.encode(text, add_special_tokens=False).ids]


def merging(base: Path) -> Path:
    """The letter of byte 0 gives way to a merge: llama.cpp loads no vocabulary without one."""
    path = base / "tokenizer.json"
    found = json.loads(path.read_text())
    vocab = found["model"]["vocab"]
    vocab["at"] = vocab.pop("Ā")
    found["model"]["merges"] = [["a", "t"]]
    path.write_text(json.dumps(found))
    return base


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="merges nothing"):
        wordlist.read(tiny.base(tmp_path), 258)


def scaled(base: Path, kind: str) -> None:
    """Positions stretched, so that a wrong factor would be heard."""
    ropes = {
        "llama3-rope": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "linear-rope": {"rope_type": "linear"},
    }
    config = json.loads((base / "config.json").read_text())
    rope = {**ropes[kind], "factor": 8.0, "rope_theta": 500.0, "original_max_position_embeddings": 64}
    (base / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))


def test_llama_3_positions_are_those_of_transformers() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = tiny.LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    factors = gguffile.rope_factors(gguffile.shape(config))
    assert factors is not None
    np.testing.assert_allclose(factors, (plain / stretched).numpy(), rtol=1e-5)


# --- adapters


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled base for llama.cpp."""
    path = tmp_path_factory.mktemp("gguf") / "pocket.gguf"
    write(model.POCKET, path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that changes what pocket says."""
    folder = tmp_path_factory.mktemp("adapter")
    model.save_adapter(tiny.stirred(tiny.adapted(model.POCKET), 0.2), folder, "pocket")
    return folder


def about(adapter: Path, **changes: Any) -> dict[str, Any]:
    return {**json.loads((adapter / model.ADAPTER_CONFIG).read_text()), **changes}


def lora(adapter: Path, path: Path, **changes: Any) -> Path:
    shape = gguffile.shape(AutoConfig.from_pretrained(model.POCKET))
    gguffile.write_adapter(path, shape, load_file(adapter / model.ADAPTER_WEIGHTS), about(adapter, **changes), "x")
    return path


@pytest.mark.parametrize("rslora", [False, True])
def test_base_and_adapter_answer_as_peft_does(pocket: Path, adapter: Path, tmp_path: Path, rslora: bool) -> None:
    from peft import PeftModel

    own = tmp_path / "own"
    own.mkdir()
    (own / model.ADAPTER_WEIGHTS).write_bytes((adapter / model.ADAPTER_WEIGHTS).read_bytes())
    (own / model.ADAPTER_CONFIG).write_text(json.dumps(about(adapter, use_rslora=rslora)))
    bare = AutoModelForCausalLM.from_pretrained(model.POCKET, dtype=torch.float32)
    vocabulary = Vocabulary.load(model.POCKET)
    prompts = [[1, *vocabulary.tokenizer.encode(text, add_special_tokens=False).ids] for text in ("What is", "When it")]
    before = [greedy(bare, ids, 24, vocabulary) for ids in prompts]
    net = PeftModel.from_pretrained(bare, str(own)).eval()
    wanted = [greedy(net, ids, 24, vocabulary) for ids in prompts]
    assert wanted != before
    heard = llamacpp.hear(pocket, prompts, 24, lora(adapter, tmp_path / "l.gguf", use_rslora=rslora), texts=TEXTS)
    assert list(heard.answers) == wanted
    assert list(llamacpp.hear(pocket, prompts, 24).answers) == before
    for text, ids in zip(TEXTS[:3], heard.ids, strict=False):
        assert list(ids) == [1, *vocabulary.tokenizer.encode(text, add_special_tokens=False).ids]


def test_rslora_is_folded_into_alpha(adapter: Path, tmp_path: Path) -> None:
    read = gguf.GGUFReader(lora(adapter, tmp_path / "l.gguf", use_rslora=True))
    assert math.isclose(float(read.fields["adapter.lora.alpha"].contents()), 4 * math.sqrt(4))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "rows of the embedding"),
        ({"lora_bias": True}, "a bias"),
        ({"bias": "all"}, "biases of the base"),
        ({"alpha_pattern": {"q_proj": 2}}, "from matrix to matrix"),
        ({"r": 8}, "its config says 8"),
    ],
)
def test_what_llama_cpp_has_no_words_for_is_refused(adapter: Path, tmp_path: Path, changes: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        lora(adapter, tmp_path / "l.gguf", **changes)
    assert not (tmp_path / "l.gguf").exists()


def test_a_file_llama_cpp_cannot_read_ends_no_process_of_ours(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(llamacpp.Unreadable, match=r"x\.gguf"):
        llamacpp.hear(tmp_path / "x.gguf", [[1]], 1)


def test_an_unknown_architecture_is_refused() -> None:
    from transformers import GPT2Config

    with pytest.raises(UserError, match="gpt2 is not written"):
        gguffile.shape(GPT2Config())


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_what_is_read_back_is_what_was_written_rounded(dtype: str, tmp_path: Path) -> None:
    write(model.POCKET, tmp_path / "m.gguf", dtype)
    read = {one.name: one for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    shape = gguffile.shape(AutoConfig.from_pretrained(model.POCKET))
    assert len(read) == sum(1 for _ in merge.stored(model.POCKET))
    for one in merge.stored(model.POCKET):
        values = shape.arranged(one.name, one.read().float().numpy())
        back = gguf.dequantize(read[shape.name(one.name)].data, read[shape.name(one.name)].tensor_type)
        step = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 2**-7}[dtype]
        assert np.abs(back.reshape(values.shape) - values).max() <= step * np.abs(values).max()


# --- tokenizers


def sentencepiece(folder: Path, how: str) -> Vocabulary:
    """A small BPE of SentencePiece's kind, with every merge its tokens allow, in a tiny Llama's folder."""
    seen = [f"<0x{byte:02X}>" for byte in range(256)]
    words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    prepared = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    words.normalizer = normalizers.Sequence(prepared)
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *seen], show_progress=False)
    words.train_from_iterator(["the coat of the tram was wet and the other coat is dry " * 3, "don't 漢字"], trainer)
    tokens = sorted(words.get_vocab().items(), key=lambda pair: pair[1])
    known = {text for text, at in tokens if at > 258}
    merges = [
        (text[:cut], text[cut:])
        for text, _ in tokens
        for cut in range(1, len(text))
        if text in known and text[:cut] in known and text[cut:] in known
    ]
    again = Tokenizer(models.BPE(dict(tokens), merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if how == "normalizer":
        again.normalizer = normalizers.Sequence(prepared)
    else:
        again.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    again.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    again.add_special_tokens(["<unk>", "<s>", "</s>"])
    tiny.base(folder)
    made = PreTrainedTokenizerFast(tokenizer_object=again, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": len(tokens) + 3}
    torch.manual_seed(0)
    tiny.LlamaForCausalLM(tiny.LlamaConfig(**config)).save_pretrained(folder)
    return Vocabulary.load(folder)


@pytest.mark.parametrize("how", ["normalizer", "metaspace"])
def test_a_sentencepiece_vocabulary_cuts_as_in_training(how: str, tmp_path: Path) -> None:
    vocabulary = sentencepiece(tmp_path / "base", how)
    whole = Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json"))
    write(tmp_path / "base", tmp_path / "m.gguf")
    texts = ["the coat", "a wet coat and the  tram\n\n", "Ünïcode — 漢字 🙂", "don't"]
    heard = llamacpp.hear(tmp_path / "m.gguf", [], 1, texts=texts)
    assert [list(ids) for ids in heard.ids] == [
        [1, *whole.encode(text, add_special_tokens=False).ids] for text in texts
    ]
    words = wordlist.read(tmp_path / "base", 500)
    assert words.model == "llama"
    assert words.spaced
    assert words.tokens[-1] == "[PAD499]"
    assert vocabulary.lead


def state(folder: Path, **changes: Any) -> Path:
    """pocket's tokenizer, changed."""
    found = json.loads((model.POCKET / "tokenizer.json").read_text())
    for path, value in changes.items():
        *inside, key = path.split("__")
        place = found
        for step in inside:
            place = place[step]
        place[key] = value
    (folder / "tokenizer.json").write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no name for how it cuts"),
        ({"normalizer": {"type": "Lowercase"}}, "normalises text"),
        ({"model__ignore_merges": True}, "whole words"),
        ({"model__type": "Unigram"}, "of the kind Unigram"),
        ({"pre_tokenizer__use_regex": False}, "no name for how it cuts"),
    ],
)
def test_a_tokenizer_llama_cpp_would_read_otherwise_is_refused(tmp_path: Path, changes: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        wordlist.read(state(tmp_path, **changes), 4000)


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rows"):
        wordlist.read(state(tmp_path), 100)


def test_missing_merges_of_a_sentencepiece_vocabulary_are_refused(tmp_path: Path) -> None:
    sentencepiece(tmp_path, "normalizer")
    path = tmp_path / "tokenizer.json"
    found = json.loads(path.read_text())
    found["model"]["merges"].pop()
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match="never joins"):
        wordlist.read(tmp_path, 500)
