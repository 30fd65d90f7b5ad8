"""Imports without the garbage collector."""

import gc

import pytest

from minigpt_ray.imports import without_collection


def test_garbage_is_not_looked_for_inside_and_is_afterwards_even_if_an_import_fails() -> None:
    before = gc.get_freeze_count()
    with pytest.raises(ImportError), without_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > before
    gc.unfreeze()
