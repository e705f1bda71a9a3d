"""The numbers that settings take, each with its range: what lies beyond it is refused as it is read, by its name."""

from typing import TypeAlias

from jsonargparse.typing import ClosedUnitInterval, restricted_number_type

LARGE, FAR = 10**9, 1e9


def _whole(name: str, least: int, most: int) -> type:
    return restricted_number_type(name, int, [(">=", least), ("<=", most)])


Share: TypeAlias = ClosedUnitInterval
Positive = restricted_number_type("Positive", float, [(">", 0), ("<=", FAR)])
NotNegative = restricted_number_type("NotNegative", float, [(">=", 0), ("<=", FAR)])
BelowOne = restricted_number_type("BelowOne", float, [(">=", 0), ("<", 1)])
Count = _whole("Count", 1, LARGE)
CountOrNone = _whole("CountOrNone", 0, LARGE)
Few = _whole("Few", 1, 1000)  # blocks, regions, views
Width = _whole("Width", 1, 65_536)
Side = _whole("Side", 1, 16_384)  # of an image, in pixels
Workers = _whole("Workers", 0, 1000)
Seed = _whole("Seed", 0, 2**63 - 1)

# What each takes, in words.
WORDS = {
    Share: "a number from 0 to 1",
    Positive: "a number above 0",
    NotNegative: "a number, 0 or more",
    BelowOne: "a number from 0 to below 1",
    Count: "a whole number above 0",
    CountOrNone: "a whole number, 0 or more",
    Few: "a whole number from 1 to 1000",
    Width: "a whole number from 1 to 65536",
    Side: "a whole number from 1 to 16384",
    Workers: "a whole number from 0 to 1000",
    Seed: "a whole number from 0 to 2^63 - 1",
}
