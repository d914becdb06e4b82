"""How a monitor finds its number among what is logged."""

import numpy as np
import pytest

from eqxmeta._callback.published import Curve, Image, logged_value

CURVE = Curve(np.array([4.0, 1.0, 0.5]), np.array([0.3, 0.2, 0.1]))
VALUES = {
    "loss": np.float32(0.25),
    "eval/loss": CURVE,
    "plot": Image(np.zeros((1, 1, 3), np.uint8)),
}


@pytest.mark.parametrize(
    "monitor, value",
    [
        ("loss", 0.25),
        ("eval/loss", 0.5),
        ("eval/loss/after_0", 4.0),
        ("eval/loss/after_2", 0.5),
        ("eval/los", None),
        ("loss/after_1", None),  # a number has no inner steps
        ("eval/loss/after_x", None),
    ],
)
def test_a_monitor_names_a_number_or_a_point_of_a_curve(monitor, value):
    assert logged_value(VALUES, monitor) == value


def test_a_monitor_cannot_be_a_picture():
    with pytest.raises(TypeError, match=r"'plot' is an image(.|\n)*Received:(.|\n)*Expected:"):
        logged_value(VALUES, "plot")


def test_a_monitor_beyond_the_curve():
    with pytest.raises(ValueError, match=r"after_3(.|\n)*inner step 3(.|\n)*up to 2"):
        logged_value(VALUES, "eval/loss/after_3")
