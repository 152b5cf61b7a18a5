# Two commands on a fresh machine: `make demo` and `make test`. Both first create .venv and build the ROS workspace.
PYTHON ?= python3
SOURCES := calibrator engine_build evaluation demo tools benchmarks ros2_ws/src/vla_policy/vla_policy

.PHONY: help build demo test lint types unit clean

help:
	@echo "make demo   install, build, then bag -> calibration -> plan -> engine -> ROS 2 node -> report (DEMO_ARGS=...)"
	@echo "make test   install, build, then lint, types and all tests (TEST_ARGS=...)"
	@echo "make build  only install and build;  make lint | types | unit  one part of the tests"
	@echo "make clean  remove what the above made;  PYTHON=python3.12 names the interpreter"

build:
	@$(PYTHON) tools/bootstrap.py

demo: build
	@tools/with_ros python -m demo.pipeline $(DEMO_ARGS)

test: lint types unit

lint: build
	.venv/bin/ruff check .

types: build
	.venv/bin/mypy $(SOURCES)
	.venv/bin/mypy --python-version 3.10 ros2_ws/src/vla_policy/vla_policy # Ubuntu 22.04's

unit: build
	tools/with_ros python -m pytest $(TEST_ARGS)

clean:
	rm -rf .venv ros2_ws/build ros2_ws/install ros2_ws/log demo/out .mypy_cache .pytest_cache .ruff_cache *.egg-info
