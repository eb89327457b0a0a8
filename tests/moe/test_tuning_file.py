"""What `autotune` has kept in a file is read back as it was, or refused field by field."""

import json
import math

import pytest
from turnout.cuda.tiles import Blocks, Product
from turnout.cuda.tune import Shape
from turnout.moe.autotune.results import Tuned, read, write

HERE = {"device": "cpu", "torch": "2", "triton": "3", "kernels": "0"}
TUNED = Tuned(
    Shape(64, 8, 16, 4, 2, "swiglu", False, "bfloat16", True, True),
    {"torch": 2.0, "triton": "OutOfResources"},
    {
        Product("up", "cpu", "torch.bfloat16", (8, 16), True): {
            Blocks(64, 64, 32, 4, 3): 1.5,
            Blocks(16, 16, 16, 4, 1): "no",
        }
    },
)


def test_it_comes_back(tmp_path):
    write(tmp_path / "tuned.json", HERE, [TUNED])
    assert read(tmp_path / "tuned.json", HERE) == [TUNED]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("shape", "tokens"), -1),
        (("shape", "dim"), 8.5),
        (("shape", "bias"), 1),
        (("shape", "dtype"), None),
        (("times", "torch"), -0.5),
        (("times", "triton"), math.nan),
        (("times", "triton"), [1.0]),
        (("tiles", 0, "product", "shape"), [8]),
        (("tiles", 0, "product", "kernel"), 3),
        (("tiles", 0, "times", 0, 1), True),
        (("tiles", 0, "times", 0, 0, 0), "64"),
        (("tiles", 0, "times", 0, 0), [64, 64, 32]),
    ],
)
def test_a_field_that_is_wrong_is_refused(where, value, tmp_path):
    file = tmp_path / "tuned.json"
    write(file, HERE, [TUNED])
    given = json.loads(file.read_text())
    *outer, last = where
    holder = given["experts"][0]
    for key in outer:
        holder = holder[key]
    holder[last] = value
    file.write_text(json.dumps(given))
    with pytest.raises(ValueError, match=r"tuned.json is not a file of autotune .*: remove it, or name another"):
        read(file, HERE)
