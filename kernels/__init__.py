"""Kernels: one op a file, each with its plain-torch reference; no file imports anything above itself."""

if __name__ != "ttaq.kernels":
    raise ImportError(
        f"this folder installs as ttaq.kernels and was imported as {__name__}: "
        "run `pip install -e .` and write `import ttaq.kernels`"
    )
