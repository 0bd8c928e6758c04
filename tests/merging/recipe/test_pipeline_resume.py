"""Interrupted merges by a recipe, and their resumption."""

import errno
import os
import resource

import numpy as np
import pytest
from small_models import SHAPES, TASK_ARITHMETIC, Stopped, read, write

from sdjax.core.errors import UserError
from sdjax.merging.recipe.pipeline import merge_recipe


def test_interrupted_merge_resumes(tmp_path, models):
    recipe = write(tmp_path, TASK_ARITHMETIC)
    uninterrupted = merge_recipe(recipe, tmp_path / "whole")

    def stop(done, total):
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        merge_recipe(recipe, tmp_path / "out", on_tensor=stop)
    assert not (tmp_path / "out").exists()
    again = []
    written = merge_recipe(recipe, tmp_path / "out", on_tensor=lambda *x: again.append(x))
    assert written.resumed >= 3
    assert again == [(done, 5) for done in range(written.resumed, 6)]
    assert (uninterrupted.tensors, uninterrupted.resumed) == (5, 0)
    assert uninterrupted.bytes == written.bytes
    one, other = read(tmp_path / "whole"), read(tmp_path / "out")
    assert all(np.array_equal(one[name], other[name]) for name in SHAPES)


def test_full_disk_raises_user_error_and_the_merge_resumes(tmp_path, models):
    recipe = write(tmp_path, TASK_ARITHMETIC)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
    try:
        with pytest.raises(UserError, match="out: the file is too large for the file system"):
            merge_recipe(recipe, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / ".out.partial").exists()
    assert merge_recipe(recipe, tmp_path / "out").tensors == 5


def test_unreadable_weights_keep_the_written_tensors(tmp_path, models, monkeypatch):
    def raise_io_error(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    def stop(done, total):
        if done:
            monkeypatch.setattr(os, "preadv", raise_io_error)

    monkeypatch.setattr("sdjax.merging.recipe.pipeline.QUEUE_SIZE", 0)
    recipe = write(tmp_path, TASK_ARITHMETIC)
    with pytest.raises(UserError, match=r"the tensor 'model.* cannot be read \(Input/output"):
        merge_recipe(recipe, tmp_path / "out", on_tensor=stop)
    monkeypatch.undo()
    assert merge_recipe(recipe, tmp_path / "out").resumed >= 1


def test_different_recipe_is_not_resumed(tmp_path, models):
    def stop(done, total):
        if done:
            raise Stopped

    with pytest.raises(Stopped):
        merge_recipe(write(tmp_path, TASK_ARITHMETIC), tmp_path / "out", on_tensor=stop)
    other = write(tmp_path, TASK_ARITHMETIC.replace("lambda: 2.0", "lambda: 1.0"))
    assert merge_recipe(other, tmp_path / "out").resumed == 0


@pytest.mark.parametrize("file", ["merges.txt", "chat_template.jinja", "tokenizer.model"])
def test_merge_with_a_changed_asset_is_not_resumed(tmp_path, models, file):
    def stop(done, total):
        if done:
            raise Stopped

    (tmp_path / "base" / file).write_text("before")
    recipe = write(tmp_path, TASK_ARITHMETIC)
    with pytest.raises(Stopped):
        merge_recipe(recipe, tmp_path / "out", on_tensor=stop)
    (tmp_path / "base" / file).unlink()
    assert merge_recipe(recipe, tmp_path / "out").resumed == 0
    assert not (tmp_path / "out" / file).exists()
