"""Reference engines: a prefill and a decode engine to learn the API from. ``prefill.py`` and ``decode.py`` first."""
