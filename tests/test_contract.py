"""Ties are kept in the model's metadata, and checked in whatever the file becomes."""

import json

import numpy as np
import onnx_ir as ir
import pytest
from graphs import TWO_LAYERS, build, names, normal

from ffmerge.errors import InputError, TieError
from ffmerge.models.record import Tie
from ffmerge.passes.graph.contract import check_ties, join_ties, read_ties, write_ties
from ffmerge.passes.graph.run import share_model


def test_the_ties_name_wins_and_is_recorded():
    w, b = normal(64, 64), normal(64, seed=1)
    model = build(TWO_LAYERS, W1=w, B1=b, W2=w, B2=b)
    ties = [Tie("W2", ("W1", "W2")), Tie("layer.bias", ("layer.bias", "B2"))]
    result = share_model(model, ties)
    assert set(names(model)) == {"layer.bias", "W2"}
    assert read_ties(model) == result.ties == tuple(ties)
    assert share_model(model).ties == tuple(ties)  # kept without being given again


def test_two_ties_of_equal_tensors_become_one():
    zero = np.zeros(64, np.float32)
    model = build(TWO_LAYERS, W1=normal(64, 64), B1=zero, W2=normal(64, 64, seed=1), B2=zero)
    result = share_model(model, [Tie("B2", ("B2",)), Tie("B1", ("B1",))])
    assert len(result.ties) == 1 and set(result.ties[0].members) == {"B1", "B2"}
    assert result.ties[0].name in names(model) and len(names(model)) == 3


def test_join_ties_keeps_the_first_name():
    ties = [Tie("a", ("a", "b")), Tie("c", ("c", "d")), Tie("d", ("d", "b"))]
    assert join_ties(ties) == (Tie("a", ("a", "b", "c", "d")),)
    assert join_ties(ties[:2]) == tuple(ties[:2])


def test_a_tie_of_different_tensors_is_an_error():
    model = build(
        TWO_LAYERS, W1=normal(64, 64), B1=normal(64), W2=normal(64, 64, seed=1), B2=normal(64)
    )
    with pytest.raises(TieError, match="tie W1: stored 2 times: initializers W1, W2"):
        share_model(model, [Tie("W1", ("W1", "W2"))])


def test_ties_survive_the_metadata():
    model = build(TWO_LAYERS, W1=normal(64, 64), B1=normal(64), W2=normal(64, 64), B2=normal(64))
    ties = (Tie("é", ("é", "b")),)
    write_ties(model, ties)
    assert json.loads(model.metadata_props["ffmerge.ties"]) == [
        {"name": "é", "members": ["é", "b"]}
    ]
    assert read_ties(ir.from_proto(ir.to_proto(model))) == ties
    write_ties(model, ())
    assert "ffmerge.ties" not in model.metadata_props
    model.metadata_props["ffmerge.ties"] = "[1"
    with pytest.raises(InputError, match=r"ffmerge\.ties"):
        read_ties(model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("", ""),
        ("W2 other", "stored 2 times: initializers W, W2"),
        ("copy", "stored again, as it is or transposed, as val_7"),
        ("turned", "stored again, as it is or transposed, as val_7"),
        ("Transpose", "hidden behind Transpose node hide"),
        ("Identity", "hidden behind Identity node hide"),
        ("Cast", "hidden behind Cast node hide"),
        ("Reshape", "hidden behind Reshape node hide"),
        ("one use", "stands for 2 places but is used 1 times: n0"),
        ("renamed", "none of its 2 names is an initializer"),
    ],
)
def test_a_broken_tie_says_what_breaks_it(change, reason):
    w = normal(64, 64)
    second = {"W2 other": "W2", "copy": "val_7", "turned": "val_7", "one use": "val_7"}.get(
        change, "W"
    )
    values = {
        "W2 other": normal(64, 64, seed=1),
        "copy": w,
        "turned": w.T.copy(),
        "one use": normal(64, 64, seed=2),
    }
    model = build(
        f"(float[2,64] x) => (float[2,64] y) {{a = MatMul(x, W)  y = MatMul(a, {second})}}",
        W=w,
        **({second: values[change]} if second != "W" else {}),
    )
    if change in ("Transpose", "Identity", "Cast", "Reshape"):
        attributes = {"Cast": {"to": 1}}.get(change, {})
        shape = ir.Value(name="s", const_value=ir.tensor([64, 64], name="s"))
        inputs = [model.graph.initializers["W"], *([shape] if change == "Reshape" else [])]
        if change == "Reshape":
            model.graph.register_initializer(shape)
        hide = ir.node(change, inputs, attributes, name="hide")
        model.graph.insert_before(model.graph[0], hide)
        model.graph.node("n1").replace_input_with(1, hide.outputs[0])
    if change == "renamed":
        model.graph.initializers["W"].name = "val_3"
    (check,) = check_ties(model, [Tie("W", ("W", "W2"))])
    assert check.group == "W" and check.ok == (change == "")
    assert reason in check.reason and (check.reason == "") == check.ok
