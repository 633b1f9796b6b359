"""vLLM: KV from storage over both paths, and prompts handed from prefill to decode servers (docs/engines/vllm.md).

Named in ``--kv-transfer-config``::

    {"kv_connector": "DualKVConnector", "kv_connector_module_path": "dualkv.integrations.vllm", "kv_role": "kv_both",
     "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"store": "file:///mnt/kv"}}
"""

import contextlib

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from dualkv.integrations.vllm.connector import DualKVConnector

# By name as well: MultiConnector looks its children up for their statistics.
with contextlib.suppress(ValueError):  # it is registered already
    KVConnectorFactory.register_connector("DualKVConnector", __name__, "DualKVConnector")

__all__ = ["DualKVConnector"]
