"""LMCache's own checks of its wheel (lmcache.v1.check) with dualkv behind them; their tables are the result."""

import asyncio
import contextlib
import io
import json
import os
import sys

import yaml

arguments = json.loads(sys.argv[1])
os.environ["LMCACHE_CONFIG_FILE"] = os.environ["RESULT"] + ".yaml"
with open(os.environ["LMCACHE_CONFIG_FILE"], "w", encoding="utf-8") as config:
    yaml.safe_dump(arguments["config"], config)

from lmcache.v1.check import registry  # noqa: E402  (reads its configuration when imported)

printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    asyncio.run(registry.get_mode(arguments["mode"])(**arguments["options"]))
passed = {}
for line in printed.getvalue().splitlines():
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if len(cells) >= 6 and "/" in cells[4] and cells[4] != "Pass/All":
        passed[cells[0]] = cells[4]
with open(os.environ["RESULT"], "w", encoding="utf-8") as result:
    json.dump({"passed": passed, "printed": printed.getvalue()}, result)
os._exit(0)  # what is being checked leaves threads of its own behind
