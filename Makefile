# Every target only calls bootstrap.py. Arguments: make test ARGS="-k layer_norm"
PYTHON ?= python3
ARGS ?=

.PHONY: help demo demo-unival demo-mico test test-all bench docs kernels mutants rehearse gpu

help:
	@$(PYTHON) bootstrap.py --help

demo demo-unival demo-mico test test-all bench docs kernels mutants gpu:
	@$(PYTHON) bootstrap.py $@ $(ARGS)

# make rehearse VERSIONS=2.11, or VERSIONS=oldest
rehearse:
	@$(PYTHON) bootstrap.py $@ $(if $(VERSIONS),--versions $(VERSIONS)) $(ARGS)
