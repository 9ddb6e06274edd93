"""Python looks for cycles less often while much is made, and as before after that."""

import gc

import pytest

from ffmerge.models import heap


def test_the_collector_is_as_it_was_after_an_error() -> None:
    before = gc.get_threshold()
    with pytest.raises(ValueError), heap.rarely_collected():
        assert gc.get_threshold()[0] > before[0] > 0
        assert gc.isenabled()
        raise ValueError
    assert gc.get_threshold() == before


@pytest.mark.parametrize("own", [0, 10**7])
def test_who_looks_more_rarely_still_does(own: int) -> None:
    before = gc.get_threshold()
    gc.set_threshold(own, 5, 5)
    try:
        with heap.rarely_collected():
            assert gc.get_threshold() == (own, 5, 5)
    finally:
        gc.set_threshold(*before)
