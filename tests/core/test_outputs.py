"""Results never cost what is not theirs: what is replaced, what is refused, and what a killed process leaves."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from vla_policy.core import outputs
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import claim_folder, write_json
from vla_policy.core.outputs import (
    FolderKind,
    atomic_folder,
    atomic_path,
    check_file,
    check_folder,
    kind_of,
    page_kind,
    remove_folder,
    scratch_beside,
)

BOX = FolderKind("box", "box.json", ("content.bin", "inner/*.txt"))


def write_box(folder: Path, content: str) -> None:
    """Fills a folder of kind `box`."""
    (folder / "content.bin").write_text(content)
    write_json(folder / "box.json", {"kind": "box"})


def place(path: Path, content: str) -> None:
    with atomic_folder(path, BOX) as folder:
        write_box(folder, content)


def tree(folder: Path) -> dict[str, str | None]:
    """Every entry below a folder; links by where they point."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_text()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    write_json(target, {"kind": "plan", "old": True})
    before = tree(tmp_path)
    with pytest.raises(RuntimeError), atomic_path(target, "plan") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert tree(tmp_path) == before


def test_a_failed_folder_leaves_the_old_folder_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "box"
    place(target, "old")
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt), atomic_folder(target, BOX) as temporary:
        (temporary / "content.bin").write_text("half")
        raise KeyboardInterrupt
    assert tree(tmp_path) == before
    place(target, "new")
    assert (target / "content.bin").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def thesis(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")


def named_like_one(folder: Path) -> None:
    """The index's name, somebody else's content."""
    folder.mkdir()
    (folder / "box.json").write_text('{"kind": "lunch"}')


def damaged(folder: Path) -> None:
    place(folder, "old")
    (folder / "box.json").write_text('{"kind": "bo')


def with_notes(folder: Path) -> None:
    place(folder, "old")
    (folder / "notes.txt").write_text("mine")


def with_notes_deep_inside(folder: Path) -> None:
    place(folder, "old")
    (folder / "inner" / "more").mkdir(parents=True)
    (folder / "inner" / "more" / "a.txt").write_text("mine")


def hidden(folder: Path) -> None:
    folder.mkdir()
    (folder / ".git").write_text("gitdir: elsewhere")


def a_file(folder: Path) -> None:
    folder.write_text("years of work")


def a_link_to_a_thesis(folder: Path) -> None:
    thesis(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("occupy", "message"),
    [
        (thesis, r"holds thesis\.tex and no box\.json that says it is of kind 'box', so it is left alone"),
        (named_like_one, r"holds box\.json and no box\.json that says"),
        (damaged, "so it is left alone"),
        (with_notes, r"holds notes\.txt, no part of a folder of kind 'box'; move that away"),
        (with_notes_deep_inside, r"holds inner/more/a\.txt, no part"),
        (hidden, r"holds \.git and no box\.json"),
        (a_file, "is no folder"),
        (a_link_to_a_thesis, r"holds thesis\.tex"),
    ],
)
def test_a_folder_of_anything_else_is_refused_before_any_work(
    tmp_path: Path, occupy: Callable[[Path], None], message: str
) -> None:
    target = tmp_path / "out"
    occupy(target)
    before = tree(tmp_path)
    with pytest.raises(ArtefactError, match=message):
        check_folder(target, BOX)
    with pytest.raises(ArtefactError, match=message), atomic_folder(target, BOX):
        pytest.fail("work began")
    with pytest.raises(ArtefactError, match=message):
        remove_folder(target, BOX)
    assert tree(tmp_path) == before


def test_absent_and_empty_places_and_the_same_kind_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "elsewhere").mkdir()
    place(tmp_path / "elsewhere" / "real", "old")
    (tmp_path / "link").symlink_to("elsewhere/real")
    (tmp_path / "dangling").symlink_to("elsewhere/absent")
    for name in ("absent", "empty", "deep/down/below", "link", "dangling"):
        place(tmp_path / name, "new")
        assert (tmp_path / name / "content.bin").read_text() == "new", name
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "elsewhere" / "real" / "content.bin").read_text() == "new"


def test_no_result_lies_in_above_or_on_an_input(tmp_path: Path) -> None:
    place(tmp_path / "policy", "weights")
    (tmp_path / "alias").symlink_to("policy")
    for out, how in (("policy", "is"), ("policy/engine", "lies in"), (".", "holds"), ("alias", "is")):
        with pytest.raises(ArtefactError, match=f"{how} the input .*policy; name another place"):
            check_folder(tmp_path / out, BOX, [None, tmp_path / "policy"])
    with pytest.raises(ArtefactError, match="lies in the input"):
        check_file(tmp_path / "alias" / "report.html", "report", [tmp_path / "policy"])
    check_folder(tmp_path / "policy2", BOX, [tmp_path / "policy"])


def test_the_folder_in_use_and_a_place_that_cannot_be_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(tmp_path / "box", "old")
    monkeypatch.chdir(tmp_path / "box")
    with pytest.raises(ArtefactError, match="this command runs in it"):
        check_folder(Path(), BOX)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="file is no folder; name another place"):
        check_folder(tmp_path / "file" / "box", BOX)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ArtefactError, match="loop: "):
        check_folder(tmp_path / "loop", BOX)
    with pytest.raises(ArtefactError, match="is neither a file nor a folder"):
        check_file("/dev/null", "plan")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"kind": "plan", "schema_version": 1}', "plan"),
        (b'{\n "a": [1],\n "kind": "plan"\n}\n', "plan"),
        (b'{"kind": "journal"}\n{"task": 1}\n{"tas', "journal"),
        (b'{"abc": {"kind": "inner"}, "kind": "plan"}', "plan"),
        (b"<!doctype html>\n" + page_kind("report").encode() + b"\n<html>", "report"),
        (b"rosbag2_bagfile_information:\n  version: 9\n", "rosbag2"),
        (b"", None),
        (b"[1, 2]", None),
        (b'{"kind": 3}', None),
        (b'{"kind": "pl', None),
        (b"kind: plan\n", None),
        (b"\x89PNG\r\n\x1a\n", None),
        (b"12345678{}", None),
    ],
)
def test_a_file_says_what_it_is(tmp_path: Path, content: bytes, kind: str | None) -> None:
    path = tmp_path / "named_plan.json"
    path.write_bytes(content)
    assert kind_of(path) == kind


def test_tensors_say_what_they_are_however_long_their_header_is(tmp_path: Path) -> None:
    many = {f"tensor_{index}": np.zeros(2) for index in range(200)}
    save_file(many, tmp_path / "x", metadata={"kind": "losses"})
    assert kind_of(tmp_path / "x") == "losses"
    save_file(many, tmp_path / "x")
    assert kind_of(tmp_path / "x") is None


def test_a_file_replaces_its_own_kind_only(tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    path.touch()
    write_json(path, {"kind": "sensitivity", "run": 1})
    write_json(path, {"kind": "sensitivity", "run": 2})
    assert json.loads(path.read_text())["run"] == 2
    before = tree(tmp_path)
    with pytest.raises(ArtefactError, match="does not say that it is of kind 'plan', so it is not replaced"):
        write_json(path, {"kind": "plan"})
    assert tree(tmp_path) == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtefactError, match="is a folder; name a file"):
        write_json(tmp_path / "folder", {"kind": "plan"})
    (tmp_path / "link.json").symlink_to("sensitivity.json")
    write_json(tmp_path / "link.json", {"kind": "sensitivity", "run": 3})
    assert (tmp_path / "link.json").is_symlink() and json.loads(path.read_text())["run"] == 3


def test_a_claimed_folder_is_known_again_and_no_other_is_taken(tmp_path: Path) -> None:
    assert claim_folder(tmp_path / "work", BOX, {"seed": 1})["seed"] == 1
    (tmp_path / "work" / "anything").write_text("of ours")
    assert claim_folder(tmp_path / "work", BOX, {"seed": 2})["seed"] == 1
    thesis(tmp_path / "thesis")
    before = tree(tmp_path)
    with pytest.raises(ArtefactError, match="left alone"):
        claim_folder(tmp_path / "thesis", BOX)
    assert tree(tmp_path) == before


def test_what_comes_meanwhile_is_not_lost_and_neither_is_the_result(tmp_path: Path) -> None:
    target = tmp_path / "box"
    with pytest.raises(ArtefactError, match="it came while this ran: the result is") as caught, atomic_folder(
        target, BOX
    ) as folder:
        write_box(folder, "hours of work")
        thesis(target)
    assert tree(target) == {"thesis.tex": "years of work"}
    kept = Path(str(caught.value).rsplit("the result is ", 1)[1])
    assert (kept / "content.bin").read_text() == "hours of work"
    place(target.with_name("other"), "x")
    assert kept.is_dir()


_CHILD = """
import os, signal, sys
from pathlib import Path
from tests.core.test_outputs import place
from vla_policy.core import outputs

step, target = int(sys.argv[1]), Path(sys.argv[2])
done = 0

def dying(rename):
    def stand_in(self, to):
        global done
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return rename(self, to)
    return stand_in

Path.rename, Path.replace = dying(Path.rename), dying(Path.replace)
place(target, "new")
print(done)
"""


def replace_in_a_process(target: Path, killed_before: int) -> "subprocess.CompletedProcess[str]":
    """Replaces `target` in a process that is killed before its rename number `killed_before`, counted from 0."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", _CHILD, str(killed_before), str(target)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("killed_before", [0, 1, 2, 3])
def test_a_process_killed_before_any_rename_loses_neither_version(tmp_path: Path, killed_before: int) -> None:
    """Renames: the index into the new folder, the old folder aside, the new one in; then none is left."""
    target = tmp_path / "box"
    place(target, "old")
    ended = replace_in_a_process(target, killed_before)
    assert ended.returncode == (0 if killed_before == 3 else -signal.SIGKILL), ended.stderr
    stands = (target / "content.bin").read_text() if target.exists() else None
    assert stands == {0: "old", 1: "old", 2: None, 3: "new"}[killed_before]
    left = [path.name for path in tmp_path.iterdir() if path != target]
    assert len(left) == (0 if killed_before == 3 else 1) and all(".box." in name for name in left)
    if killed_before == 2:
        contents = sorted(path.read_text() for path in tmp_path.rglob("content.bin"))
        assert contents == ["new", "old"]
    check_folder(target, BOX)
    assert (target / "content.bin").read_text() == ("old" if killed_before < 2 else "new")
    place(target, "newest")
    assert tree(tmp_path).keys() == {"box", "box/box.json", "box/content.bin"}


def test_scratch_folders_of_the_living_stay_and_so_do_other_results(tmp_path: Path) -> None:
    (tmp_path / ".box.v2.abcdefgh.partial").mkdir()
    (tmp_path / ".box.v2.abcdefgh.partial" / "lock").touch()
    (tmp_path / ".box.nolock.partial").mkdir()
    with scratch_beside(tmp_path / "box") as first:
        place(tmp_path / "box", "second")
        assert first.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"box", ".box.v2.abcdefgh.partial", ".box.nolock.partial"}


def test_files_and_folders_are_on_the_disk_before_they_are_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    def name(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    fsync, rename, replace = os.fsync, Path.rename, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(f"sync {name(fd)}"), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (log.append(f"rename {to.name}"), rename(self, to))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (log.append(f"rename {to.name}"), replace(self, to))[1])
    with atomic_folder(tmp_path / "box", BOX) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text("a")
        (folder / "box.json").write_text('{"kind": "box"}')
    assert log[-2:] == ["rename box", f"sync {tmp_path.name}"]
    assert {"sync a.txt", "sync box.json", "sync inner", "sync box"} <= set(log[:-2])
    log.clear()
    write_json(tmp_path / "a.json", {"kind": "a"})
    assert log[-2:] == ["rename a.json", f"sync {tmp_path.name}"] and log[0] == "sync a.json"


def test_a_disk_that_refuses_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"box: cannot be written \(.*\); check free space"), atomic_folder(
        tmp_path / "box", BOX
    ) as folder:
        (folder / "absent" / "x").write_text("")
    assert list(tmp_path.iterdir()) == []
    no_such = r"cannot be written \(No such file or directory at .*tokenizer\)"
    with pytest.raises(ArtefactError, match=no_such), atomic_folder(tmp_path / "box", BOX):
        (tmp_path / "tokenizer").read_text()


def test_a_mounted_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "box").mkdir()
    monkeypatch.setattr(outputs.Path, "is_mount", lambda self: self.name == "box")
    with pytest.raises(ArtefactError, match="a file system is mounted there; name a folder in it"):
        check_folder(tmp_path / "box", BOX)
