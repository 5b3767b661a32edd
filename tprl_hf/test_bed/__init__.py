"""The recipe of the embedded LVLM, `python -m tprl_hf.test_bed.train`: not needed to use the package."""
