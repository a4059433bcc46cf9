"""ARPO for TRL: `from arpo_trl import ARPOConfig, ARPOTrainer`."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

__version__ = "0.1.0"

try:
    _trl = tuple(int(part) for part in version("trl").split(".")[:2])
except PackageNotFoundError:
    raise ImportError(
        "arpo_trl needs TRL 1.15 or 1.16, and none is installed: pip install 'trl>=1.15,<1.17'"
    ) from None
if not (1, 15) <= _trl < (1, 17):
    raise ImportError(
        f"arpo_trl supports TRL 1.15 and 1.16, and {version('trl')} is installed: pip install 'trl>=1.15,<1.17'"
    )

if TYPE_CHECKING:
    from .config import ARPOConfig
    from .trainer import ARPOTrainer

# Imported when first used, as TRL does, so that `import arpo_trl` stays quick
_HOMES = {"ARPOConfig": ".config", "ARPOTrainer": ".trainer"}

__all__ = ["ARPOConfig", "ARPOTrainer"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
