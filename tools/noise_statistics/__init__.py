"""Is the noise normal and independent, at a thousand million numbers? See docs/noise-statistics.md.

    python -m tools.noise_statistics                 a minute: 10^8 normals
    python -m tools.noise_statistics --count 1e9     the whole of it
    python -m tools.noise_statistics words | dieharder -g 200 -a

Needs SciPy.
"""
