# What `make rdma` runs in the VM.
set -euo pipefail
export DUALKV_RDMA_WIRE=d0
build/asan/tests/cpp/dualkv_tests --gtest_brief=1 --gtest_filter='*Rdma*:*/*rdma*'
.venv/bin/python -m pytest -q -p no:cacheprovider -k rdma --durations=10 \
  tests/python/test_rdma.py tests/python/test_failures.py tests/python/test_data_plane.py
