# Two commands do everything: `make demo` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
# The last CPU build that needs no extra index on a plain machine; any torch >= 2.4 works.
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin
APT := $(if $(filter 0,$(shell id -u)),apt-get,sudo apt-get)
JOBS ?= $(shell nproc)

# Environments of real engines, one each: they pin what the others can't have.
ENGINES := .engines

.PHONY: demo test test-cpp test-python test-vllm test-engines rdma lint format system-demo system-test system-rdma clean

demo: $(VENV)/demo.stamp
	$(RUN)/dualkv demo --topology 1P1D,1P2D --html dualkv-demo.html

test: lint test-python test-vllm test-cpp rdma
	@echo "all tests passed"

# liburing makes storage reads fast; without root and without it, the build says so and goes on.
system-demo:
	@command -v c++ >/dev/null && test -e /usr/include/liburing.h && \
	  $(PYTHON) -c 'import ensurepip, os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || \
	  ($(APT) update -qq && $(APT) install -y -qq g++ liburing-dev python3-venv python3-dev >/dev/null) || \
	  echo "could not install system packages; going on without (see README.md, Install)"

system-test: system-demo
	@test -e /usr/include/gtest/gtest.h && command -v cmake >/dev/null && command -v ninja >/dev/null && \
	  command -v tc >/dev/null || \
	  ($(APT) update -qq && $(APT) install -y -qq libgtest-dev cmake ninja-build iproute2 >/dev/null)

$(VENV)/bin/python: | system-demo
	$(PYTHON) -m venv $(VENV)

sources := $(shell find src bindings cpp include third_party CMakeLists.txt pyproject.toml -type f -not -name '*.pyc')

$(VENV)/demo.stamp: build/wheel/done | system-demo
	$(RUN)/pip install -q "$(TORCH)"
	$(RUN)/pip install -q --force-reinstall --no-deps build/wheel/*.whl
	$(RUN)/pip install -q "$$(ls build/wheel/*.whl)[demo]"
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp | system-test
	$(RUN)/pip install -q "pip>=25.1"
	$(RUN)/pip install -q --group test
	@touch $@

lint: $(VENV)/test.stamp
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' ':!third_party')
	$(RUN)/mypy

# Tests that need root make networks of the machine's and measure them: by themselves.
test-python: $(VENV)/test.stamp
	$(RUN)/python -m pytest -n 2 --dist worksteal -m "not root"
	$(RUN)/python -m pytest -m root

# One build for all environments.
build/wheel/done: $(sources) | system-demo $(VENV)/bin/python
	rm -rf build/wheel
	$(RUN)/pip wheel -q --no-deps -w build/wheel .
	@touch $@

.PRECIOUS: $(ENGINES)/%/done
engine-%: $(ENGINES)/%/done ;
$(ENGINES)/%/done: tests/engines/%.txt build/wheel/done
	(test -x $(ENGINES)/$*/bin/python || $(PYTHON) -m venv $(ENGINES)/$*) && \
	  $(ENGINES)/$*/bin/pip install -q --no-deps -r tests/engines/$*.txt && \
	  $(ENGINES)/$*/bin/pip install -q --no-deps --force-reinstall build/wheel/*.whl && touch $@ || \
	  (test -z "$(CI)" && echo "no environment of $*: its tests will be skipped")

test-vllm: $(VENV)/test.stamp engine-vllm
	$(RUN)/python -m pytest -n 2 tests/engines/test_vllm.py
	$(RUN)/python -m pytest tests/engines/test_vllm_servers.py

test-engines: $(VENV)/test.stamp engine-vllm engine-sglang engine-lmcache engine-transformers
	$(RUN)/python -m pytest -n 2 tests/engines --ignore tests/engines/test_vllm_servers.py
	$(RUN)/python -m pytest tests/engines/test_vllm_servers.py

# Each sanitizer is a build of its own; the first also measures coverage of the core. Counters of threaded code may
# read negative (gcc bug 68080), which is no error of ours. -O1 -g1 compiles in half the time, and still names lines.
test-cpp: build/asan/done build/tsan/done
	$(RUN)/gcovr --root . --filter 'cpp/' --filter 'include/' --gcov-ignore-parse-errors=negative_hits.warn \
	  --print-summary build/asan

build/asan/done: FLAGS := -DDUALKV_SANITIZE=address,undefined -DDUALKV_COVERAGE=ON
build/tsan/done: FLAGS := -DDUALKV_SANITIZE=thread
build/%/done: $(sources) $(wildcard tests/cpp/* tests/fuzz/*) | $(VENV)/test.stamp
	cmake -S . -B build/$* -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" \
	  -DDUALKV_TESTS=ON $(FLAGS) >/dev/null
	cmake --build build/$* -j $(JOBS)
	seq 0 $$(($(JOBS) - 1)) | GTEST_TOTAL_SHARDS=$(JOBS) xargs -P $(JOBS) -I{} \
	  env GTEST_SHARD_INDEX={} build/$*/tests/cpp/dualkv_tests --gtest_brief=1
	@touch $@

# The tests that need an RDMA device, in a VM with soft-RoCE; RDMA_COMMAND: run that there instead.
RDMA_COMMAND ?= bash tests/rdma/tests.sh
rdma: build/asan/done | system-rdma
	@if command -v qemu-system-x86_64 >/dev/null || test -n "$(CI)"; then \
	  $(RUN)/python tests/rdma/vm.py -- $(RDMA_COMMAND); else echo "no qemu: the RDMA tests are skipped"; fi

system-rdma:
	@command -v qemu-system-x86_64 >/dev/null && command -v ib_write_bw >/dev/null && command -v cpio >/dev/null && \
	  test -e /bin/busybox || ($(APT) update -qq && $(APT) install -y -qq --no-install-recommends qemu-system-x86 \
	  busybox-static kmod cpio iproute2 rdma-core ibverbs-providers perftest >/dev/null) || \
	  echo "could not install qemu and rdma-core"

format: $(VENV)/test.stamp
	$(RUN)/ruff check --fix . && $(RUN)/ruff format .
	$(RUN)/clang-format -i $$(git ls-files '*.cpp' '*.h' ':!third_party')

clean:
	rm -rf build $(VENV) $(ENGINES) dualkv-demo.html
