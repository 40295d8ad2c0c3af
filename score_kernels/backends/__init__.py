"""The backends, and the choice between them."""

from score_kernels.backends.registry import Backend, backends, choose, use_backend

__all__ = ["Backend", "backends", "choose", "use_backend"]
