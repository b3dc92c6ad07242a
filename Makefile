# Each target does its own set-up in .venv, once. It needs Python 3.11 or newer with pip, and a package index.
# Another Python: make demo PYTHON=python3.12
.POSIX:
PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
TORCH = 2.13.0
TORCH_INDEX = https://download.pytorch.org/whl/cpu

export OMP_NUM_THREADS = 1
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1

.PHONY: demo test lint stubs screenshots clean

demo: $(VENV)/simulation.stamp
	$(BIN)/python -m pocketfed.cli demo

# A file's tests stay together: they share what is built for them.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	rm -rf build/lib build/types
	$(PIP) install -q --no-deps --no-build-isolation --target build/types --upgrade .
	MYPYPATH=build/types $(BIN)/mypy -p pocketfed

stubs: $(VENV)/dev.stamp
	mkdir -p build/stubs
	$(BIN)/python -m grpc_tools.protoc -Ipocketfed/protos=protos \
		--python_out=build/stubs --pyi_out=build/stubs --grpc_python_out=build/stubs protos/*.proto
	cp build/stubs/pocketfed/protos/*_pb2* protos/

# Every page of the dashboard, light and dark, on a made-up fleet.
screenshots: $(VENV)/dev.stamp
	$(BIN)/python docs/screenshot.py --all --out docs/dashboard

clean:
	rm -rf $(VENV) build *.egg-info demo

# Debian without python3-venv has no ensurepip: pip is then put into the environment by the pip there is.
$(VENV)/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is missing or older than 3.11; install Python 3.11 or name one: make PYTHON=python3.12"; exit 1; }
	@echo "setting up $(VENV), once; this takes a few minutes ..."
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install -q pip; } || { \
		echo "$(PYTHON) cannot make a virtual environment; install its venv module (Debian: apt install python3-venv)"; \
		exit 1; }
	@$(PIP) install -q 'setuptools>=77'
	@touch $@

# The plain wheel of PyPI is torch for the CPU on a Mac and brings gigabytes of CUDA on Linux: there the CPU's is tried
# first, from the index that pip is configured with, then from torch's own, which may be out of reach.
$(VENV)/torch.stamp: $(VENV)/made.stamp
	@echo "installing torch $(TORCH) ..."
	@[ "`uname`" = Linux ] && $(PIP) install -q 'torch==$(TORCH)+cpu' 2>/dev/null \
		|| { [ "`uname`" = Linux ] && $(PIP) install -q --no-deps --retries 0 --timeout 10 --extra-index-url $(TORCH_INDEX) \
			'torch==$(TORCH)+cpu' 2>/dev/null && $(PIP) install -q 'torch==$(TORCH)'; } \
		|| $(PIP) install -q 'torch==$(TORCH)'
	@touch $@

$(VENV)/simulation.stamp: pyproject.toml $(VENV)/torch.stamp
	@echo "installing pocketfed ..."
	@$(PIP) install -q -e '.[simulation]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml $(VENV)/torch.stamp
	@echo "installing pocketfed and what its tests need ..."
	@$(PIP) install -q -e '.[dev]'
	@touch $@
