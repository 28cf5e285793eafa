"""Numbers as people read them."""

import pytest

from se_prune import text
from tests.runs import N_IMAGES


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.percent(-0.001), "−0.1 %"),
        (text.points(0.0), "0.00 points"),
        (text.points(-0.000001), "0.00 points"),
        (text.points(0.012), "+1.20 points"),
        (text.share(1, 0), "–"),
        (text.scaled(3_860_488_192), "3.860 G"),
        (text.scaled(640), "640"),
        (text.as_printed(11.3e9), "11.30 G"),
        (text.as_printed(569e6), "569 M"),
        (text.as_printed(4.7e6), "4.7 M"),
        (text.as_printed(None), "–"),
        (text.p_value(3e-9), "< 0.0001"),
        (text.p_value(0.0123), "= 0.012"),
        (text.significant(0.06531), "0.0653"),
        (text.significant(1234.5), "1234"),
        (text.duration(7500), "2 h 05 min"),
        (text.duration(59.7), "1 min 00 s"),
        (text.tiny(0.0), "0"),
        (text.interval((0.5, 1.0)), "50.00–100.00 %"),
        (text.count(N_IMAGES), "10,000"),
    ],
)
def test_numbers_are_written_as_people_read_them(shown, expected):
    assert shown == expected
