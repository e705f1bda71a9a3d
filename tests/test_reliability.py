"""Every promise of docs/reliability.md names tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "reliability.md").read_text()


def test_every_promise_has_tests_that_exist():
    rows = [row for row in TEXT.splitlines() if row.startswith("| ") and not row.startswith("| promise")]
    assert len(rows) >= 18
    for row in rows:
        named = re.findall(r"`((?:tests|benchmarks)?/?[\w/]*\w+\.py)`", row.rsplit("|", 2)[1])
        assert named, row
        for name in named:
            found = [ROOT / name] if "/" in name else [*(ROOT / "tests").rglob(name)]
            assert any(path.is_file() for path in found), (name, row)
