# What `make rdma` runs in the VM.
set -euo pipefail
export DUALKV_RDMA_WIRE=d0
build/asan/tests/cpp/dualkv_tests --gtest_brief=1 --gtest_filter='*Rdma*:*/*rdma*'
pytest=".venv/bin/python -m pytest -q -p no:cacheprovider --durations=10"
$pytest -k "rdma and not demo" tests/python/test_rdma.py tests/python/test_failures.py tests/python/test_data_plane.py
$pytest -n 2 -k demo tests/python/test_rdma.py  # most of their time is spent on one core
