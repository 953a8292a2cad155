"""Files, and the folder of a report: claimed before anything is drawn, for one report, work kept when interrupted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ge2hist_core.__main__ import run_command
from ge2hist_core.files import atomic_folder, atomic_path
from ge2hist_core.types import BadInput
from perturb.__main__ import COMMANDS
from perturb.cache import report_folder

KEY, OTHER = "a" * 64, "b" * 64


def test_interrupted_work_is_there_for_the_same_command_and_goes_when_it_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupted() -> None:
        with report_folder(out, None, KEY) as cache:
            cache.store_arrays(KEY, {"x": np.arange(3)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with report_folder(out, None, KEY) as cache:
        assert cache.load_arrays(KEY)["x"].tolist() == [0, 1, 2]
        (out / "report.html").write_text("page")
    assert not (out / ".work").exists()
    with report_folder(out, None, KEY) as cache:  # the same report, written again
        assert cache.load_arrays(KEY) is None


def test_a_cache_of_the_users_own_stays(tmp_path: Path) -> None:
    with report_folder(tmp_path / "out", tmp_path / "mine", KEY) as cache:
        cache.store_arrays(KEY, {"x": np.arange(3)})
    with report_folder(tmp_path / "other", tmp_path / "mine", OTHER) as cache:
        assert cache.load_arrays(KEY) is not None


def test_two_reports_are_not_mixed_in_one_folder(tmp_path: Path) -> None:
    with report_folder(tmp_path / "out", None, KEY):
        (tmp_path / "out" / "recipe.json").write_text("{}")
    with (
        pytest.raises(BadInput, match=r"--out .*out is not empty .* give a new folder"),
        report_folder(tmp_path / "out", None, OTHER),
    ):
        pass
    assert (tmp_path / "out" / "recipe.json").read_text() == "{}"


@pytest.mark.parametrize("where", ["out", "cache"])
def test_a_file_in_the_way_is_one_sentence_before_anything_is_drawn(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("mine")
    folders = {"out": tmp_path / "out", "cache": tmp_path / "cache"} | {where: tmp_path / "file"}
    with pytest.raises(BadInput, match="file"), report_folder(folders["out"], folders["cache"], KEY):
        pytest.fail("drawn")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_that_cannot_be_written_is_one_sentence_of_the_command_line(tmp_path: Path, capsys) -> None:
    command = ["network", "known-truth", "--out", str(tmp_path)]
    assert run_command("perturb", "", COMMANDS, command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and str(tmp_path) in said and len(said.splitlines()) == 1


def test_what_is_written_can_be_read_by_whoever_may_read_new_files(tmp_path: Path) -> None:
    """safetensors makes its files readable to their owner alone."""
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    with atomic_path(tmp_path / "one.safetensors") as temporary:
        save_file({"x": np.zeros(2)}, temporary)
        temporary.chmod(0o600)
    with atomic_folder(tmp_path / "bundle") as folder:
        (folder / "unet").mkdir()
        save_file({"x": np.zeros(2)}, folder / "unet" / "two.safetensors")
        (folder / "unet" / "two.safetensors").chmod(0o600)
    for name in ("one.safetensors", "bundle/unet/two.safetensors"):
        assert (tmp_path / name).stat().st_mode == usual
