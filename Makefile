# Short names for dev.py, which does the work.
.PHONY: setup demo test format test-lmms clean

setup demo test format:
	python3 dev.py $@

# lmms-eval pulls a torchvision that breaks torch's CPU build, hence an environment of its own, without torchvision.
LMMS = .venv-lmms/bin/python

test-lmms: .venv-lmms/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LMMS) -m pytest -q tests/evaluation/test_lmms_eval.py

.venv-lmms/installed: setup.py constraints.txt
	python3 -m venv .venv-lmms
	$(LMMS) -m pip install --quiet -e ".[lmms,eval]" pytest -c constraints.txt
	$(LMMS) -m pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf .venv .venv-lmms build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
