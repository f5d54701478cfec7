# One command each: the demo, the tests, the linter. The first of them makes .venv and installs what it needs.
#   make demo        text to table and picture, about ten minutes on two cores
#   make demo-short  the same path on a tenth of the text, about two minutes
#   make test        all tests but the slow ones;  make test-slow  the slow ones
#   make test-without-numba    those that reach compiled loops, on the array code that stands in for them
#   make test-without-avx512   the same, on loops compiled for the plainest processor of this kind
#   make lint        ruff and mypy
#   make clean       remove .venv, caches and what the demo wrote
# A GPU build of faiss instead of the CPU one:  make demo EXTRAS=gpu,fast,plot,text,hf,dev

EXTRAS ?= cpu,fast,plot,text,hf,dev
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

VENV := .venv
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: demo demo-short test test-slow test-without-numba test-without-avx512 lint clean

demo: $(STAMP)
	VENV=$(VENV) examples/retomaton/demo.sh

demo-short: $(STAMP)
	VENV=$(VENV) examples/retomaton/demo.sh --short

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest -m slow

# The tests in which every compiled loop has array code beside it, on small data; the whole suite, twice more, would take
# .ci/run beyond what it may (20 minutes on two cores). For more:  make test-without-numba LOOPS="tests/retrieval ..."
LOOPS ?= tests/test_knnlm.py tests/retrieval/test_voting.py tests/retrieval/retrievers \
	tests/test_against_sequential_reference.py

# A module that refuses to be imported hides numba, in processes that tests start too: as if it were not installed.
test-without-numba: $(STAMP)
	PYTHONPATH=.ci/without-numba $(VENV)/bin/python -m pytest -n 2 --dist loadfile $(LOOPS)

# Numba's own settings, rather than FAIRSEQ_INT8=0, which would turn off int8 search but leave the compiler free to use
# AVX-512 wherever it likes. "generic" is the least that every processor has (of x86-64, SSE2), so that no instruction
# asked for by name is used either: not AVX-512's, not AVX2's, not the reading of float16.
test-without-avx512: $(STAMP)
	NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES= $(VENV)/bin/python -m pytest -n 2 --dist loadfile $(LOOPS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info demo-run demo-run-short .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.py pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Makefile: no Python 3.11 or newer found (tried: $(or $(PYTHON),python3.11 python3)); install one, or name it with PYTHON=/path/to/python." >&2; exit 2; }
	$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
