# Every target works in a fresh clone; `install` makes .venv once.
PYTHON ?= python3
BIN := .venv/bin
PARALLEL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadgroup
PYTEST = FFMERGE_OPTIMUM=required FFMERGE_DEVICE=required FFMERGE_OPENVINO=required $(PARALLEL)

NODE_MODULES := examples/web/node_modules/.package-lock.json

.PHONY: install install-optimum install-device demo web test test-fast test-web test-webgpu slow check lint types wheel release-check docs clean

install: .venv/installed

# PyTorch first and by version: a plain `torch` would bring gigabytes of CUDA packages.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip -c constraints.txt
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[torch,webgpu,openvino]' --group dev
	touch $@

# The second environment: optimum-onnx and transformers 4.57, for the tests that go through it.
install-optimum: .venv-optimum/installed

.venv-optimum/installed: pyproject.toml constraints-optimum.txt
	$(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/pip install -q --upgrade pip -c constraints.txt
	.venv-optimum/bin/pip install -q torch==2.13.0
	.venv-optimum/bin/pip install -q -c constraints-optimum.txt -e '.[optimum-onnx]' pytest hypothesis
	touch $@

# The third one: what a device has, no torch.
install-device: .venv-device/installed

.venv-device/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-device
	.venv-device/bin/pip install -q --upgrade pip -c constraints.txt
	.venv-device/bin/pip install -q -c constraints.txt -e .
	touch $@

demo: install
	rm -rf build/demo
	$(BIN)/ffmerge demo --out build/demo

# The demo's packages in your own browser: open the address it prints.
web: install $(NODE_MODULES)
	test -d build/demo || $(BIN)/ffmerge demo --out build/demo
	$(BIN)/python examples/web/serve.py --packages build/demo

# Scripts of packages do not run: one of them downloads what nothing here needs.
$(NODE_MODULES): examples/web/package-lock.json
	cd examples/web && npm ci --ignore-scripts
	touch $@

test: install install-optimum install-device
	$(PYTEST) -m "not slow and not web and not webgpu"

# At most 2 minutes on two cores, and only the first environment: what tests/conftest.py does not
# list as heavy.
test-fast: install
	$(PARALLEL) -m "not slow and not web and not webgpu and not heavy"

# Says so and passes where there is no browser or no npm; with FFMERGE_WEB=required it fails.
test-web: install
	if command -v npm; then $(MAKE) $(NODE_MODULES); fi
	$(PYTEST) -m web tests/test_web.py tests/test_runtime_web.py tests/test_report_page.py

# As test-web, with FFMERGE_WEBGPU=required. Needs no browser, but two files of Debian's.
test-webgpu: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m webgpu

slow: install install-optimum install-device
	$(PYTEST) -m slow

check: lint types wheel

# The pages of docs as a site in build/site; a link that leads nowhere is an error.
docs:
	test -d .venv-docs || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install -q mkdocs-material==9.8.2
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

# The built package is what is checked: it is what users get.
types: install
	rm -rf .built build/lib build/bdist.*
	$(BIN)/pip install -q --no-deps --target .built .
	MYPYPATH=.built $(BIN)/mypy -p ffmerge

wheel: install
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --wheel -q
	$(BIN)/check-wheel-contents dist/*.whl

# sdist and wheel, installed and used outside of here on every Python from 3.11 on that is there;
# TORCH=--torch also with the extra torch, 2 GB each.
release-check: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/release_check.py $(TORCH)

clean:
	rm -rf .venv .venv-optimum .venv-device .built build dist *.egg-info
