"""The backends, and the choice between them."""

from score_kernels.backends.registry import Backend, backends, choose, set_backend, use_backend

__all__ = ["Backend", "backends", "choose", "set_backend", "use_backend"]
