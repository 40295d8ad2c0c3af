# make demo    train on real digits, sample new ones, write a report to demo-output/
# make test    lint, types, tests
# make bench   every op and chain against eager and compiled PyTorch, to bench/
# make stats   a billion normals through statistical tests (five minutes)
# make mutants change the code in small ways, and see whether the tests notice (an hour)
# make stubs   the types of the compiled modules, from the modules
# make docs    the documentation as a site, in site/
# make format  Python and C++ in the project's style
# Each makes .venv by itself when it is missing. PYTHON names the interpreter it is made with.

PYTHON ?= python3
BIN := .venv/bin
EXTRAS := demo,test

CXX_FILES = $(shell git ls-files "*.h" "*.cpp" "*.cu")

.PHONY: demo test lint bench stats mutants stubs docs format clean

demo: .venv/ready
	$(BIN)/python -m examples.digits --out demo-output

# Two processes on two cores: an OpenMP thread that waits must not spin on the other one's core.
test: export OMP_WAIT_POLICY = passive
test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/interpreter

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

stats: .venv/ready
	$(BIN)/python -m tools.noise_statistics --count 1e9

mutants: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt cosmic-ray
	$(BIN)/python -m tools.mutants
	$(BIN)/python -m tools.mutants --options

stubs: .venv/ready
	$(BIN)/stubgen --quiet --inspect-mode -m score_kernels._cpu -m score_kernels._cuda -o .
	$(BIN)/ruff format --quiet score_kernels/_cpu.pyi score_kernels/_cuda.pyi

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/ready
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks small

# Made anew when what is installed may have changed; the kernels are compiled here.
.venv/ready: pyproject.toml constraints.txt setup.py $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf .venv build *.egg-info score_kernels/*.so score_kernels/headers
