"""Atomic writes of files and folders, and safetensors files written one tensor at a time (:mod:`.tensor_file`)."""

from leap_pl.files.atomic import (
    atomic_file,
    atomic_folder,
    atomic_link,
    check_folder,
    check_writable,
    flush,
    followed,
    remove_abandoned,
)

__all__ = [
    "atomic_file",
    "atomic_folder",
    "atomic_link",
    "check_folder",
    "check_writable",
    "flush",
    "followed",
    "remove_abandoned",
]
