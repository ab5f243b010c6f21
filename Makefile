# Every target only calls bootstrap.py. Arguments: make test ARGS="-k layer_norm"
PYTHON ?= python3
ARGS ?=

.PHONY: help demo test test-slow bench gpu

help:
	@$(PYTHON) bootstrap.py --help

demo test bench gpu:
	@$(PYTHON) bootstrap.py $@ $(ARGS)

test-slow:
	@$(PYTHON) bootstrap.py test --slow $(ARGS)
