"""Random vectors have the moments they claim, and leave everybody's random state as it was."""

import random

import numpy as np
import pytest
import torch

from losslab.memory import free_bytes, keep_freed_memory
from losslab.random import ball, gaussian, make_generator, preserved_random_states, rademacher


def states() -> tuple:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


def draw() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


@pytest.mark.parametrize("make", [rademacher, gaussian, lambda s, g, dtype: ball(s[0], g, dtype=dtype)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_seeded_and_of_the_type_asked_for(make, dtype):
    before = states()
    a, b, c = (make((64,), make_generator(seed), dtype=dtype) for seed in (3, 3, 4))
    assert a.dtype == dtype
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert states() == before


def test_rademacher_has_unit_entries_and_identity_covariance():
    z = rademacher((4000, 5), make_generator(0), dtype=torch.float64)
    assert z.unique().tolist() == [-1.0, 1.0]
    torch.testing.assert_close(z.T @ z / 4000, torch.eye(5, dtype=torch.float64), rtol=0, atol=0.08)  # 5 σ
    assert float(z.mean().abs()) < 0.04


def test_gaussian_moments():
    z = gaussian((20000,), make_generator(0), dtype=torch.float64)
    assert abs(float(z.mean())) < 0.04
    assert float(z.var()) == pytest.approx(1, abs=0.05)
    assert float(z.pow(4).mean()) == pytest.approx(3, abs=0.3)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_ball_is_uniform(size):
    generator = make_generator(1)
    points = torch.stack([ball(size, generator, dtype=torch.float64) for _ in range(2000)])
    radii = points.norm(dim=1)
    assert float(radii.max()) <= 1 + 1e-12
    # P(r ≤ t) = t^n, so r^n is uniform on [0, 1]: Kolmogorov–Smirnov at the 0.1 % level.
    uniform = (radii**size).sort().values
    steps = torch.arange(1, 2001, dtype=torch.float64) / 2000
    assert float((uniform - steps).abs().max()) < 1.95 / 2000**0.5
    assert float(points.mean(0).norm()) < 0.1


def test_make_generator():
    given = torch.Generator().manual_seed(9)
    assert make_generator(given) is given
    assert make_generator(9).initial_seed() == 9
    for bad in ("0", 1.5, True, None):
        with pytest.raises(TypeError, match=r"seed: expected an int or a torch\.Generator"):
            make_generator(bad)


@pytest.mark.parametrize("seed", [None, 0, 5])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_states_come_back_whatever_happens(seed, error):
    own = make_generator(2)
    draw()
    before = states(), own.get_state().tolist()
    try:
        with preserved_random_states(seed, [own]):
            draw()
            torch.rand(3, generator=own)
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert (states(), own.get_state().tolist()) == before


def test_a_seeded_block_is_reproducible():
    def block(seed):
        own = make_generator(2)
        draw()
        with preserved_random_states(seed, [own]):
            return draw(), float(torch.rand((), generator=own))

    assert block(1) == block(1)
    assert all(a != b for a, b in zip(block(1)[0], block(2)[0], strict=True))
    assert block(1)[1] != block(2)[1]
    with preserved_random_states(-1):  # NumPy takes no negative seeds
        draw()


def test_free_bytes_and_allocator():
    free = free_bytes(torch.device("cpu"))
    assert isinstance(free, int)
    assert 1 << 20 < free < 1 << 50
    assert isinstance(keep_freed_memory(), bool)
