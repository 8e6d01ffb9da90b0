"""Outputs are checked before long work, and what is no plain file or folder is not replaced."""

import os

import pytest
import tiny
from tokenizers import Tokenizer
from transformers import BertModel

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.files import check_file, check_new_folder, write_text


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == os.fspath(tmp_path / "volume"))
    (tmp_path / "volume").mkdir()
    with pytest.raises(FileExistsError, match="volume' is a mount point; name a new folder in it"):
        check_new_folder(tmp_path / "volume")
    assert check_new_folder(tmp_path / "volume" / "student") == tmp_path / "volume" / "student"


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="pipe' is no regular file"):
        check_file(tmp_path / "pipe")


def test_a_link_stays_and_its_target_is_written(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_text(check_file(link), "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


@pytest.mark.parametrize("own", [None, {"max_length": 20}])
def test_a_tokenizer_is_saved_as_it_came(own, tmp_path):
    source = tmp_path / "teacher"
    tiny.teacher(BertModel).save_pretrained(source)
    tokenizer = tiny.bert_tokenizer(source)
    if own is not None:
        tokenizer.backend_tokenizer.enable_truncation(**own)
        tokenizer.backend_tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    tokenizer.save_pretrained(source)
    kept = Tokenizer.from_file(str(source / "tokenizer.json"))
    result = compress(source, "7.7x", calibration=[tiny.TEXT] * 40)
    saved = Tokenizer.from_file(str(result.save_pretrained(tmp_path / "student") / "tokenizer.json"))
    assert (saved.truncation, saved.padding) == (kept.truncation, kept.padding)
    assert saved.encode(4 * tiny.TEXT).ids == kept.encode(4 * tiny.TEXT).ids
