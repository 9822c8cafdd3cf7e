"""Which example is trained when."""

from collections import Counter

import pytest

from finetune.batches import Epochs, Item, Packing, goldfish, packing


def items(examples: int = 11, formats: tuple[str, ...] = ("a", "b", "c")) -> dict[tuple[str, str], Item]:
    return {
        (f"e{i}", name): Item(f"e{i}", name, tuple(range(5 + i)), (False, *(True,) * (4 + i)))
        for i in range(examples)
        for name in formats
    }


def epochs(draw: str = "rotate", **more: object) -> Epochs:
    names = ("a", "b", "c")
    chosen = {
        "rotate": lambda epoch, example: [names[(epoch + int(example[1:])) % 3]],
        "all": lambda epoch, example: list(names),
    }[draw]
    made = items()
    return Epochs(lambda *key: made[key], [f"e{i}" for i in range(11)], chosen, seed=3, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 11, 64])
@pytest.mark.parametrize("shuffle", ["each_epoch", "once", "never"])
def test_every_example_is_trained_every_epoch(batch_size: int, shuffle: str) -> None:
    plan = epochs(batch_size=batch_size, shuffle=shuffle)
    for epoch in range(5):
        assert sorted(item.example for item in plan.order(epoch)) == sorted(f"e{i}" for i in range(11))
        assert len(plan.order(epoch)) == plan.size


def test_all_trains_each_example_once_in_each_format() -> None:
    order = epochs("all").order(0)
    assert Counter(item.format for item in order) == {"a": 11, "b": 11, "c": 11}
    assert len({(item.example, item.format) for item in order}) == 33


def test_an_epoch_does_not_depend_on_the_ones_before() -> None:
    one, other = epochs(), epochs()
    for epoch in range(7):
        one.order(epoch)
    assert one.order(7) == other.order(7)


def test_shuffle_says_what_it_does() -> None:
    def names(plan: Epochs, epoch: int) -> list[str]:
        return [item.example for item in plan.order(epoch)]

    assert names(epochs(shuffle="never"), 0) == names(epochs(shuffle="never"), 5) == [f"e{i}" for i in range(11)]
    assert names(epochs(shuffle="once"), 0) == names(epochs(shuffle="once"), 5) != [f"e{i}" for i in range(11)]
    assert names(epochs(), 0) != names(epochs(), 1)


def test_a_batch_is_sorted_by_length_and_batches_stay_random() -> None:
    order = epochs(batch_size=4).order(0)
    for at in range(0, 11, 4):
        lengths = [len(item.ids) for item in order[at : at + 4]]
        assert lengths == sorted(lengths)
    lengths = [len(item.ids) for item in order]
    assert lengths != sorted(lengths)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_replay_takes_its_share_of_supervised_tokens(share: float) -> None:
    texts = [Item(f"r{i}", "", tuple(range(10)), (False, *(True,) * 9)) for i in range(200)]
    order = epochs(replay=texts, replay_share=share).order(0)
    replayed = sum(item.supervised for item in order if item.example.startswith("r"))
    assert replayed / sum(item.supervised for item in order) == pytest.approx(share, abs=0.05)
    assert sorted(i.example for i in order if i.example.startswith("e")) == sorted(f"e{i}" for i in range(11))


def test_goldfish_drops_the_same_tokens_each_time_and_never_the_end() -> None:
    item = Item("x", "a", tuple((i * i) % 97 for i in range(400)), (False,) * 50 + (True,) * 350)
    once, again = goldfish(item, 4), goldfish(item, 4)
    assert once == again
    assert once.trained[-1]
    assert not any(once.trained[:50])
    assert 0.6 < once.supervised / item.supervised < 0.9


def test_a_micro_batch_fits_the_budget_and_takes_every_text_once() -> None:
    items = [Item(f"e{n}", "a", tuple(range(n)), (True,) * n) for n in (3, 5, 8, 13, 21, 34, 2)]
    for budget in (1, 8, 16, 40, 1000):
        packs = Packing(tokens=budget).packs(items)
        assert [one for pack in packs for one in pack] == items
        assert all(len(pack) == 1 or sum(len(one.ids) for one in pack) <= budget for pack in packs)
        assert max(sum(len(one.ids) for one in pack) for pack in packs) <= Packing(tokens=budget).most(34, 7)
    assert [len(pack) for pack in packing(2).packs(items)] == [2, 2, 2, 1]
    assert packing(2).most(34, 7) == 68
    assert packing("auto").steps(items, 4) == [[29], [57]]
