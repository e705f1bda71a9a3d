"""Headers of safetensors and files of settings that chance has written: read right, or refused in one line."""

import contextlib
import io
import json
import math
import struct

import pytest
import torch
import yaml
from common.pretraining import settings as pretraining
from common.probing import settings as probing
from common.tuning import settings as tuning
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from timm_dseq import UserError
from timm_dseq.hub.weights import check_safetensors, parse, read

PARSERS = {"pretrain": pretraining, "probe": probing, "finetune": tuning}
often = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seldom = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

DTYPES = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64, "BOOL": torch.bool, "U8": torch.uint8}
numbers = st.integers(-3, 40) | st.integers() | st.sampled_from([2**31, 2**63, 2**64, 1e300, 0.5])
plain = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F8_E4M3", "BF16", "C64", "F4", "f32", "", "x"]) | plain,
        "shape": st.lists(numbers, max_size=4) | plain,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | plain,
    },
)
names = st.sampled_from(["a", "norm.weight", "blocks.0.mlp.fc1.weight", "__metadata__", "", "a\nb"]) | st.text(
    max_size=6
)
headers = st.dictionaries(names, entries | plain, max_size=4)


def refused(call):
    """What a call returns; None where it refuses in one line."""
    try:
        return call()
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return None


def file_of(folder, header, body, length=None):
    file = folder / "theirs.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)
    return file


def check(file):
    refused(lambda: check_safetensors(file))
    if (state := refused(lambda: read(file))) is not None:
        refused(lambda: parse(state))
        assert all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items())


@often
@given(header=headers, body=st.binary(max_size=64))
@example(header={"a": {"dtype": {"\n\x1b": 1}}}, body=b"")  # which the library quotes
def test_a_header_of_any_entries(header, body, tmp_path):
    check(file_of(tmp_path, json.dumps(header).encode(errors="replace"), body))


@often
@given(
    content=st.binary(max_size=200), length=st.none() | st.integers(0, 300) | st.sampled_from([2**32, 2**63, 2**64 - 1])
)
def test_a_header_of_any_bytes(content, length, tmp_path):
    check(file_of(tmp_path, content, b"", length))
    check(file_of(tmp_path, b"{" + content, b"", length))


@often
@given(drawn=st.data())
def test_a_sound_file_is_read_right_and_one_change_to_it_is_no_traceback(drawn, tmp_path):
    header, body, wanted = {}, b"", {}
    for index in range(drawn.draw(st.integers(1, 3))):
        kind = drawn.draw(st.sampled_from(["F32", "I64", "U8"]))
        shape = drawn.draw(st.lists(st.integers(0, 3), max_size=3))
        tensor = torch.arange(math.prod(shape)).to(DTYPES[kind]).reshape(shape)
        content = bytes(tensor.flatten().view(torch.uint8).tolist()) if tensor.numel() else b""
        wanted[f"t{index}"] = tensor
        header[f"t{index}"] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    encoded = json.dumps(header).encode()
    found = read(file_of(tmp_path, encoded, body))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    at = drawn.draw(st.integers(0, len(encoded) - 1))
    check(file_of(tmp_path, encoded[:at] + drawn.draw(st.binary(max_size=3)) + encoded[at + 1 :], body))
    check(file_of(tmp_path, encoded, body[: drawn.draw(st.integers(0, len(body)))]))


# Files of settings.


def parsed(program, file):
    """Settings, or one line and exit code 2, or 1 where they contradict each other: nothing else may come out."""
    words = [] if program == "pretrain" else ["--model=x", "--data.path=y"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return PARSERS[program].parse([*words, f"--config={file}"])
    except SystemExit as end:
        line = said.getvalue()
        assert end.code == 2 and line.count("\n") == 1 and line.startswith(f"{program}.py: "), line
    except UserError as error:
        assert "\n" not in str(error)


every_program = pytest.mark.parametrize("program", PARSERS)
keys = st.sampled_from(
    ["optim", "model", "data", "seed", "epochs", "args", "path", "k", "knn", "lr", "config", "class_path"]
)
trees = st.dictionaries(keys | st.text(max_size=4), plain | st.dictionaries(keys, plain, max_size=3), max_size=4)


@every_program
@seldom
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="replace")))
def test_settings_of_any_bytes(program, content, tmp_path):
    (tmp_path / "any.yaml").write_bytes(content)
    parsed(program, tmp_path / "any.yaml")


@every_program
@seldom
@given(
    text=st.lists(st.sampled_from([*"{}[]:,-&*!|>'\"#%@?\n \t", "a", "1", "optim", "seed", "null", "<<", "!!set"])).map(
        "".join
    )
)
def test_settings_of_any_marks_of_yaml(program, text, tmp_path):
    (tmp_path / "any.yaml").write_text(text)
    parsed(program, tmp_path / "any.yaml")


@every_program
@seldom
@given(tree=trees)
def test_settings_of_any_plain_data(program, tree, tmp_path):
    (tmp_path / "any.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="replace")
    parsed(program, tmp_path / "any.yaml")


@every_program
def test_settings_that_are_sound_are_read(program, tmp_path):
    """The control case."""
    (tmp_path / "any.yaml").write_text("output_dir: here\n")
    assert parsed(program, tmp_path / "any.yaml") is not None
