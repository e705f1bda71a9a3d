"""What tests of several programs are given."""

from pathlib import Path

import pytest

from .tunings import colours


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Parquet files of small labelled images; see `colours`."""
    return colours(tmp_path_factory.mktemp("data") / "colours")
