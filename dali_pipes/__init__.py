"""The loader, the only place where DALI is imported: `from dali_pipes.loader import ClipLoader`."""

import dfer  # noqa: F401 (before torch)
