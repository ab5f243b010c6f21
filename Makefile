# Every target only calls bootstrap.py. Arguments: make test ARGS="-k layer_norm"
PYTHON ?= python3
ARGS ?=

.PHONY: help demo test test-slow bench kernels mutants gpu

help:
	@$(PYTHON) bootstrap.py --help

demo test bench kernels mutants gpu:
	@$(PYTHON) bootstrap.py $@ $(ARGS)

test-slow:
	@$(PYTHON) bootstrap.py test --slow $(ARGS)
