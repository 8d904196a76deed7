"""The guides shipped with pvae: one per file, written exactly as a user's own file would be.

``pvae.guides.auto(model, example_batch)`` derives one from the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ == "guides":  # imported from the repository root by mistake
    raise ImportError("import pvae.guides, not guides: two copies would not share classes")

if TYPE_CHECKING:
    from pvae.guides.derived import Auto as auto  # noqa: F401


def __getattr__(name: str) -> Any:
    if name == "auto":
        from pvae.guides.derived import Auto

        return Auto
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
