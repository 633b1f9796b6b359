"""Reference engines: small decoders and serving loops that move their KV through dualkv."""
