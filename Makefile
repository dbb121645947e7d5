# make demo   ask the embedded model about two pictures
# make test   every test but the drills
# make lint   formatter, linter, spelling, types
# make drill  the long tests
# make peers  measure beside mlx-vlm, mlx-lm and transformers; an hour on a quiet machine
# make serving  mm1 serve under load, and beside its peers' servers; the same
# make mac-proof  what only a Mac can say, as one file in benchmarks/results
# make page   check and build the web page from its sources; needs node and npm
# make api    write the HTTP API's manual from the code
# make swift  build and test MM1Kit against this checkout's mm1; apps/macos/linux-swift gets Swift
# make wheel  build wheel and sdist, install the wheel elsewhere and ask it
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PICTURES := mm1_mlx/tiny

.PHONY: demo test lint page api drill peers serving mac-proof swift wheel clean

demo: $(VENV)/demo
	@echo "Two pictures: $(CURDIR)/$(PICTURES)/red-star.png"
	@echo "              $(CURDIR)/$(PICTURES)/four-shapes.png"
	$(BIN)/mm1 generate -v -i $(PICTURES)/red-star.png -p "What colour is the star?"
	$(BIN)/mm1 generate -v -i $(PICTURES)/four-shapes.png -p "How many shapes are there?"
	$(BIN)/mm1 generate -v -i $(PICTURES)/four-shapes.png -p "Is there a purple heart?"
	$(BIN)/mm1 generate -v -i $(PICTURES)/four-shapes.png -p "Describe the picture."

# Two processes: each holds a few GB at its most.
test: $(VENV)/test
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

drill: $(VENV)/test
	$(BIN)/python -m pytest -m drill

api: $(VENV)/test
	$(BIN)/python -m mm1_mlx.apps.server.reference > apps/server/API.md

mac-proof: $(VENV)/test
	$(BIN)/python -m benchmarks.mac_proof

lint: $(VENV)/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	rm -rf build/types
	$(BIN)/python -m pip install --quiet --no-deps --target build/types .
	cd build && MYPYPATH=types ../$(BIN)/mypy -p mm1_mlx --config-file ../pyproject.toml

PAGE := apps/page
$(PAGE)/node_modules: $(PAGE)/package-lock.json
	cd $(PAGE) && npm ci --ignore-scripts --silent
	@touch $@

page: $(PAGE)/node_modules
	cd $(PAGE) && npm run --silent lint && npm run --silent build

swift: $(VENV)/test
	apps/macos/check

wheel: $(VENV)/test
	rm -rf dist build/wheel
	$(BIN)/python -m build --quiet
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet dist/*.whl
	cd build && wheel/bin/mm1 generate -v -p "What colour is the star?" \
	  -i wheel/lib/python*/site-packages/mm1_mlx/tiny/red-star.png

PEERS := build/peers
# The last transformers that mlx-vlm's LLaVA works with.
$(PEERS)/ready: pyproject.toml
	$(PYTHON) -m venv $(PEERS)/mm1
	$(PYTHON) -m venv $(PEERS)/vlm
	$(PEERS)/vlm/bin/python -m pip install --quiet \
	  "mlx-vlm==0.7.10" "mlx[cpu]==0.32.4" "mlx-lm==0.32.2" "transformers==5.14.0"
	@touch $@

peers: $(VENV)/test $(PEERS)/ready
	$(PEERS)/mm1/bin/python -m pip install --quiet --force-reinstall --no-deps .
	$(PEERS)/mm1/bin/python -m pip install --quiet .
	$(BIN)/python -m benchmarks.peers.compare benchmarks/results/peers-cpu.json \
	  --folder $(PEERS)/models --mm1 $(PEERS)/mm1/bin/python \
	  --vlm $(PEERS)/vlm/bin/python --torch $(CURDIR)/$(BIN)/python
	$(BIN)/python -m benchmarks.peers.conversion benchmarks/results/conversion-cpu.json \
	  --folder $(PEERS)/models --mm1 $(PEERS)/mm1/bin/python \
	  --vlm $(PEERS)/vlm/bin/python

serving: $(VENV)/test $(PEERS)/ready
	$(BIN)/python -m benchmarks.serving load benchmarks/results/serving-cpu.json
	$(BIN)/python -m benchmarks.serving speed benchmarks/results/serving-cpu.json \
	  --mlx-lm $(PEERS)/vlm/bin/python --mlx-vlm $(PEERS)/vlm/bin/python

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "mm1-mlx needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@
