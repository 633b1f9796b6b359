"""``dualkv store``: look after stored blocks."""

import json
from typing import Any

import click

import dualkv
from dualkv.sizes import parse_size


def _open(directory: str, layers: int, tokens: int, layer_bytes: str, namespace: str) -> dualkv.Store:
    geometry = dualkv.KvGeometry(
        layers=layers, tokens_per_block=tokens, layer_bytes=parse_size(layer_bytes), namespace=namespace
    )
    return dualkv.Store(f"file://{directory}", geometry, staging=geometry.file_bytes * 4)


def _geometry_options(command: Any) -> Any:
    for option in reversed(
        [
            click.argument("directory", type=click.Path(exists=True, file_okay=False, resolve_path=True)),
            click.option("--layers", type=int, required=True),
            click.option("--tokens-per-block", "tokens", type=int, required=True),
            click.option("--layer-bytes", required=True, help="Of one Layer Block, like 40KiB."),
            click.option("--namespace", required=True),
            click.option("--json", "as_json", is_flag=True),
        ]
    ):
        command = option(command)
    return command


@click.group()
def store() -> None:
    """Check stored blocks, and make room."""


@store.command(
    epilog="Example: dualkv store verify /mnt/kv --layers 61 --tokens-per-block 64 --layer-bytes 41984 --namespace m"
)
@_geometry_options
@click.option("--quarantine", is_flag=True, help="Move bad blocks aside, so that they are misses.")
def verify(as_json: bool, quarantine: bool, **geometry: Any) -> None:
    """Read and check every block of a namespace; exit code 1 if one is bad."""
    opened = _open(**geometry)
    blocks, bad = opened.verify()
    for line in bad if quarantine else []:
        opened.quarantine(bytes.fromhex(line.partition(":")[0]))
    if as_json:
        click.echo(json.dumps({"blocks": blocks, "bad": bad}))
    else:
        click.echo("\n".join([*bad, f"{blocks} blocks, {len(bad)} bad"]))
    if bad:
        raise SystemExit(1)


@store.command(
    epilog="Example: dualkv store collect /mnt/kv --quota 2TB --layers 61 --tokens-per-block 64 --layer-bytes 41984 "
    "--namespace m"
)
@_geometry_options
@click.option("--quota", required=True, help="Size the namespace may have, like 2TB.")
def collect(as_json: bool, quota: str, **geometry: Any) -> None:
    """Evict least recently used blocks until the namespace fits."""
    evicted = _open(**geometry).collect(quota)
    if evicted is None:
        raise dualkv.Error("another process is collecting this namespace; try again later", "io")
    click.echo(json.dumps({"evicted": evicted}) if as_json else f"{evicted} blocks evicted")
