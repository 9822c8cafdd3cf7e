"""Scores are those of the model whatever they are read beside; answers stop where they should; nothing is disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import memorised
import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy, log_softmax, softmax
from transformers import GenerationConfig

from finetune import looks, lots, model
from finetune.batches import Group, Item
from finetune.masks import Vocabulary
from finetune.odds import Sampler
from finetune.speak import Pass, Speaker

TEXTS = tiny.texts([5, 33, 12, 60, 21, 9])
IDS, MASKS = [item.ids for item in TEXTS], [item.trained for item in TEXTS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("speak") / "llama")


@pytest.fixture(scope="module")
def net(base: Path) -> Any:
    return tiny.stirred(tiny.adapted(base))


def speaker(net: Any, **more: Any) -> Speaker:
    return Speaker(net, tiny.tokenizer().backend_tokenizer, None, **more)


@pytest.fixture(scope="module")
def talker() -> tuple[Speaker, list[list[int]]]:
    """Pocket with an adapter, and three prompts of unlike length."""
    words = Vocabulary.load(model.POCKET)
    asked = ["The cat", "Every morning the farmer and the child walk to the", "Do you like rain?"]
    ids = [[words.bos_id, *words.tokenizer.encode(text, add_special_tokens=False).ids] for text in asked]
    return Speaker(tiny.adapted(model.POCKET), words.tokenizer, words.eos_id), ids


# --- scores


def test_scores_are_those_of_a_full_forward(net: Any) -> None:
    for item, scored in zip(TEXTS, speaker(net).score(IDS, MASKS), strict=True):
        log_p = log_softmax(tiny.logits(net, item.ids), -1)
        wanted = [float(log_p[t - 1, item.ids[t]]) for t in range(1, len(item.ids)) if item.trained[t]]
        assert scored.log_p.tolist() == pytest.approx(wanted, abs=1e-4)
        assert scored.nll == pytest.approx(-sum(wanted), rel=1e-5)
        greedy = tiny.logits(net, item.ids).argmax(-1)
        assert scored.hits.tolist() == [bool(greedy[t - 1] == item.ids[t]) for t in range(4, len(item.ids))]


# int8 is left out: bitsandbytes chooses its outlier columns over the whole batch, which moves a token by up to 0.2 nats
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_scores_do_not_depend_on_the_batch(base: Path, quantization: str) -> None:
    net = tiny.stirred(tiny.adapted(base, quantization))
    together = speaker(net, batch_tokens=10**6).score(IDS, MASKS)
    for budget in (1, 70):
        for one, other in zip(together, speaker(net, batch_tokens=budget).score(IDS, MASKS), strict=True):
            assert torch.allclose(one.log_p, other.log_p, atol=1e-4)
            assert torch.equal(one.hits, other.hits)


def test_the_first_token_is_never_scored(net: Any) -> None:
    ids = [TEXTS[0].ids]
    whole = speaker(net).score(ids, [(True,) * 5])[0]
    assert len(whole.log_p) == 4


def test_long_texts_are_scored_in_pieces_that_fit_together(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"temperatures": (0.7, 1.0), "samplers": (Sampler(0.8, top_k=5),), "margins": True}
    whole = speaker(net).score(IDS, MASKS, **asked)
    monkeypatch.setattr("finetune.odds.HEAD_TOKENS", 7)
    for one, other in zip(whole, speaker(net).score(IDS, MASKS, **asked), strict=True):
        assert torch.allclose(one.log_p, other.log_p, atol=1e-5)
        assert torch.allclose(one.nll_at, other.nll_at, rtol=1e-6)
        assert torch.allclose(one.margins, other.margins, atol=1e-4)
        assert torch.allclose(one.log_q, other.log_q, atol=1e-4)


def test_hits_say_what_greedy_decoding_says(net: Any) -> None:
    prompt = torch.tensor([IDS[0]])
    plain = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        told = net.eval().generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=plain)[0].tolist()
    mask = [t >= 5 for t in range(len(told))]
    assert speaker(net).score([told], [mask])[0].hits.all()
    told[10] = (told[10] + 1) % 256
    hits = speaker(net).score([told], [mask], margins=True)[0]
    assert hits.hits.tolist()[:6] == [True] * 5 + [False]
    assert torch.equal(hits.margins > 0, hits.hits)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_base_scores_equal_the_bare_model(base: Path, quantization: str) -> None:
    adapted = speaker(tiny.stirred(tiny.adapted(base, quantization)))
    bare = speaker(model.load_base(base, quantization, tiny.CPU)).score(IDS, MASKS)
    for one, off, on in zip(bare, adapted.score(IDS, MASKS, base=True), adapted.score(IDS, MASKS), strict=True):
        assert torch.equal(one.log_p, off.log_p)
        assert not torch.allclose(one.log_p, on.log_p, atol=1e-3)


def test_change_is_adapter_on_minus_off(base: Path, net: Any) -> None:
    on, off = (speaker(net).score(IDS[1:2], MASKS[1:2], base=b)[0] for b in (False, True))
    assert speaker(net).change(IDS[1], MASKS[1]) == pytest.approx((on.nll - off.nll) / len(on.log_p))
    assert speaker(tiny.adapted(base)).change(IDS[1], MASKS[1]) == 0.0
    packed = tiny.stirred(tiny.adapted(base, "nf4"))
    assert speaker(packed).change(IDS[1], MASKS[1], exact=True) == pytest.approx(
        speaker(packed).change(IDS[1], MASKS[1]), abs=1e-6
    )  # on a CPU both are fp32


def test_temperature_sums_agree_with_torch(net: Any) -> None:
    temperatures = (0.5, 1.0, 2.0)
    for item, scored in zip(TEXTS, speaker(net).score(IDS, MASKS, temperatures), strict=True):
        logits, wanted = tiny.logits(net, item.ids)[3:-1], torch.tensor(item.ids[4:])
        sums = [float(cross_entropy(logits / t, wanted, reduction="sum")) for t in temperatures]
        assert scored.nll_at.tolist() == pytest.approx(sums, rel=1e-5)


# --- two readings


def test_kl_is_what_the_two_distributions_give(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = TEXTS[1], TEXTS[4]
    one, other = Pass(first.ids, range(5, 17)), Pass(second.ids, range(4, 16))
    rows = [log_softmax(tiny.logits(net, read.ids)[read.at[0] - 1 : read.at[-1]], -1) for read in (one, other)]
    wanted = (rows[0].exp() * (rows[0] - rows[1])).sum(-1)
    assert torch.allclose(speaker(net).kl(one, other), wanted, atol=1e-4)
    monkeypatch.setattr("finetune.odds.HEAD_TOKENS", 10)
    assert torch.allclose(speaker(net).kl(one, other), wanted, atol=1e-4)
    assert speaker(net).kl(one, one).max() < 1e-5
    assert speaker(net).kl(Pass(first.ids, ()), Pass(second.ids, ())).tolist() == []


def test_kl_between_base_and_adapter_is_that_of_two_models(base: Path, net: Any) -> None:
    on, off = Pass(IDS[3], range(9, 30)), Pass(IDS[3], range(9, 30), base=True)
    bare = model.load_base(base, "none", tiny.CPU)
    tuned, plain = (log_softmax(tiny.logits(one, IDS[3])[8:29], -1) for one in (net, bare))
    assert torch.allclose(speaker(net).kl(off, on), (plain.exp() * (plain - tuned)).sum(-1), atol=1e-4)


# --- groups


def test_nothing_supervised_is_not_zero(net: Any) -> None:
    silent = Item("e", "a", IDS[1], (False,) * len(IDS[1]))
    assert looks.measure(speaker(net), Group("held_out", "a", (silent,), 10)) is None
    assert looks.measure(speaker(net), Group("held_out", "a", (), 0)) is None


def test_a_group_is_weighed_by_tokens(net: Any) -> None:
    found = looks.measure(speaker(net), Group("train", "a", tuple(TEXTS), 200))
    scores = speaker(net).score(IDS, MASKS)
    total, count = sum(one.nll for one in scores), sum(len(one.hits) for one in scores)
    assert found is not None
    assert found.tokens == count == sum(len(item.ids) - 4 for item in TEXTS)
    assert found.nll == pytest.approx(total / count)
    assert found.bpb == pytest.approx(total / 0.6931471805599453 / 200)
    assert found.accuracy == pytest.approx(sum(int(one.hits.sum()) for one in scores) / count)
    assert found.nll_tstar is not None
    assert found.nll_tstar <= found.nll


def test_a_model_that_is_too_sure_is_best_at_a_higher_temperature(net: Any) -> None:
    found = looks.measure(speaker(net), Group("train", "a", tuple(TEXTS), 200))  # random text, loud random weights
    hottest = looks.measure(speaker(net), Group("train", "a", tuple(TEXTS), 200), (2.0,))
    assert found is not None
    assert hottest is not None
    assert found.nll_tstar == pytest.approx(hottest.nll_tstar)
    assert found.nll_tstar < found.nll - 0.1


# --- answers


def test_an_answer_ends_at_a_stop_string(talker: tuple[Speaker, list[list[int]]]) -> None:
    speaks, prompts = talker
    free = speaks.complete(prompts, [], 24)[1]
    words = free.text.split(" ")
    stop = f"{words[3]} {words[4]}"
    stopped = speaks.complete(prompts, ["never said", stop], 24)[1]
    assert stopped.ended
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.tokens < free.tokens


def test_an_answer_does_not_depend_on_what_is_asked_beside_it(talker: tuple[Speaker, list[list[int]]]) -> None:
    speaks, prompts = talker
    together = speaks.complete(prompts, ["."], 16)
    assert [speaks.complete([one], ["."], 16)[0].text for one in prompts] == [one.text for one in together]


def test_no_prompt_has_no_answer(talker: tuple[Speaker, list[list[int]]]) -> None:
    assert talker[0].complete([], ["."], 16) == []


def test_an_answer_ends_at_the_end_of_the_document(net: Any) -> None:
    words = tiny.tokenizer().backend_tokenizer
    free = Speaker(net, words, None).complete([IDS[0]], [], 12)[0]
    with torch.no_grad():
        config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
        told = net.eval().generate(torch.tensor([IDS[0]]), generation_config=config)[0].tolist()[5:]
    third = told[2]
    ended = Speaker(net, words, third).complete([IDS[0]], [], 12)[0]
    first = told.index(third)
    assert (ended.ended, ended.tokens) == (True, first)
    assert ended.text == words.decode(told[:first], skip_special_tokens=False)
    assert (free.ended, free.tokens) == (False, 12)


def test_an_answer_says_what_ended_it(talker: tuple[Speaker, list[list[int]]]) -> None:
    speaks, prompts = talker
    free = speaks.complete(prompts, [], 24)
    assert [(one.stop, one.ended) for one in free] == [("" if one.ended else None, one.ended) for one in free]
    words = list(dict.fromkeys(word for word in free[1].text.split(" ") if len(word) > 3))
    first, later = sorted(words[:2], key=free[1].text.index)
    assert speaks.complete(prompts, [later, first], 24)[1].stop == first


def test_drawn_answers_depend_on_the_seed_alone(talker: tuple[Speaker, list[list[int]]]) -> None:
    speaks, prompts = talker
    hot = Sampler(1.5)
    first, same, other = (speaks.complete(prompts, [], 12, sampler=hot, seed=seed) for seed in (1, 1, 2))
    assert first == same
    assert first != other
    assert speaks.complete(prompts, [], 12, sampler=Sampler(top_k=1), seed=3) == speaks.complete(prompts, [], 12)


def test_a_draw_does_not_depend_on_what_is_drawn_beside_it(talker: tuple[Speaker, list[list[int]]]) -> None:
    speaks, prompts = talker
    hot = Sampler(1.2, top_k=40, top_p=0.95)
    together = speaks.complete(prompts, [], 12, sampler=hot, seed=4)
    assert [speaks.complete([one], [], 12, sampler=hot, seed=4)[0] for one in prompts] == together
    first, second = speaks.complete(prompts[1:2] * 2, [], 12, sampler=hot, seed=4)
    assert first == together[1] != second


def test_draws_follow_the_sampler(net: Any) -> None:
    cool = Sampler(3.0, top_k=6, top_p=0.9)  # loud random weights: hot, so that there is a choice
    count = 4000
    odds = softmax(cool.warp(tiny.logits(net, IDS[0])[-1:]), -1)[0]
    told = lots.lots([IDS[0]] * count, 1, 1)
    drawn = lots.Lots(cool.warp, told, 5)(torch.zeros(count, 5), tiny.logits(net, IDS[0])[-1:].expand(count, -1))
    counts = drawn.argmax(-1).bincount(minlength=len(odds)).tolist()
    assert sum(n > 0 for n in counts) > 2
    assert all(memorised.two_sided(n, count, float(p)) > 1e-4 for n, p in zip(counts, odds, strict=True))


@pytest.mark.parametrize("fits", [1, 3])
def test_a_batch_that_does_not_fit_is_halved(talker: tuple[Speaker, list[list[int]]], fits: int) -> None:
    speaks, prompts = talker
    wanted = speaks.complete(prompts * 3, ["."], 12)
    sizes = []

    def full(_layer: Any, given: tuple[torch.Tensor]) -> None:
        sizes.append(len(given[0]))
        if len(given[0]) > fits:
            raise torch.OutOfMemoryError

    hook = speaks._model.get_input_embeddings().register_forward_pre_hook(full)
    try:
        assert speaks.complete(prompts * 3, ["."], 12) == wanted
    finally:
        hook.remove()
    assert max(sizes) == 9
    assert min(sizes) <= fits


def test_answers_are_written_as_many_at_once_as_fit(
    talker: tuple[Speaker, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    speaks, prompts = talker
    config = speaks._model.config
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert lots.room(config, tiny.CPU) == 2**30 // each
    wanted, sizes = speaks.complete(prompts, [], 12), []
    monkeypatch.setattr("finetune.lots._HOST", each * (12 + len(prompts[1])))  # the longest, alone
    hook = speaks._model.get_input_embeddings().register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    try:
        assert speaks.complete(prompts, [], 12) == wanted
    finally:
        hook.remove()
    assert set(sizes) == {1}


def draw(*_given: Any) -> None:
    """A base that draws by lot, as some do."""
    torch.rand(3)


@pytest.mark.parametrize("training", [True, False])
def test_speaking_leaves_the_random_state_and_the_mode_alone(base: Path, training: bool) -> None:
    net = tiny.adapted(base, shape=model.LoraShape(4, 4.0, 0.3, tiny.ALL)).train(training)
    net.get_input_embeddings().register_forward_hook(draw)
    before, weights = torch.get_rng_state(), tiny.weights(net)
    speaks = speaker(net)
    first = speaks.score(IDS, MASKS)
    speaks.complete([IDS[0]], [], 4)
    speaks.complete([IDS[0]], [], 4, sampler=Sampler())
    speaks.kl(Pass(IDS[1], (8, 9)), Pass(IDS[1], (9, 10), base=True))
    speaks.change(IDS[1], MASKS[1], exact=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert {module.training for module in net.modules()} == {training}
    assert all(torch.equal(weights[name], weight) for name, weight in tiny.weights(net).items())
    again = speaks.score(IDS, MASKS)  # dropout would make them differ
    assert all(torch.equal(one.log_p, other.log_p) for one, other in zip(first, again, strict=True))
