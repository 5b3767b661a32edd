# Short names for dev.py, which does the work.
.PHONY: setup demo test format counts test-lmms test-processors clean

setup demo test format:
	python3 dev.py $@

counts:
	.venv/bin/python tests/counts.py

# lmms-eval pulls a torchvision that breaks torch's CPU build, hence an environment of its own, without torchvision.
LMMS = .venv-lmms/bin/python

test-lmms: .venv-lmms/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LMMS) -m pytest -q tests/evaluation/test_lmms_eval.py

.venv-lmms/installed: setup.py constraints.txt
	python3 -m venv .venv-lmms
	$(LMMS) -m pip install --quiet -e ".[lmms,eval]" pytest -c constraints.txt
	$(LMMS) -m pip uninstall --quiet --yes torchvision
	touch $@

# torchvision must be of the same build as torch, which the pins cannot promise: the newest pair of one index.
PROCESSORS = .venv-processors/bin/python

test-processors: .venv-processors/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PROCESSORS) -m pytest -q tests/test_processors.py tests/serving/test_own_processors.py \
		tests/hub/test_your_model.py

.venv-processors/installed: setup.py constraints.txt
	python3 -m venv .venv-processors
	grep -v '^torch' constraints.txt > .venv-processors/constraints.txt
	$(PROCESSORS) -m pip install --quiet -e ".[dev,processors]" -c .venv-processors/constraints.txt
	touch $@

clean:
	rm -rf .venv .venv-lmms .venv-processors build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
