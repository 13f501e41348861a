"""Random numbers of counters, and tokens drawn by them: their distribution, by the bound of
Dvoretzky, Kiefer and Wolfowitz, which n draws exceed with a chance of 2 exp(−2 n ε²).
"""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from student_train.using.choosing import Row, choose, drawn, hashed, uniform
from student_train.using.settings import SampleConfig


def farthest(n: int) -> float:
    """What n draws exceed with a chance of 10⁻⁹."""
    return math.sqrt(math.log(2e9) / (2 * n))


@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 50))
def test_numbers_are_splitmix64_of_their_key(key: int, count: int) -> None:
    """In Python's integers, which have no width to run out of."""
    keys = torch.tensor([7, key])
    for i, number in enumerate(uniform(keys, count)[1].double().tolist(), 1):
        x = (key + i * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        x ^= x >> 31
        assert 0 < number < 1 and math.isclose(number, x % 2**63 / 2**63, abs_tol=2**-24)


def test_numbers_of_neighbouring_keys_are_uniform_and_unrelated() -> None:
    n = 2**20
    keys = hashed(hashed(torch.arange(n // 4)))
    numbers = uniform(keys, 4).double()
    ordered = numbers.flatten().sort().values
    assert (ordered - torch.arange(1, n + 1) / n).abs().max() < farthest(n)
    for other in (numbers[1:, 0], numbers[:-1, 1], uniform(~keys, 1)[:-1, 0]):
        pairs = (numbers[:-1, 0] + other) % 1  # uniform where the two are independent
        ordered = pairs.sort().values
        ranks = torch.arange(1, len(pairs) + 1) / len(pairs)
        assert (ordered - ranks).abs().max() < farthest(len(pairs))


def test_tokens_are_drawn_from_the_softmax_of_all_chunks() -> None:
    n = 20_000
    torch.manual_seed(0)
    logits = torch.randn(700) * 2
    logits[torch.rand(700) < 0.2] = -torch.inf
    tokens = drawn(logits.expand(n, -1), hashed(torch.arange(n)))
    found = torch.bincount(tokens, minlength=700).double() / n
    assert not found[logits == -torch.inf].any()
    wanted = logits.double().softmax(dim=0)
    assert (found.cumsum(0) - wanted.cumsum(0)).abs().max() < farthest(n)


def test_rows_are_sampled_each_in_its_own_way_whatever_the_batch() -> None:
    ways = [{}, {}, {"temperature": 2.0}, {"temperature": 2.0}, {"temperature": 1.0, "top_k": 3}]
    rows = [Row([1], SampleConfig(**way)) for way in ways]  # type: ignore[arg-type]
    torch.manual_seed(0)
    for row, count in zip(rows, (3, 1, 2, 5, 0), strict=True):
        row.masked = count
    logits, keys = torch.randn(11, 300), torch.arange(11)
    together = choose(logits, rows, keys)
    start = 0
    for row in rows:
        part = slice(start, start := start + row.masked)
        if row.masked:
            assert torch.equal(choose(logits[part], [row], keys[part]), together[part])
    assert torch.equal(together[:4], logits[:4].argmax(dim=1))
