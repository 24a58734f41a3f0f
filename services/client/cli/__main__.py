"""``python -m services.client.cli``: the same as ``cffa``."""

from services.client.cli import main

if __name__ == "__main__":
    main()
