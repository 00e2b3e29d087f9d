"""The errors of the store.

StoreError         the file cannot be used at all, or what was asked of it makes no sense
├── Unavailable    not now: locked, full, failing, closed; nothing was changed, try again
├── NotFound       there is nothing of that name
├── Conflict       that name is taken
└── Invalid        a value that is never right
"""

from __future__ import annotations

from gproxyd.errors import GproxydError


class StoreError(GproxydError):
    """The root of what the store raises on purpose."""


class Unavailable(StoreError):
    """The database refuses for now; the transaction left no trace."""


class NotFound(StoreError):
    """Nothing of that name is there."""


class Conflict(StoreError):
    """Something of that name, or with that key, is there already."""


class Invalid(StoreError):
    """The value can never be stored or looked up: an empty name, a broken cursor."""
