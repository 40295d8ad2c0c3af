"""The backends: cuda (CUDA C++), native (C++ on CPU), reference (plain torch), and the choice."""

from score_kernels.backends.registry import Backend, backends, choose, use_backend

__all__ = ["Backend", "backends", "choose", "use_backend"]
