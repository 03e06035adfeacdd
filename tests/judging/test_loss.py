"""The mean loss, to the digit, and what it tells on the way."""

from __future__ import annotations

import pytest
import torch

from mergekit_arm.judging.heldout import HeldOut, ScoredSequence, whole_text
from mergekit_arm.judging.loss import mean_loss
from tests.support.models import VOCABULARY, tiny_llama


def test_the_loss_is_that_of_a_plain_loop() -> None:
    model = tiny_llama(3).eval()
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for length in (3, 9, 9, 17, 5):
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        scored = torch.rand(length, generator=generator) < 0.6
        scored[0], scored[1] = False, True
        sequences.append(ScoredSequence(ids, scored))
    expected: list[float] = []
    with torch.inference_mode():
        for sequence in sequences:
            for position in range(1, len(sequence.ids)):
                if sequence.scored[position]:
                    logits = model(input_ids=sequence.ids[None, :position]).logits[0, -1].double()
                    expected.append(-float(logits.log_softmax(0)[sequence.ids[position]]))
    held = HeldOut(sequences, answers_only=True)
    assert held.scored_tokens == len(expected)
    for batch_size in (None, 1, 2, 5):
        loss = mean_loss(model, held, batch_size)
        assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def test_shares_add_up_to_the_whole_and_may_end_it() -> None:
    model = tiny_llama(3).eval()
    generator = torch.Generator().manual_seed(1)
    held = whole_text(torch.randint(VOCABULARY, (6, 12), generator=generator))
    shares: list[tuple[int, int, float]] = []
    loss = mean_loss(model, held, 2, lambda *share: shares.append(share))
    assert [done for done, _, _ in shares] == [22, 44, 66]
    assert {total for _, total, _ in shares} == {66}
    assert shares[-1][2] == loss
    firsts = HeldOut(held.sequences[:2], False)
    assert shares[0][2] == pytest.approx(mean_loss(model, firsts), rel=1e-6)

    def stop(done: int, total: int, mean: float) -> None:
        shares.append((done, total, mean))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mean_loss(model, held, 2, stop)
    assert len(shares) == 4
