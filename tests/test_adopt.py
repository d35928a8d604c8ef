"""Results measured without asv's environments."""

import json

import pytest
from asv.util import UserError

from tools import adopt

LABEL = {"backend": "cuda13", "python": "3.12", "mlx": "0.32.4"}


def existing(tmp_path, env_name="existing-py_opt_venv_bin_python3"):
    """A file of results as asv writes it on a machine without network."""
    result = {
        "commit_hash": "0123456789abcdef",
        "date": 0,
        "env_name": env_name,
        "params": {"machine": "gpu", "python": "/opt/venv/bin/python3"},
        "python": "/opt/venv/bin/python3",
        "requirements": {},
        "result_columns": ["result", "params", "version"],
        "results": {"a.B.time_c": [[1.0], [], "1"]},
        "version": 2,
    }
    source = tmp_path / f"source/gpu/01234567-{env_name}.json"
    source.parent.mkdir(parents=True)
    source.write_text(json.dumps(result))
    record = '{"machine": "gpu", "os": "Linux", "version": 1}'
    source.with_name("machine.json").write_text(record)
    return source, result


def test_adopt_relabels_and_keeps_the_measurements(tmp_path):
    source, before = existing(tmp_path)
    target = adopt.adopt(source, **LABEL, results=tmp_path / "results")
    assert target == tmp_path / "results/gpu/01234567-cuda13-py3.12-mlx0.32.4.json"
    after = json.loads(target.read_text())
    assert "/opt" not in target.read_text()
    assert after["results"] == before["results"]
    assert after["commit_hash"] == before["commit_hash"]
    assert after["params"] == {"machine": "gpu", "python": "3.12", "mlx": "0.32.4"}
    assert json.loads((target.parent / "machine.json").read_text())["os"] == "Linux"


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("01234567-existing-py_opt_venv_bin_python3.json", "{}", "is a required property"),
        ("machine.json", '{"machine": "gpu"', "Expecting"),
        ("machine.json", '{"machine": "other", "version": 1}', "of machine 'gpu', got 'other'"),
        ("machine.json", None, "No such file"),
    ],
)
def test_adopt_refuses_what_is_broken(name, text, reason, tmp_path):
    source, _ = existing(tmp_path)
    broken = source.with_name(name)
    broken.unlink() if text is None else broken.write_text(text)
    with pytest.raises(UserError, match=rf"{name} is broken: .*{reason}"):
        adopt.adopt(source, **LABEL, results=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_adopt_refuses_a_name_of_asvs_own_and_labels_that_a_page_would_obey(tmp_path):
    source, _ = existing(tmp_path / "a", "virtualenv-py3.11-mlx0.32.4")
    with pytest.raises(UserError, match="expected an existing environment, got virtualenv"):
        adopt.adopt(source, **LABEL, results=tmp_path / "results")
    source, _ = existing(tmp_path / "b")
    with pytest.raises(UserError, match=r"mlx<b>.* does not match"):
        adopt.adopt(source, **LABEL | {"mlx": "<b>"}, results=tmp_path / "results")
    assert not (tmp_path / "results").exists()
