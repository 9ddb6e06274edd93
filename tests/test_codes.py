"""Codes and scales by hand: what packages and the search both round by."""

import numpy as np
import pytest

from ffmerge.models.codes import HADAMARD, SPREAD, Form, block_codes, int8_codes, pack, spread


def test_codes_of_a_row_end_at_127() -> None:
    values = np.array([[0.5, -1.27, 0.004], [2.54, 0, -0.02]], np.float32)
    codes, scales = int8_codes(values, 1)
    assert codes.tolist() == [[50, -127, 0], [127, 0, -1]]
    assert np.allclose(scales, [[0.01], [0.02]], rtol=1e-6)  # measured 2.3e-8


def test_what_is_all_zero_has_a_scale_to_divide_by() -> None:
    """0 / 0 is no number, and which code that becomes is the processor's choice."""
    values = np.zeros((3, 64), np.float32)
    values[1] = 1
    with np.errstate(all="raise"):
        codes, scales = int8_codes(values, 1)
        both = [block_codes(values, Form(4, 32, zeros)) for zeros in (False, True)]
    assert scales[[0, 2], 0].tolist() == [1, 1] and not codes[[0, 2]].any()
    assert all(np.array_equal(blocks.values(64), values) for blocks in both)


def test_two_neighbours_do_not_saturate_16_bits() -> None:
    """255 times both, of one sign: x86 without VNNI adds them in 16 bits."""
    values = np.array([[1.0], [0.9], [-1.0], [0.2]], np.float32)
    codes, scales = int8_codes(values, 0, paired=True)
    assert scales[0, 0] == pytest.approx(1.9 / 127, rel=1e-6)  # measured 0
    pairs = codes[:, 0].astype(int).reshape(2, 2).sum(1)
    assert np.abs(pairs).max() <= 128 and np.abs(255 * pairs).max() < 2**15
    assert int8_codes(values, 0)[1][0, 0] == pytest.approx(1 / 127, rel=1e-6)  # measured 0


def test_the_largest_of_a_block_has_the_code_0() -> None:
    """Whatever its sign: the scale takes the sign."""
    values = np.linspace(-1, 3, 40, dtype=np.float32)[None]
    blocks = block_codes(values, Form(8, 32))
    codes, scales, zeros = blocks
    assert (zeros == 128).all()
    assert codes.shape == (1, 2, 32) and scales.shape == (1, 2)
    for block in range(2):
        own = values[0, 32 * block : 32 * block + 32]
        largest = own[np.abs(own).argmax()]
        assert codes[0, block, np.abs(own).argmax()] == 0
        assert scales[0, block] == pytest.approx(largest / -128, rel=1e-6)  # measured 0
        back = blocks.values(40)[0, 32 * block : 32 * block + 32]
        assert np.abs(back - own).max() <= 0.5001 * abs(scales[0, block])  # measured 0.496


def test_the_range_of_a_block_is_the_one_that_loses_least() -> None:
    """Of eleven, tried one by one by hand; a large value is cut off for the sake of the others."""
    values = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
    lost = np.square(block_codes(values, Form(4, 32)).values(32) - values).sum(1)
    largest = values[np.arange(20), np.abs(values).argmax(1)]
    tried = []
    for clip in np.linspace(1, 0.75, 11):
        scale = (largest / -8 * clip)[:, None]
        tried.append(np.square(np.clip(np.rint(values / scale), -8, 7) * scale - values).sum(1))
    assert np.allclose(lost, np.min(tried, 0), rtol=1e-4)  # measured 2e-7
    assert lost.sum() < 0.95 * tried[0].sum()


def test_with_a_zero_point_codes_go_from_the_least_to_the_largest() -> None:
    """By hand: the step that two ends leave, zero on a code, and the best of eleven ranges."""
    values = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32) + 0.7
    values[0] = np.abs(values[0])  # on one side of zero, which is a code all the same
    blocks = block_codes(values, Form(4, 64, zeros=True))
    low, high = np.minimum(values.min(1), 0), values.max(1)
    full = (high - low) / 15
    zeros = np.rint(-low / full)
    assert np.array_equal(blocks.zeros[:, 0], zeros) and blocks.zeros[0, 0] == 0
    tried = []
    for clip in np.linspace(1, 0.75, 11):
        step, zero = (full * clip)[:, None], zeros[:, None]
        codes = np.clip(np.rint(values / step) + zero, 0, 15)
        tried.append(np.square((codes - zero) * step - values).sum(1))
    lost = np.square(blocks.values(64) - values).sum(1)
    assert np.allclose(lost, np.min(tried, 0), rtol=1e-4)  # measured 3e-7
    plain = np.square(block_codes(values, Form(4, 64)).values(64) - values).sum()
    assert lost.sum() < 0.9 * plain  # measured 0.77


def test_codes_that_fill_no_byte_are_padded() -> None:
    """Zero points of a row begin a byte: three of 4 bits take two, five of 2 bits two."""
    assert pack(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack(np.array([[1, 2, 3, 0, 2]], np.uint8), 2).tolist() == [[0b00111001, 0b10]]
    assert Form(4, 128, zeros=True).bytes_of(10, 384) == 10 * (3 * (64 + 4) + 2)
    assert Form(2, 32, zeros=True).bytes_of(10, 160) == 10 * (5 * (8 + 4) + 2)
    assert Form(4, 128).bytes_of(10, 384) == 10 * 3 * (64 + 4)


def test_rows_are_spread_by_pairs_to_the_last_bit() -> None:
    """Each sum of two is rounded by itself: a product's kernel may add up in another order."""
    row = np.random.default_rng(0).standard_normal(SPREAD).astype(np.float32)
    by_hand = list(row)
    for apart in (8, 4, 2, 1):
        for place in range(SPREAD):
            if not place & apart:
                one, other = by_hand[place], by_hand[place + apart]
                by_hand[place], by_hand[place + apart] = one + other, one - other
    found = spread(np.stack([row, -row]))
    assert found.dtype == np.float32
    assert found[0].tolist() == [value / np.float32(4) for value in by_hand]
    assert np.array_equal(found[1], -found[0])
    assert np.allclose(found[0], row.astype(np.float64) @ HADAMARD, atol=1e-6)  # measured 8.9e-8
