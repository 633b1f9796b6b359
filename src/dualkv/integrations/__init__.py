"""Plug-ins for inference engines. Nothing of dualkv imports them; each imports its engine (docs/engines/)."""
