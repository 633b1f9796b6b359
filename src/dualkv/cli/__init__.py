"""The ``dualkv`` command."""
