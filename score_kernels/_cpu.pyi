def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def openmp_threads() -> int: ...
def fill(
    out: int,
    rows: int,
    elements: int,
    kind: int,
    seed: int,
    purpose: int,
    draw: int,
    first_sample: int,
) -> None: ...
def affine_step(
    out: int,
    x: int,
    score: int,
    score_dtype: int,
    rows: int,
    elements: int,
    a: float,
    b: float,
    c: float,
    seed: int,
    purpose: int,
    draw: int,
    first_sample: int,
) -> None: ...
def perturb(
    out: int,
    x: int,
    sigma: int,
    rows: int,
    elements: int,
    seed: int,
    purpose: int,
    draw: int,
    first_sample: int,
) -> None: ...
def dsm(
    loss: int,
    gradient: int,
    score: int,
    score_dtype: int,
    sigma: int,
    weight: int,
    upstream: int,
    rows: int,
    elements: int,
    seed: int,
    purpose: int,
    draw: int,
    first_sample: int,
) -> None: ...
def probe(
    out: int,
    kind: int,
    a: int,
    b: int,
    dtype: int,
    differences: bool,
    factor: int,
    x: int,
    rows: int,
    elements: int,
    seed: int,
    purpose: int,
    draw: int,
    first_sample: int,
) -> None: ...
