"""Sharded checkpoints are read without running code, and outlive a kill while they are replaced."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from looplm.cli import main
from looplm.commands.ckpt_path import check_checkpoint
from looplm.errors import InputError
from looplm.sharded_checkpoints import check_sharded, read_sharded, recover, swap


class _Payload:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({self.path!r}, 'w').write('ran')",)


def _write(folder: Path, **more: Any) -> Path:
    """Write what ShardedStrategy does, from one process."""
    optimizer = {
        "state": {"b": {"momentum_buffer": torch.ones(3)}, "a": {"momentum_buffer": torch.zeros(2)}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["b", "a"]}],
    }
    weights = {"b": torch.arange(3.0), "a": torch.arange(2.0)}
    dcp.save({"state_dict": weights, "optimizer_0": optimizer, **more}, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 7}, folder / "meta.pt")
    return folder


def test_content_is_that_of_one_file(tmp_path: Path) -> None:
    folder = _write(tmp_path / "last.ckpt")
    content = read_sharded(folder)
    assert content["global_step"] == 7
    assert torch.equal(content["state_dict"]["b"], torch.arange(3.0))
    (optimizer,) = content["optimizer_states"]
    assert optimizer["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}]
    assert torch.equal(optimizer["state"][0]["momentum_buffer"], torch.ones(3))
    assert check_sharded(folder) == {"global_step", "state_dict", "optimizer_states"}


def test_a_checkpoint_of_deepspeed_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "last.ckpt"  # as its engine lays it out
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "latest").write_text("checkpoint")
    with pytest.raises(InputError, match=r"is a checkpoint of DeepSpeed: pickled code, which looplm does not run"):
        check_checkpoint(folder, resumes=True, may_be_sharded=False)


def _hostile_metadata(folder: Path, ran: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(_Payload(ran)))


def _hostile_entry(folder: Path, ran: Path) -> None:
    _write(folder, extra=_Payload(ran))


def _hostile_rest(folder: Path, ran: Path) -> None:
    torch.save({"global_step": _Payload(ran)}, folder / "meta.pt")


@pytest.mark.parametrize("damage", [_hostile_metadata, _hostile_entry, _hostile_rest])
@pytest.mark.parametrize("read", [read_sharded, check_sharded])
def test_hostile_folder_is_refused_and_never_run(
    tmp_path: Path, damage: Callable[[Path, Path], None], read: Callable[[Path], Any]
) -> None:
    folder, ran = _write(tmp_path / "last.ckpt"), tmp_path / "ran"
    damage(folder, ran)
    with pytest.raises(InputError, match="is no sharded checkpoint of looplm, or damaged"):
        read(folder)
    assert not ran.exists()


def test_hostile_entry_would_run_if_torch_read_it(tmp_path: Path) -> None:
    # Else the test above could not fail.
    _write(tmp_path / "last.ckpt", extra=_Payload(tmp_path / "ran"))
    dcp.load({"extra": 0}, checkpoint_id=tmp_path / "last.ckpt", no_dist=True)
    assert (tmp_path / "ran").exists()


def test_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    path = _write(tmp_path / "last.ckpt")
    path.rename(tmp_path / ".last.ckpt.old")  # where a killed swap stops
    recover(path)
    assert read_sharded(path)["global_step"] == 7


def test_draft_takes_the_place_of_a_folder_or_a_file(tmp_path: Path) -> None:
    path = _write(tmp_path / "last.ckpt")
    draft = tmp_path / "draft"
    draft.write_text("a file")
    swap(draft, path)
    assert path.read_text() == "a file"
    swap(_write(tmp_path / "draft"), path)
    assert read_sharded(path)["global_step"] == 7
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt"]


def test_consolidate_refuses_what_is_no_sharded_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["consolidate", str(tmp_path), str(tmp_path / "one.ckpt")]) == 2
    assert "a sharded checkpoint must be a folder with .metadata" in capfd.readouterr().err
