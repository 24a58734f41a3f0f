"""The client side: a typed Python client (``client``), the ``cffa`` command line (``cli``), the demo.

``servers`` starts the embedded service as child processes; nothing here imports the API or the worker.
"""
