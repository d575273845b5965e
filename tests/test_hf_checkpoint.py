"""`new_folder`: what is exported appears as a whole, or not at all."""

import shutil

import pytest

from fastexperts.errors import FastexpertsError
from fastexperts.hf.checkpoint import new_folder


def test_a_folder_that_has_something_is_left_alone(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(FastexpertsError, match="not empty"), new_folder(tmp_path, "export"):
        pytest.fail("the block ran")
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize("kind", ["new", "empty", "linked", "dangling", "here"])
def test_an_empty_folder_that_is_there_stays_the_one_it_is(tmp_path, monkeypatch, kind):
    """A mount point cannot be removed, nor a link renamed onto, and a shell may stand in the folder."""
    output, target = tmp_path / "output", tmp_path / "target"
    if kind in ("empty", "here"):
        output.mkdir()
    if kind in ("linked", "dangling"):
        output.symlink_to(target)
    if kind == "linked":
        target.mkdir()
    before = output.stat().st_ino if output.exists() else None
    if kind == "here":
        monkeypatch.chdir(output)
    with new_folder("." if kind == "here" else output, "export") as partial:
        (partial / "part").mkdir()
        (partial / "part" / "file").write_text("filled")
        assert not (output / "part").exists()
    assert (output / "part" / "file").read_text() == "filled"
    assert [path.name for path in output.iterdir()] == ["part"]
    assert before in (None, output.stat().st_ino)
    assert output.is_symlink() == (kind in ("linked", "dangling"))
    assert {path.name for path in tmp_path.iterdir()} <= {"output", "target"}


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_midway_leaves_nothing(tmp_path, there):
    output = tmp_path / "output"
    if there:
        output.mkdir()
    with pytest.raises(FileNotFoundError), new_folder(output, "export") as partial:
        shutil.copy(partial / "missing", partial / "half")
    assert list(tmp_path.rglob("*")) == [output] * there
