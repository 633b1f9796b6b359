"""SGLang: HiCache's third tier, read from and saved to a dualkv store (docs/engines/sglang.md).

Named in ``--hicache-storage-backend dynamic --hicache-storage-backend-extra-config``::

    {"backend_name": "dualkv", "module_path": "dualkv.integrations.sglang", "class_name": "DualKVHiCache",
     "interface_v1": 1, "store": "file:///mnt/kv"}
"""

from dualkv.integrations.sglang.backend import DualKVHiCache

__all__ = ["DualKVHiCache"]
