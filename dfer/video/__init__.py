"""Any video: the right frames, upright and in their true colours."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfer.video.random_access import read_frames

__all__ = ["read_frames"]


def __getattr__(name: str) -> object:
    """Import `read_frames` when it is asked for: PyAV takes 0.3 s to load, and not every module here needs it."""
    if name == "read_frames":
        from dfer.video.random_access import read_frames

        return read_frames
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
