# Short names for dev.py, which does the work.
.PHONY: setup demo test format clean

setup demo test format:
	python3 dev.py $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
