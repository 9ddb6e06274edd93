"""The cache's names: what a step puts out is what the next one reads."""

import pytest

from ffmerge.models import kv_cache
from ffmerge.models.kv_cache import DECODER, ENCODER, PRESENT


@pytest.mark.parametrize("sides", [("",), (DECODER, ENCODER)], ids=["alone", "pair"])
def test_keys_and_values_come_back_in_the_order_of_the_layers(sides: tuple[str, ...]) -> None:
    caches = {side: [(f"{side}k{i}", f"{side}v{i}") for i in range(12)] for side in sides}
    past = kv_cache.named(caches)
    assert all(map(kv_cache.is_past, past)) and len(past) == 24 * len(sides)
    present = {kv_cache.present_of(name): value for name, value in past.items()}
    assert kv_cache.keeps_cache(["logits", *present]) and not kv_cache.keeps_cache(past)
    assert {kv_cache.past_of(name): value for name, value in present.items()} == past
    for side in sides:
        assert kv_cache.pairs(past, side) == caches[side]
        assert kv_cache.pairs(present, side, PRESENT) == caches[side]
        assert sum(kv_cache.side_of(name) == side for name in present) == 24
    # layer by layer, as PyTorch's exporter and optimum order a graph's inputs
    assert [name.split(".")[1] for name in past] == sorted(
        (name.split(".")[1] for name in past), key=int
    )


def test_an_empty_cache_has_no_names() -> None:
    assert kv_cache.named({"": []}) == {}
    assert kv_cache.pairs({"logits": 1}) == []
