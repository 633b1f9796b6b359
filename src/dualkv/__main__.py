"""``python -m dualkv``: the ``dualkv`` command, of this interpreter's environment."""

from dualkv.cli.main import main

if __name__ == "__main__":
    main()
