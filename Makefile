# Short names for dev.py, which does the work.
.PHONY: setup demo test format coverage counts api test-app test-lmms test-processors test-vllm clean

setup demo test format:
	python3 dev.py $@

# All tests, and which lines and branches of the package they reach; less than 95 % fails.
coverage:
	python3 dev.py test --cov

counts:
	.venv/bin/python tests/counts.py

# the API reference, from the docstrings, as static pages
api: setup
	.venv/bin/python docs/make_api.py build/api

# lmms-eval pulls a torchvision that breaks torch's CPU build, hence an environment of its own, without torchvision.
LMMS = .venv-lmms/bin/python

test-lmms: .venv-lmms/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LMMS) -m pytest -q tests/evaluation/test_lmms_eval.py

.venv-lmms/installed: setup.py constraints.txt
	python3 -m venv .venv-lmms
	$(LMMS) -m pip install --quiet -e ".[lmms,eval]" pytest -c constraints.txt
	$(LMMS) -m pip uninstall --quiet --yes torchvision
	touch $@

# gradio wants pillow below 13, hence an environment of its own. The browser is the one that the system has.
APP = .venv-app/bin/python

test-app: .venv-app/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(APP) -m pytest -q tests/app

.venv-app/installed: setup.py constraints.txt
	python3 -m venv .venv-app
	grep -v '^pillow' constraints.txt > .venv-app/constraints.txt
	$(APP) -m pip install --quiet -e ".[demo]" playwright pytest -c .venv-app/constraints.txt
	touch $@

# torchvision must be of the same build as torch, which the pins cannot promise: the newest pair of one index.
PROCESSORS = .venv-processors/bin/python

test-processors: .venv-processors/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PROCESSORS) -m pytest -q tests/test_processors.py tests/serving/test_own_processors.py tests/evaluation/test_smaller_pictures.py \
		tests/hub/test_your_model.py tests/test_videos.py tests/test_visualization.py tests/app/test_layouts.py tests/app/test_videos.py

.venv-processors/installed: setup.py constraints.txt
	python3 -m venv .venv-processors
	grep -v '^torch' constraints.txt > .venv-processors/constraints.txt
	$(PROCESSORS) -m pip install --quiet -e ".[dev,processors]" -c .venv-processors/constraints.txt
	touch $@

# vLLM wants other releases of what we pin, hence an environment of its own: 3.7 GB, one engine at a time.
VLLM = .venv-vllm/bin/python

test-vllm: .venv-vllm/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VLLM) -m pytest -q tests/serving/vllm

.venv-vllm/installed: setup.py constraints.txt tests/serving/vllm/install.py
	python3 -m venv .venv-vllm
	$(VLLM) tests/serving/vllm/install.py
	touch $@

clean:
	rm -rf .venv .venv-app .venv-floors .venv-lmms .venv-newest .venv-processors .venv-vllm build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
