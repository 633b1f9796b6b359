"""vLLM: KV from storage over both paths, and prompts handed from prefill to decode servers (docs/engines/vllm.md).

Named in ``--kv-transfer-config``::

    {"kv_connector": "DualKVConnector", "kv_connector_module_path": "dualkv.integrations.vllm", "kv_role": "kv_both",
     "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"store": "file:///mnt/kv"}}
"""

from dualkv.integrations.vllm.connector import DualKVConnector

__all__ = ["DualKVConnector"]
