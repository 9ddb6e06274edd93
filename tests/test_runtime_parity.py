from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from packages import linear_package, regraphed

from ffmerge.errors import InputError, RuntimeCheckError
from ffmerge.models.probe import stored_elements
from ffmerge.runtime_tests.parity import check_parity
from ffmerge.runtime_tests.runtimes.registry import find_runtime

GENERATOR = np.random.default_rng(0)
WEIGHT = (GENERATOR.standard_normal((8, 5)) / 1000).astype(np.float32)
BIAS = np.zeros(5, np.float32)


@pytest.mark.parametrize("optimization", find_runtime("cpu").levels)
def test_the_same_weights_are_in_parity(tmp_path: Path, optimization: str) -> None:
    manifest = linear_package(tmp_path / "package", WEIGHT, BIAS)
    (output,) = check_parity(tmp_path / "package", manifest, "cpu", optimization)
    assert output.ok, output.reason
    assert (output.name, output.optimization) == ("logits", optimization)
    assert output.compared == output.elements == (1 + 3) * 5
    assert output.max_abs is not None and output.max_abs < 2e-9  # measured 4.7e-10
    assert output.cosine == pytest.approx(1, abs=1e-14)  # measured 1.2e-15


def test_a_weight_that_is_off_is_found_and_placed(tmp_path: Path) -> None:
    served = WEIGHT.copy()
    served[2, 3] += 1e-3  # moves logits[:, 3] by 1e-3 x[:, 2]
    manifest = linear_package(tmp_path / "package", WEIGHT, BIAS, served)
    (output,) = check_parity(tmp_path / "package", manifest)
    driving = [(abs(manifest.graphs[0].probe.draw(case)["x"][:, 2]), case) for case in (0, 1)]
    largest, case, row = max((x.max(), case, int(x.argmax())) for x, case in driving)

    assert not output.ok
    assert output.worst is not None
    assert (output.worst.case, output.worst.index) == (case, (row, 3))
    assert output.max_abs == pytest.approx(1e-3 * largest, rel=1e-6)  # measured 1.2e-7
    assert "elements are out of tolerance" in str(output.reason)


def test_a_sampled_output_is_placed_in_the_full_one(tmp_path: Path) -> None:
    weight = (GENERATOR.standard_normal((4, 1000)) / 1000).astype(np.float32)
    served = weight.copy()
    served[1, 501] += 1.0
    bias = np.zeros(1000, np.float32)
    manifest = linear_package(
        tmp_path / "package", weight, bias, served, cases=({"batch_size": 100},)
    )
    (output,) = check_parity(tmp_path / "package", manifest)
    x = manifest.graphs[0].probe.draw(0)["x"]
    assert (output.compared, output.elements) == (34_000, 100_000)  # every third row
    assert output.worst is not None
    row, column = output.worst.index
    assert column == 501
    assert row % 3 == 0
    assert output.worst.got == pytest.approx(x[row] @ served[:, 501], rel=1e-5)  # measured 1.2e-7
    assert output.worst.expected == pytest.approx(x[row] @ weight[:, 501], rel=1e-5)  # measured 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_fails(tmp_path: Path, value: float) -> None:
    served = WEIGHT.copy()
    served[0, 4] = value
    manifest = linear_package(tmp_path / "package", WEIGHT, BIAS, served)
    (output,) = check_parity(tmp_path / "package", manifest)
    assert not output.ok
    assert output.max_abs is None
    assert output.reason == "NaN or infinity in 4 of 20 elements"
    assert output.worst is not None and output.worst.index == (0, 4)


def test_infinity_in_both_is_no_parity(tmp_path: Path) -> None:
    bias = np.array([0, 0, np.inf, 0, 0], np.float32)
    manifest = linear_package(tmp_path / "package", WEIGHT, bias)
    (output,) = check_parity(tmp_path / "package", manifest)
    assert not output.ok
    assert output.worst is not None and output.worst.index == (0, 2)


@pytest.mark.parametrize(("off", "ok"), [(1.5e-5, True), (2.5e-5, False), (-2.5e-5, False)])
def test_the_bound_is_the_one_in_the_table(tmp_path: Path, off: float, ok: bool) -> None:
    served = BIAS + np.float32(off)  # fp32 allows 2e-5, and 1e-5 of logits of size 0.3
    manifest = linear_package(tmp_path / "package", 100 * WEIGHT, BIAS, served_bias=served)
    (output,) = check_parity(tmp_path / "package", manifest)
    assert output.ok is ok


def test_the_worst_element_is_the_one_that_uses_most_of_its_bound(tmp_path: Path) -> None:
    bias = np.array([1000, 0, 0, 0, 0], np.float32)  # the first may be off by 1e-2
    served = bias + np.array([5e-3, 1e-3, 0, 0, 0], np.float32)
    manifest = linear_package(tmp_path / "package", WEIGHT, bias, served_bias=served)
    (output,) = check_parity(tmp_path / "package", manifest)
    assert output.worst is not None and output.worst.index[1] == 1
    assert output.reason == "4 of 20 elements are out of tolerance"


def test_another_shape_fails_with_both_sizes(tmp_path: Path) -> None:
    manifest = linear_package(tmp_path / "package", WEIGHT, BIAS, WEIGHT[:, :1].copy())
    other = replace(manifest.graphs[0].probe, cases=({"batch_size": 1}, {"batch_size": 4}))
    (output,) = check_parity(tmp_path / "package", regraphed(manifest, probe=other))
    assert not output.ok
    assert "case 1: 15 reference elements" in str(output.reason)
    assert "[4, 5] has 20" in str(output.reason)


def test_a_case_without_reference_fails(tmp_path: Path) -> None:
    manifest = linear_package(tmp_path / "package", WEIGHT, BIAS)
    probe = manifest.graphs[0].probe
    more = replace(probe, cases=(*probe.cases, {"batch_size": 2}))
    (output,) = check_parity(tmp_path / "package", regraphed(manifest, probe=more))
    assert output.reason == "the package has no reference for case 2"
    assert not output.ok


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_quantized_output_may_be_off_by_a_part_of_its_size(size: float, tmp_path: Path) -> None:
    weight = WEIGHT * np.float32(size)
    manifest = linear_package(tmp_path / "a", weight, BIAS, dtype="int8")
    cases = (manifest.graphs[0].probe.draw(case)["x"] for case in (0, 1))
    rms = float(
        np.sqrt(np.mean(np.concatenate([x.astype(np.float64) @ weight for x in cases]) ** 2))
    )
    for part, ok in ((0.45, True), (0.85, False)):  # bound: 0.5, and 0.05 of the element itself
        bias = np.array([0, 0, part * rms, 0, 0], np.float32)
        off = linear_package(tmp_path / str(part), weight, BIAS, None, bias, dtype="int8")
        (output,) = check_parity(tmp_path / str(part), off)
        assert output.atol == pytest.approx(0.5 * rms, rel=1e-7)  # measured 9.3e-9
        assert ("out of tolerance" not in str(output.reason)) == ok


@pytest.mark.parametrize(
    ("dtype", "many", "ok"), [("int8", 2, True), ("int8", 3, False), ("fp32", 1, False)]
)
def test_single_elements_of_a_quantized_output_are_spared(dtype, many, ok, tmp_path: Path) -> None:
    """One of 4,000: two of these 10,000, which are not told to be within the bound."""
    weight = GENERATOR.standard_normal((8, 10_000)).astype(np.float32)
    bias = np.zeros(10_000, np.float32)
    served = bias.copy()
    served[:many] = 9
    one = ({"batch_size": 1},)
    manifest = linear_package(tmp_path / "p", weight, bias, None, served, one, dtype=dtype)
    (output,) = check_parity(tmp_path / "p", manifest)
    assert output.out == many and output.ok == ok
    assert output.max_abs == pytest.approx(9, abs=1e-5)  # measured 4.6e-7


def test_logits_of_a_quantized_model_must_point_the_same_way(tmp_path: Path) -> None:
    manifest = linear_package(tmp_path / "package", WEIGHT, BIAS, -WEIGHT / 4, dtype="int4")
    (output,) = check_parity(tmp_path / "package", manifest)
    assert output.max_abs is not None and output.max_abs < output.atol
    assert output.cosine == pytest.approx(-1, abs=1e-14)  # measured 1.2e-15
    assert output.reason == "cosine -1.000000 is below 0.9"
    assert not output.ok


def test_an_output_of_nothing_but_noise_has_no_direction(tmp_path: Path) -> None:
    manifest = linear_package(tmp_path / "package", WEIGHT / 1e6, BIAS, -WEIGHT / 1e6)
    (output,) = check_parity(tmp_path / "package", manifest)
    assert output.ok, output.reason


def test_zeros_are_in_parity_with_zeros_only(tmp_path: Path) -> None:
    manifest = linear_package(tmp_path / "zeros", WEIGHT * 0, BIAS)
    (output,) = check_parity(tmp_path / "zeros", manifest)
    assert output.ok and output.cosine == 1
    manifest = linear_package(tmp_path / "ones", WEIGHT * 0, BIAS + 1, served_bias=BIAS)
    (output,) = check_parity(tmp_path / "ones", manifest)
    assert not output.ok and output.cosine == 0


def test_outputs_and_inputs_the_graph_lacks_are_errors(tmp_path: Path) -> None:
    manifest = linear_package(tmp_path / "package", WEIGHT, BIAS)
    with pytest.raises(RuntimeCheckError, match="hidden"):
        check_parity(tmp_path / "package", regraphed(manifest, outputs=("hidden",)))
    (tmp_path / "package" / "reference.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"reference\.safetensors cannot be read"):
        check_parity(tmp_path / "package", manifest)


def test_samples_have_the_stride_the_places_are_computed_with() -> None:
    assert stored_elements(np.arange(100_000))[:3].tolist() == [0, 3, 6]
