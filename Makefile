# Every target sets up what it needs in .venv first; with nothing changed that takes no time.
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
EXE := .exe
else
BIN := .venv/bin
EXE :=
endif
# With busy cores, torch's threads otherwise spin against each other.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test check format clean environment full-environment static

demo: environment
	$(BIN)/python -m benchmarks.demo

test: full-environment static  ## everything, with ComfyUI and a browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: environment static  ## what needs no ComfyUI
	$(BIN)/python -m pytest -m "not comfyui and not server and not browser and not gpu"

static: environment
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python$(EXE)  # without ComfyUI's modules, and with them
	PYTHONPATH="$$($(PYTHON) tools/setup_env.py --where)" $(BIN)/basedpyright --pythonpath $(BIN)/python$(EXE)

format: environment
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	$(PYTHON) -c "import shutil; [shutil.rmtree(d, True) for d in '.venv build dist .pytest_cache .ruff_cache .hypothesis comfyui_perfusion.egg-info'.split()]"

environment:
	$(PYTHON) tools/setup_env.py

full-environment: environment
	$(PYTHON) tools/setup_env.py --comfyui
