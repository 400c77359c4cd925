"""Sharded checkpoints are read without running code, and no kill while one is replaced loses it, file or folder."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from forks import fork

from looplm.checkpoint_io import DurableCheckpointIO
from looplm.checkpoints import load_checkpoint, load_model
from looplm.cli import main
from looplm.commands.ckpt_path import check_checkpoint
from looplm.commands.explorer.opening import open_model
from looplm.commands.next_step import last_of_run
from looplm.durable import draft_of, recover, save_whole, swap
from looplm.errors import InputError
from looplm.sharded_checkpoints import check_sharded, read_sharded


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


def _make(path: Path, kind: str, word: str) -> Path:
    """Write what a checkpoint is to a swap: a file, or a folder with the files that are written last."""
    if kind == "file":
        path.write_text(word)
        return path
    path.mkdir()
    for name in (".metadata", "meta.pt", "__0_0.distcp"):
        (path / name).write_text(word)
    return path


def _word(path: Path) -> str:
    """Return the one word of a whole checkpoint."""
    words = [file.read_text() for file in (path.iterdir() if path.is_dir() else [path])]
    assert len(words) == (3 if path.is_dir() else 1), words
    assert len(set(words)) == 1
    return words[0]


def _swap_and_die(draft: Path, path: Path, before: int) -> None:
    """Swap, and be killed before one of the operations that change the file system."""
    seen = 0

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("os.rename", "os.remove", "os.rmdir"):
            seen += 1
            if seen == before:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    swap(draft, path)


@pytest.mark.parametrize("is_aside", [False, True], ids=["in-place", "put-aside"])
@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("old", ["file", "folder"])
def test_kill_at_any_moment_of_a_swap_loses_nothing(tmp_path: Path, old: str, new: str, is_aside: bool) -> None:
    """Also where another kill had left the old one aside, and the run was begun anew without it."""
    words, kills = [], 0
    while True:
        folder = tmp_path / str(kills)
        folder.mkdir()
        path, draft = folder / "last.ckpt", folder / "draft"
        _make(folder / ".last.ckpt.old" if is_aside else path, old, "old")
        _make(draft, new, "new")
        process = fork(_swap_and_die, draft, path, kills + 1, output=tmp_path / "output")
        process.join(60)
        recover(path)
        words.append(_word(path))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "output").read_text()
        kills += 1
        swap(draft if draft.exists() else _make(draft, new, "new"), path)  # the next checkpoint
        assert _word(path) == "new"
        assert [entry.name for entry in folder.iterdir()] == ["last.ckpt"]
    assert words == sorted(words, reverse=True)  # the old one, and from one moment on the new one
    # A rename where a file takes a file's place, two where a folder is put aside, and what removes the old one.
    assert kills >= (1 if (old, new, is_aside) == ("file", "file", False) else 2), words
    assert [entry.name for entry in folder.iterdir()] == ["last.ckpt"]


def test_draft_takes_the_place_of_a_folder_a_file_or_a_link(tmp_path: Path) -> None:
    path = _make(tmp_path / "last.ckpt", "folder", "old")
    swap(_make(tmp_path / "draft", "file", "a file"), path)
    assert path.read_text() == "a file"
    swap(_write(tmp_path / "draft"), path)
    assert read_sharded(path)["global_step"] == 7
    for kind in ("folder", "file"):
        link = tmp_path / f"link to be a {kind}"
        link.symlink_to(path)
        swap(_make(tmp_path / "draft", kind, "new"), link)
        assert _word(link) == "new"
    assert read_sharded(path)["global_step"] == 7  # what the links named is as it was
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("new", ["file", "folder"])
def test_a_reader_between_the_two_renames_does_not_stop_the_writer(
    tmp_path: Path, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _make(tmp_path / "last.ckpt", "folder", "old")
    draft = _make(tmp_path / "draft", new, "new")
    replace, reads = Path.replace, [1]

    def read_first(source: Path, target: Path) -> Path:
        if reads:
            reads.pop()
            recover(target)
            assert _word(target) == "old"
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", read_first)
    swap(draft, path)
    assert not reads
    assert _word(path) == "new"


def test_a_swap_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = _make(tmp_path / "last.ckpt", "folder", "old")
    with pytest.raises(FileNotFoundError):
        swap(tmp_path / "no_such_draft", path)
    assert _word(path) == "old"


def test_one_of_two_ranks_brings_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, aside = tmp_path / "last.ckpt", _make(tmp_path / ".last.ckpt.old", "folder", "old")
    rename = Path.rename

    def be_slower(source: Path, target: Path) -> Path:
        rename(source, target)  # the other rank's
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", be_slower)
    recover(path)
    assert _word(path) == "old"
    assert not aside.exists()


def test_what_cannot_be_brought_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path / ".last.ckpt.old", "file", "old")

    def refuse(source: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match=r"stands at '.*/\.last\.ckpt\.old'.* brought back: Permission denied"):
        recover(tmp_path / "last.ckpt")


def test_a_folder_that_is_no_checkpoint_is_not_brought_back(tmp_path: Path) -> None:
    (_make(tmp_path / ".last.ckpt.old", "folder", "half removed") / ".metadata").unlink()
    recover(tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()


def _put_aside(path: Path) -> Path:
    path.rename(path.with_name(f".{path.name}.old"))
    return path


def test_every_reader_of_one_file_finds_what_was_put_aside(write_config: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = str(write_config(trainer__default_root_dir=str(run)))
    assert main(["fit", "--config", config]) == 0
    last = run / "checkpoints" / "last.ckpt"
    readers: list[Callable[[], Any]] = [
        lambda: main(["test", "--config", config]) == 0,
        lambda: main(["test", "--config", config, "--ckpt_path=last"]) == 0,
        lambda: main(["test", "--config", config, f"--ckpt_path={last}"]) == 0,
        lambda: main(["test", "--config", config, f"--ckpt_path={run}"]) == 0,
        lambda: main(["fit", "--config", config, f"--ckpt_path={run}", "--trainer.max_steps=6"]) == 0,
        lambda: main(["export", str(last), str(tmp_path / "exported")]) == 0,
        lambda: load_checkpoint(last),
        lambda: load_model(last),
        lambda: open_model(str(run)),
        lambda: open_model(str(last)),
        lambda: DurableCheckpointIO().load_checkpoint(last),
    ]
    for read in readers:
        _put_aside(last)
        assert read()
        assert last.is_file()


def test_every_reader_of_a_folder_finds_what_was_put_aside(tmp_path: Path) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    _put_aside(_write(last))
    assert main(["consolidate", str(last), str(tmp_path / "one.ckpt")]) == 0
    for given in (last.parents[1], last):
        _put_aside(last)
        with pytest.raises(InputError, match="is sharded, which only the strategy ShardedStrategy reads"):
            check_checkpoint(last_of_run(given), resumes=True, may_be_sharded=False)
        _put_aside(last)
        with pytest.raises(InputError, match=r"consolidate .*last\.ckpt FILE` makes one file"):
            open_model(str(given))


def test_a_file_takes_a_sharded_checkpoints_place_and_no_other_folders(tmp_path: Path) -> None:
    path = _write(tmp_path / "last.ckpt")
    draft_of(path).mkdir()  # of a run that wrote shards, and was killed
    (draft_of(path) / "__0_0.distcp").touch()
    save_whole({"step": 7}, path)
    assert torch.load(path, weights_only=True) == {"step": 7}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    with pytest.raises(InputError, match="could not be written: Is a directory; the one before is whole"):
        save_whole({"step": 7}, tmp_path / "thesis")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["chapter.txt", "last.ckpt", "thesis"]


def test_consolidate_refuses_what_is_no_sharded_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["consolidate", str(tmp_path), str(tmp_path / "one.ckpt")]) == 2
    assert "a sharded checkpoint must be a folder with .metadata" in capfd.readouterr().err


def test_a_folder_that_is_removed_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "epoch=0-step=2.ckpt"
    folder.mkdir()
    for name in (".metadata", "meta.pt"):
        (folder / name).write_text("")
    with monkeypatch.context() as patch:
        patch.setattr("lightning.fabric.plugins.TorchCheckpointIO.remove_checkpoint", lambda *_: None)  # killed before
        DurableCheckpointIO().remove_checkpoint(folder)
    assert not folder.exists()
    folder.mkdir()
    DurableCheckpointIO().remove_checkpoint(folder)
    assert list(tmp_path.iterdir()) == []
