"""The bill of memory is that of a real step, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tracked import Cell, estimated, tracked

from finetune import peaks


@pytest.fixture(scope="module", params=[("llama", 2), ("qwen2", 3)], ids=lambda one: one[0])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, layers = request.param
    return tiny.base(tmp_path_factory.mktemp(kind), kind, dtype=torch.bfloat16, layers=layers)


CELLS = [
    Cell(8, 96, 1, False),
    Cell(8, 96, 1, True),
    Cell(4, 48, 2, False, "none"),
    Cell(4, 96, 1, False, "int8"),
    Cell(16, 64, 1, False, micro=2),
    Cell(64, 16, 1, True),
    Cell(8, 96, 1, False, twice=1),
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.filterwarnings("ignore:.*float16.*")
def test_the_bill_is_within_five_percent_of_a_tracked_step(folder: Path, cell: Cell) -> None:
    assert estimated(folder, cell) == pytest.approx(tracked(folder, cell), rel=0.05)


def test_a_tensor_counts_while_it_lives_and_a_view_of_it_never() -> None:
    there = torch.zeros(1000)

    def work() -> None:
        first = torch.ones(500)  # 2,000 bytes
        view = there[:10].view(2, 5)
        del first
        torch.ones(700).add_(view.sum())

    found = peaks.used(tiny.CPU, [there], work)
    assert 2800 <= found.most < 2900
    assert found.kept == 0
