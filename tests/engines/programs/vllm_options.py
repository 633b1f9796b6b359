"""What DualKVConnector says of options. Argument: [extra config, ...]. Result: [message or "", ...]."""

import json
import os
import pathlib
import sys
from types import SimpleNamespace

import dualkv
from dualkv.integrations.vllm.options import Options


def said(extra: dict[str, object]) -> str:
    transfer = SimpleNamespace(engine_id="e", kv_connector_extra_config=extra)
    try:
        Options.of(SimpleNamespace(kv_transfer_config=transfer))
    except dualkv.Error as error:
        return error.message
    return ""


pathlib.Path(os.environ["RESULT"]).write_text(json.dumps([said(extra) for extra in json.loads(sys.argv[1])]))
