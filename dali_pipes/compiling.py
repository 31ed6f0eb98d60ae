"""Compile functions with numba and keep their machine code, where there is a place for it."""

# numba's types describe Python's side of compiled functions, not the functions.
# pyright: reportArgumentType=false, reportCallIssue=false

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import cgutils, sigutils
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from dfer import images
from dfer.cli import say_once
from dfer.files import reason
from dfer.lists import hashes

_INSTEAD = "it is compiled at each start, which takes a while; NUMBA_CACHE_DIR can name another folder"


def njit(**options: Any) -> Callable[[Callable], Any]:
    """Return a decorator: numba.njit with a cache that costs nothing but time where it fails."""

    def compile_(function: Callable) -> Any:
        dispatcher: Any = numba.njit(**options)(function)
        dispatcher._cache = _Cache(function)
        return dispatcher

    return compile_


def cfunc(signature: Any) -> Callable[[Callable], Any]:
    """Return a decorator: numba.cfunc with the same cache."""

    def compile_(function: Callable) -> Any:
        callback: Any = CFunc(function, sigutils.normalize_signature(signature), locals={}, options={})
        callback._cache = _Cache(function)
        callback.compile()
        return callback

    return compile_


@intrinsic
def pointer(typingctx, address):
    """Return the pointer to an address, which is an int64. In compiled code only."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return numba.types.voidptr(numba.types.int64), codegen


@functools.cache
def _sources() -> str:
    """Return what tells this version of the compiled functions of this folder from others, with others' constants."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(images.__file__), Path(hashes.__file__)]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


class _Function(FunctionCache):
    """Numba's cache of a function, which knows that it calls others.

    Numba looks at the function's own file alone, and would take machine code in which another one's is that of before.
    """

    def __init__(self, function: Callable):
        super().__init__(function)
        own, base = self._impl.locator.get_source_stamp(), self._impl.filename_base
        self._cache_file = IndexDataCacheFile(self._cache_path, base, (own, _sources()))


class _Cache(NullCache):
    """Numba's cache of a function, for machines where it cannot be written or read.

    Numba itself raises where neither the source's folder nor the home can be written (images of containers), for a full
    disk, and for files that belong to another user or were cut short.
    """

    def __init__(self, function: Callable):
        try:
            self._cache: FunctionCache | None = _Function(function)
        except (RuntimeError, OSError):  # numba's "no locator available"
            self._cache = None

    @property
    def cache_path(self) -> str | None:
        """Return the folder of its files."""
        return None if self._cache is None else self._cache.cache_path

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return what was compiled for these types before; None if it has to be compiled."""
        if self._cache is None:
            say_once(f"there is no folder to keep machine code in: {_INSTEAD}")
            return None
        try:
            return self._cache.load_overload(sig, target_context)
        except Exception as error:  # the files are pickles: damage is of any kind
            say_once(f"machine code in {self.cache_path} cannot be read ({reason(error)}): {_INSTEAD}")
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled."""
        if self._cache is None:
            return
        try:
            self._cache.save_overload(sig, data)
        except Exception as error:  # of the disk, or of an index that was there and is damaged
            say_once(f"machine code cannot be kept in {self.cache_path} ({reason(error)}): {_INSTEAD}")
