import errno
import os
import resource
import signal

import pytest

from trimtab.errors import OutputError
from trimtab.evaluation.files import check_writable, write_all


def test_files_are_written_into_a_new_folder(tmp_path):
    paths = write_all(tmp_path / "a" / "b", {"x.txt": b"one", "y.txt": b"two"})
    assert [p.read_bytes() for p in paths] == [b"one", b"two"]
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["x.txt", "y.txt"]


def test_a_full_disk_leaves_the_old_files_whole(tmp_path, monkeypatch):
    write_all(tmp_path, {"x.txt": b"old", "y.txt": b"old"})
    real, flushed = os.fsync, []

    def full_on_the_second(descriptor):
        flushed.append(descriptor)
        if len(flushed) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_on_the_second)
    with pytest.raises(OutputError, match="no space left on device; free some space") as caught:
        write_all(tmp_path, {"x.txt": b"new", "y.txt": b"new"})
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x.txt": b"old", "y.txt": b"old"}


def test_the_systems_own_limit_on_file_size_is_met_alike(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(OutputError, match="file too large"):
            write_all(tmp_path, {"small.txt": b"ok", "large.txt": b"x" * 50_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_folders_place_is_a_clear_error(tmp_path):
    (tmp_path / "report").write_text("I am a file")
    with pytest.raises(OutputError, match="cannot write to the folder"):
        check_writable(tmp_path / "report")
    assert (tmp_path / "report").read_text() == "I am a file"


def test_checking_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_without_permission_is_refused(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permission denied"):
        check_writable(tmp_path)
