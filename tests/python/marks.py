"""Marks and parameters that tests share."""

import pytest
from support import RDMA_DEVICES

needs_rdma = pytest.mark.skipif(not RDMA_DEVICES, reason="no RDMA device; make rdma has some")
RDMA = pytest.param("rdma", marks=needs_rdma)
