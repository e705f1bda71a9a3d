"""Where long work is to be published is checked before it begins."""

import pytest

from timm_dseq import UserError
from timm_dseq.hub.push import check_pushable

from ..train.runs import train


@pytest.fixture
def login(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    hub.token = "hf_writer"


@pytest.mark.parametrize("repository", ["me/mine", "lab/ours"])
def test_a_repository_of_the_user_or_of_a_group_is_fine_and_nothing_is_made(repository, hub, login):
    check_pushable(repository)
    assert not hub.repos


@pytest.mark.parametrize(
    ("repository", "token", "says"),
    [
        ("a/b/c", "hf_writer", "is no repository of the Hub"),
        ("alone", "hf_writer", "write ORGANISATION/alone"),
        ("theirs/x", "hf_writer", "me, who is logged in, is no member of that organisation: .* of me or lab"),
        ("lab/x", "hf_other", "your token may not do this"),
        ("lab/x", "", "nobody is logged in"),
    ],
)
def test_what_cannot_be_pushed_to_is_said_why(repository, token, says, hub, login, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=says) as error:
        check_pushable(repository)
    assert repository in str(error.value) and "hf_" not in str(error.value).replace("hf auth", "").replace("HF_", "")


@pytest.mark.xdist_group("runs")
@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_a_run_asks_before_its_first_step(dry_run, hub, login, tmp_path):
    settings = {"hub__push_to": "theirs/x", "hub__license": "mit", "dry_run": dry_run}
    code, said = train(tmp_path / "run", **settings)
    assert code == 1 and said.startswith("pretrain.py: theirs/x: "), said
    assert not (tmp_path / "run" / "log.jsonl").exists()
