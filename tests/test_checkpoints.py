import pickle

import pytest
import torch
from safetensors.torch import save_file

from timm_dseq import UserError
from timm_dseq import checkpoints as cp

from . import layouts


class _TouchesAFile:
    """Unpickled without care, it runs a command of its author's."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (__import__("os").system, (f"touch {self.path}",))


@pytest.mark.parametrize("via_torch", [True, False])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, via_torch):
    victim, file = tmp_path / "touched", tmp_path / "weights.pth"
    if via_torch:
        torch.save({"model": _TouchesAFile(victim)}, file)
    else:
        file.write_bytes(pickle.dumps({"model": _TouchesAFile(victim)}))
    with pytest.raises(UserError, match=r"weights\.pth (needs \w+\.system|cannot be read|is no plain)") as error:
        cp.read(file)
    assert not victim.exists()
    assert "\n" not in str(error.value)

    if via_torch:  # the trap works: without the care it would have sprung
        torch.load(file, weights_only=False)
        assert victim.exists()


def test_an_old_torch_opens_no_foreign_pickle(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "weights.pth")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(UserError, match=r"torch 2\.9\.1\+cu128 cannot open .* safely"):
        cp.read(tmp_path / "weights.pth")
    monkeypatch.setattr(torch, "__version__", "2.10.0a0")
    assert cp.read(tmp_path / "weights.pth") == {}


def test_missing_truncated_and_corrupt_files_are_named(tmp_path, roles):
    with pytest.raises(UserError, match=r"nowhere\.pth is no file"):
        cp.read(tmp_path / "nowhere.pth")
    whole = tmp_path / "whole.safetensors"
    save_file(roles["target"], whole)
    for name, content in {
        "truncated": whole.read_bytes()[:-1000],
        "header": whole.read_bytes()[:100],
        "empty": b"",
        "text": b"<html>not found</html>",
    }.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.safetensors is truncated or corrupt") as error:
            cp.read(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(error.value)
    torch.save(roles["target"], tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"half\.pth"):
        cp.read(tmp_path / "half.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        cp.read(tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("save", "class_token", "kind"),
    [
        (layouts.save_ijepa, False, "ijepa"),
        (layouts.save_official, True, "dseq_official"),
        (layouts.save_training, True, "dseq_jepa"),
    ],
)
def test_roles_are_told_apart(tmp_path, save, class_token, kind):
    shapes = layouts.encoder_shapes(width=64, depth=2, class_token=class_token)
    target, student = layouts.random_weights(shapes, 1), layouts.random_weights(shapes, 2)
    predictor = layouts.random_weights(layouts.predictor_shapes(width=64, narrow=32, depth=1), 3)
    file = save(tmp_path / ("w.safetensors" if kind == "dseq_jepa" else "w.pth"), target, student, predictor)
    found = cp.parse(cp.read(file))
    assert found.kind == kind
    for role, expected in {"target": target, "student": student, "predictor": predictor}.items():
        assert getattr(found, role).keys() == expected.keys()
        assert all(torch.equal(getattr(found, role)[name], expected[name]) for name in expected)
    assert found.encoder() is found.target
    assert found.encoder("student") is found.student


def test_a_file_with_one_encoder_gives_it_as_target_and_refuses_the_student():
    weights = layouts.random_weights(layouts.encoder_shapes(width=64, depth=1), 1)
    for state in ({"model": layouts.wrapped(weights), "epoch": 3}, weights, {"state_dict": weights}):
        found = cp.parse(state)
        assert found.kind == "timm" and found.encoder().keys() == weights.keys()
        with pytest.raises(UserError, match="one encoder only"):
            found.encoder("student")
    only_student = cp.parse({"encoder": weights})
    assert only_student.encoder() is only_student.student
