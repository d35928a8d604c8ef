"""Results measured without asv's environments."""

import json

import pytest
from asv.util import UserError
from result_files import write_result

from tools import adopt

LABEL = {"backend": "cuda13", "python": "3.12", "mlx": "0.32.4"}
PYTHON = "/opt/venv/bin/python3"


@pytest.fixture
def source(tmp_path):
    """A file of results as asv writes it on a machine without network."""
    folder, name = tmp_path / "source/gpu", "existing-py_opt_venv_bin_python3"
    labels = {"params": {"machine": "gpu", "python": PYTHON}, "python": PYTHON}
    rows = {"a.B.time_c": [[1.0], [], "1"]}
    file = write_result(folder, "0123456789abcdef", rows, name, **labels)
    (folder / "machine.json").write_text('{"machine": "gpu", "os": "Linux", "version": 1}')
    return file


def test_adopt_relabels_and_keeps_the_measurements(source, tmp_path):
    target = adopt.adopt(source, **LABEL, results=tmp_path / "results")
    assert target == tmp_path / "results/gpu/01234567-cuda13-py3.12-mlx0.32.4.json"
    before, after = (json.loads(file.read_text()) for file in (source, target))
    assert "/opt" not in target.read_text()
    assert after["results"] == before["results"]
    assert after["commit_hash"] == before["commit_hash"]
    assert after["params"] == {"machine": "gpu", "python": "3.12", "mlx": "0.32.4"}
    assert json.loads((target.parent / "machine.json").read_text())["os"] == "Linux"


@pytest.mark.parametrize(
    ("name", "text", "labels", "reason"),
    [
        (None, "{}", LABEL, "is a required property"),
        ("machine.json", '{"machine": "gpu"', LABEL, "Expecting"),
        ("machine.json", '{"machine": "other", "version": 1}', LABEL, "of machine 'gpu', got"),
        (None, None, LABEL | {"mlx": "<b>"}, "mlx<b>.* does not match"),
    ],
)
def test_adopt_refuses_what_is_broken(name, text, labels, reason, source, tmp_path):
    if text:
        source.with_name(name or source.name).write_text(text)
    with pytest.raises(UserError, match=reason):
        adopt.adopt(source, **labels, results=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_adopt_refuses_a_name_of_asvs_own(source, tmp_path):
    own = write_result(source.parent, "0123456789abcdef", {}, "virtualenv-py3.11-mlx0.32.4")
    with pytest.raises(UserError, match="expected an existing environment, got virtualenv"):
        adopt.adopt(own, **LABEL, results=tmp_path / "results")
